import importlib.util
import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.checkpoint.store import CheckpointError
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.checkpoint.zero_files import cut_group, is_zero, join_group, round_robin, sub_groups, undo_round_robin
from robust_dist.checkpoint.zero_read import read_zero
from robust_dist.checkpoint.zero_write import write_zero
from robust_dist.engines.accelerate import base_optimizer
from robust_dist.engines.deepspeed import register
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.toys import DECAY, LR, batch, same, used, wanted
from tests.ranks import run_ranks

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
# Raised by DeepSpeed itself, at its import and in torch.load.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TOTAL, SIZE, OFF = 8, 12, 6
BETAS = (0.8, 0.99)
BF16 = {"bf16": {"enabled": True}}
# name -> (stage, additions to the JSON)
SOURCES = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "round_robin": (2, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "sub_groups": (3, {"zero_optimization": {"stage": 3, "sub_group_size": 20}}),
    "aligned": (2, {"zero_optimization": {"stage": 2, "parameter_alignment": True}}),
    "bf16_zero0": (0, BF16),
    "bf16_zero1": (1, BF16),
    "bf16_zero1_fp32_grads": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16_zero2": (2, BF16),
    "bf16_zero3": (3, BF16),
}
BASIC = ("zero0", "zero1", "zero2", "zero3")
# (source, tag, stage, additions to the JSON)
TARGETS = [
    *(
        (source, tag, (stage + turn) % 4, {})
        for turn, tag in ((1, "before"), (2, "after"))
        for stage, source in enumerate(BASIC)
    ),
    ("zero2", "before", 2, {}),
    ("zero3", "after", 3, {}),
    ("round_robin", "before", 2, SOURCES["round_robin"][1]),
    ("round_robin", "after", 3, {}),
    ("sub_groups", "before", 3, SOURCES["sub_groups"][1]),
    ("sub_groups", "after", 1, {}),
    ("bf16_zero2", "before", 3, BF16),
    ("bf16_zero3", "before", 0, BF16),
    ("bf16_zero0", "before", 1, SOURCES["bf16_zero1_fp32_grads"][1]),
    ("bf16_zero1_fp32_grads", "after", 2, BF16),
]


def targets_at(world):
    """All of them on one rank; each on one of the other world sizes, where it takes longer."""
    parity = {3: 0, 4: 1}.get(world)
    return [(number, target) for number, target in enumerate(TARGETS) if parity in (None, number % 2)]


def row_of(stage, more):
    """The README's row for a source or target."""
    return f"ZeRO {stage}, bf16" if "bf16" in more else f"ZeRO {stage}"


def marks_of(world):
    rows = sorted({row_of(stage, more) for _, (_, _, stage, more) in targets_at(world) if "bf16" not in more})
    return [pytest.mark.cell(row, "convert in", world) for row in rows]


class Odd(nn.Module):
    """Sizes divisible by no number of ranks, a one-element parameter, a tied and a frozen one, and buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 7)
        self.middle = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.middle.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(5, 7) / 3, requires_grad=False)
        self.last = nn.Linear(5, 3)
        self.register_buffer("shift", torch.arange(7) / 8)
        self.register_buffer("seen", torch.tensor(11))

    def forward(self, images):
        hidden = torch.tanh(self.first(images)) * self.gain + self.shift.to(images.dtype)
        hidden = torch.tanh(self.tied(torch.tanh(self.middle(hidden))))
        return self.last(hidden @ self.frozen.T)


def groups_of(model):
    split = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            split[parameter.ndim > 1].append(parameter)
    return [
        {"params": split[True], "weight_decay": DECAY},
        {"params": split[False], "weight_decay": 0.0, "betas": BETAS},
    ]


def start(stage, more, client=False, optimizer="RAdaBeliefW"):
    import deepspeed

    config = {
        "train_batch_size": SIZE,
        "train_micro_batch_size_per_gpu": SIZE // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": optimizer != "RAdaBeliefW",
    } | more
    model = Odd()
    if client:
        mine = RAdaBeliefW(groups_of(model), lr=LR)
        return deepspeed.initialize(
            model=model, optimizer=mine, lr_scheduler=RobustSchedule(mine, TOTAL), config=config
        )[0]
    # DeepSpeed's own AdamW would need compiling first.
    torchs = {"torch_adam": True} if optimizer == "AdamW" else {}
    config["optimizer"] = {"type": optimizer, "params": {"lr": LR, **torchs}}
    if optimizer == "RAdaBeliefW":
        config["scheduler"] = {"type": "RobustSchedule", "params": {"total_num_steps": TOTAL}}
    groups = groups_of(model) if optimizer != "SGD" else [{"params": groups_of(model)[0]["params"]}]
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def train(engine, first, last, check=True):
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    for step in range(first, last):
        now = used(base_optimizer(engine.optimizer))
        assert not check or same(now, wanted(step, TOTAL)), (step, now)
        images, labels = (part[rank::world] for part in batch(step, SIZE))
        engine.backward(nn.functional.cross_entropy(engine(images.to(dtype)).float(), labels))
        engine.step()


def reference():
    """One process without an engine: its weights after the last step."""
    model = Odd()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL)
    for step in range(TOTAL):
        images, labels = batch(step, SIZE)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gather(engine):
    """Full masters and moments of the live engine, by its own means: {name: (fp32, exp_avg, exp_avg_sq)}."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    optimizer = base_optimizer(engine.optimizer)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links them when the first group has stepped, before the second group's state exists.
        engine.optimizer._hp_optimizer_states_linked = False
        link_in_memory_order(engine.optimizer)
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    masters = stage0_masters(engine, optimizer) if engine.zero_optimization_stage() == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if masters:
            state = optimizer.state[masters[name]]
            whole = [masters[name], state["exp_avg"], state["exp_avg_sq"]]
        else:
            whole = [safe_get_full_fp32_param(parameter)]
            whole += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
        found[name] = [
            tensor.detach().clone().reshape(getattr(parameter, "ds_shape", parameter.shape)) for tensor in whole
        ]
    return found


def link_in_memory_order(optimizer):
    # DeepSpeed links by the groups' own order, which differs from the memory's under round_robin_gradients.
    if hasattr(optimizer, "round_robin_bit16_groups"):
        own, optimizer.bit16_groups = optimizer.bit16_groups, optimizer.round_robin_bit16_groups
        optimizer._link_all_hp_params()
        optimizer.bit16_groups = own


def stage0_masters(engine, optimizer):
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if engine.optimizer is optimizer:
        return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {names[id(low)]: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def rest_of(engine):
    """The frozen parameter and the buffers."""
    import deepspeed

    module = engine.module
    with deepspeed.zero.GatheredParameters([module.frozen]):
        return {"frozen": module.frozen.detach().clone(), "shift": module.shift.clone(), "seen": module.seen.clone()}


def prepare_ranks():
    get_ready()
    register()


def disturb(engine):
    """Values that differ from a fresh start's, so that anything omitted by a load is noticed."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([engine.module.frozen], modifier_rank=0), torch.no_grad():
        engine.module.frozen.mul_(1.25)
    engine.module.shift.add_(0.5)
    engine.module.seen.add_(5)


def save_every_source(folder):
    prepare_ranks()
    for name, (stage, more) in SOURCES.items():
        engine = start(stage, more, client=name in ("zero1", "zero3"))
        for tag, first, last in (("before", 0, 3), ("after", 3, 7)):
            train(engine, first, last, check="bf16" not in name)
            engine.save_checkpoint(f"{folder}/{name}_{tag}", tag=f"step{last}", client_state={"epoch": last})
            truth = gather(engine), rest_of(engine)
            if dist.get_rank() == 0:
                torch.save(truth, f"{folder}/{name}_{tag}/truth.pt")
    disturbed = start(2, {})
    disturb(disturbed)
    train(disturbed, 0, 1)
    disturbed.save_checkpoint(f"{folder}/disturbed", tag="step1")
    for other in ("AdamW", "SGD"):
        engine = start(2, {}, optimizer=other)
        train(engine, 0, 1, check=False)
        engine.save_checkpoint(f"{folder}/{other}", tag="step1")


def load_every_target(folder):
    """Load each target into a fresh engine with the JSON's own settings, and run it to the end."""
    prepare_ranks()
    final = reference()
    problems = []
    for number, (source, tag, stage, more) in targets_at(dist.get_world_size()):
        engine = start(stage, more, client=number // 2 % 2 == 1)
        disturb(engine)
        path, client_state = engine.load_checkpoint(f"{folder}/{number}", tag="pytorch_model")
        assert path is not None
        step = {"before": 3, "after": 7}[tag]
        assert client_state["epoch"] == engine.global_steps == step
        truth, rest = torch.load(f"{folder}/truth_{source}_{tag}.pt")
        what = (source, tag, stage)
        problems += differences(gather(engine), truth, (*what, "loaded"))
        problems += [(*what, key) for key, value in rest_of(engine).items() if not torch.equal(value, rest[key])]
        assert base_optimizer(engine.optimizer).param_groups[1]["betas"] == BETAS
        if "bf16" in source:
            train(engine, step, step + 1, check=False)
            continue
        train(engine, step, TOTAL)
        for name, (master, *_) in gather(engine).items():
            worst = (master - final[name]).abs().max().item()
            problems += [(*what, name, worst)] if not worst < 1e-6 else []
    return problems


def differences(found, truth, what):
    assert found.keys() == truth.keys()
    return [
        (*what, name, index)
        for name in truth
        for index, (a, b) in enumerate(zip(found[name], truth[name], strict=True))
        if not torch.equal(a, b)
    ]


def load_through_accelerate(folder):
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, InitProcessGroupKwargs

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    json = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": SIZE // dist.get_world_size(),
        "optimizer": {"type": "RAdaBeliefW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": "auto"}},
        "steps_per_print": 10**9,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = Odd()
    optimizer = DummyOptim(groups_of(model), lr=LR, weight_decay=DECAY)
    schedule = DummyScheduler(optimizer, total_num_steps=TOTAL * accelerator.num_processes)
    engine, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.load_state(f"{folder}/accelerate")
    truth, _ = torch.load(f"{folder}/truth_zero3_before.pt")
    assert differences(gather(engine), truth, ("accelerate",)) == []
    train(engine, 3, 5)
    accelerator.save_state(f"{folder}/saved_by_accelerate")
    if dist.get_rank() == 0:
        torch.save((gather(engine), rest_of(engine)), f"{folder}/truth_saved_by_accelerate.pt")
    else:
        gather(engine), rest_of(engine)


def load_at_three(folder):
    problems = load_every_target(folder)
    load_through_accelerate(folder)
    return problems


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    run_ranks(save_every_source, 2, str(folder), timeout=300.0)
    return folder


def compare(state, truth, rest):
    """What was read equals the engine's state, bit for bit."""
    assert state.optimizer.keys() == truth.keys()
    for name, (master, exp_avg, exp_avg_sq) in truth.items():
        held = state.optimizer[name]
        assert torch.equal(state.model[name], master), name
        assert torch.equal(held["exp_avg"], exp_avg), name
        assert torch.equal(held["exp_avg_sq"], exp_avg_sq), name
        assert (held["step"].shape, held["step"].dtype) == ((), torch.float32)
    for name, tensor in rest.items():
        assert torch.equal(state.model[name], tensor), name
    assert torch.equal(state.model["tied.weight"], state.model["middle.weight"])
    assert list(state.model) == list(Odd().state_dict())


@needs_deepspeed
@quiet
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.cell(row_of(*SOURCES[name]), "convert out", 2)) for name in SOURCES]
)
def test_what_is_read_is_what_the_engine_had_bit_for_bit(sources, name):
    for tag, step in (("before", 3), ("after", 7)):
        path = sources / f"{name}_{tag}"
        assert all(map(is_zero, (path, path / f"step{step}")))
        state = read_zero(path)
        compare(state, *torch.load(path / "truth.pt"))
        assert {float(held["step"]) for held in state.optimizer.values()} == {step}
        assert (state.engine, state.world_size) == (f"zero{SOURCES[name][0]}", 2)
        assert [g["params"] for g in state.groups] == names_of_groups()
        assert [g["betas"] for g in state.groups] == [(0.9, 0.999), BETAS]
        assert [g["initial_weight_decay"] for g in state.groups] == [DECAY, 0.0]
        assert [g["weight_decay"] for g in state.groups] == [DECAY if step < OFF else 0.0, 0.0]
        assert state.schedule["last_epoch"] == step
        assert state.extra["client_state"] == {"epoch": step}
        assert state.extra["buffers"] == ["shift", "seen"]
        assert state.extra["frozen"] == ["frozen"]
        assert state.extra["shared"] == {"tied.weight": "middle.weight"}


def names_of_groups():
    model = Odd()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups_of(model)]


@needs_deepspeed
@quiet
@pytest.mark.parametrize("world", [pytest.param(world, marks=marks_of(world)) for world in (1, 3, 4)])
def test_a_converted_checkpoint_goes_on_as_one_process_would_at_another_stage_and_world(sources, tmp_path, world):
    for number, (source, tag, stage, _) in targets_at(world):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_zero(read_zero(sources / f"{source}_{tag}"), folder, stage=stage, world_size=world)
        shutil.copy(sources / f"{source}_{tag}" / "truth.pt", tmp_path / f"truth_{source}_{tag}.pt")
    (tmp_path / "accelerate").mkdir()
    write_zero(read_zero(sources / "zero3_before"), tmp_path / "accelerate", stage=2, world_size=world)
    shutil.copy(sources / "zero3_before" / "truth.pt", tmp_path / "truth_zero3_before.pt")
    function = load_at_three if world == 3 else load_every_target
    assert run_ranks(function, world, str(tmp_path), timeout=300.0) == [[]] * world
    if world == 3:
        state = read_zero(tmp_path / "saved_by_accelerate")
        compare(state, *torch.load(tmp_path / "truth_saved_by_accelerate.pt"))
        assert state.schedule["last_epoch"] == 5


@needs_deepspeed
@quiet
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_zero_to_fp32_reads_what_is_written(sources, tmp_path, stage):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = read_zero(sources / "zero3_before")
    write_zero(state, tmp_path, stage=stage, world_size=3)
    whole = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    for name in state.optimizer.keys() | {"shift", "seen", "tied.weight"} | ({"frozen"} if stage > 1 else set()):
        assert torch.equal(whole[name], state.model[name].float()), name


@needs_deepspeed
def test_what_is_wrong_with_a_checkpoint_is_said_with_the_files_name(sources, tmp_path):
    second = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def refuse(source, match, damage):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(sources / source, tmp_path / "damaged")
        damage(next((tmp_path / "damaged").glob("step*")))
        with pytest.raises(CheckpointError, match=match):
            read_zero(tmp_path / "damaged")

    def torn(path, share=0.6):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    for source in ("zero1_before", "zero2_before", "zero3_before"):
        refuse(source, f"{second}: missing", lambda tag: (tag / second).unlink())
        refuse(source, f"{second}: torn", lambda tag: torn(tag / second))
        refuse(source, f"{second}: torn", lambda tag: torn(tag / second, 0))
        other = sources / source.replace("before", "after") / "step7" / second
        refuse(source, f"{second}: its groups .* another save", lambda tag, other=other: shutil.copy(other, tag))
    model, frozen_part = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"
    refuse("zero0_after", f"{model}: torn", lambda tag: torn(tag / model))
    refuse("zero3_after", f"{frozen_part}: missing", lambda tag: (tag / frozen_part).unlink())
    refuse("zero3_after", "not a DeepSpeed|missing", lambda tag: [p.unlink() for p in tag.glob("*model_states.pt")])
    refuse(
        "zero1_after",
        "keep one",
        lambda tag: shutil.copy(sources / "zero3_after/step7" / f"zero_pp_rank_0_{model}", tag),
    )
    refuse("AdamW", "rank_0.*not from RAdaBeliefW.* no rectify_threshold.*settings are", lambda tag: None)
    refuse("SGD", "not from RAdaBeliefW.* no rectify_threshold|its state has", lambda tag: None)


@needs_deepspeed
def test_a_frozen_parameter_and_buffers_are_the_checkpoints_own(sources):
    state, fresh = read_zero(sources / "disturbed"), Odd()
    assert torch.equal(state.model["frozen"], fresh.frozen * 1.25)
    assert torch.equal(state.model["shift"], fresh.shift + 0.5)
    assert state.model["seen"] == 16


def test_partitions_put_together_are_what_was_cut_for_any_sizes_and_ranks():
    generator = torch.Generator().manual_seed(0)
    for world in range(1, 10):
        for count in range(1, 6):
            sizes = torch.randint(1, 4, (count, 3), generator=generator).tolist()
            tensors = [torch.randn(size, generator=generator) for size in sizes]
            shapes, total = [tensor.shape for tensor in tensors], sum(map(torch.numel, tensors))
            for stage in (1, 3):
                parts = cut_group(tensors, world, stage)
                assert [part.shape for part in parts] == [parts[0].shape] * world
                assert all(map(torch.equal, join_group(parts, shapes, stage), tensors))
                with pytest.raises(ValueError, match=f"rank {world - 1} holds"):
                    join_group([*parts[:-1], torch.zeros(total + 99)], shapes, stage)
            assert undo_round_robin(round_robin(sizes, world), world) == sizes
            limit = 1 + count
            found = sub_groups(list(map(math.prod, sizes)), world, limit)
            assert [index for part in found for index in part] == list(range(count))
            assert all(found)


def made_up_state():
    model = Odd()
    names = names_of_groups()
    optimizer = {
        name: {"step": torch.tensor(4.0), "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    groups = RAdaBeliefW(groups_of(model), lr=LR).state_dict()["param_groups"]
    groups = [{**group, "params": params} for group, params in zip(groups, names, strict=True)]
    entries = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    extra = {"buffers": ["shift", "seen"], "frozen": ["frozen"], "shared": {"tied.weight": "middle.weight"}}
    return TrainingState(entries, optimizer, groups, {"last_epoch": 4}, extra=extra)


STAGES = [0, 1, 2, pytest.param(3, marks=[needs_deepspeed, quiet])]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_written_is_read_again_at_any_world(tmp_path, stage, bf16):
    state = made_up_state()
    for world in (1, 2, 3, 5, 8):
        folder = tmp_path / str(world)
        folder.mkdir()
        write_zero(state, folder, stage=stage, world_size=world, bf16=bf16)
        again = read_zero(folder)
        assert again.model.keys() == state.model.keys()
        assert again.optimizer.keys() == state.optimizer.keys()
        assert all(torch.equal(again.model[name], tensor) for name, tensor in state.model.items())
        for name, held in state.optimizer.items():
            assert all(torch.equal(again.optimizer[name][key], value) for key, value in held.items())
        assert (again.groups, again.schedule) == (state.groups, state.schedule)
        assert (again.engine, again.world_size) == (f"zero{stage}", world)


def test_a_tied_parameters_further_name_comes_back_where_the_source_left_it_out(tmp_path):
    state = made_up_state()
    del state.model["tied.weight"]
    written(tmp_path, state)
    model = read_zero(tmp_path / "out").model
    assert torch.equal(model["tied.weight"], model["middle.weight"])


def written(tmp_path, state, **more):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").mkdir()
    write_zero(state, tmp_path / "out", **{"stage": 1, "world_size": 2} | more)


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    state = made_up_state()
    del state.optimizer["gain"]
    with pytest.raises(CheckpointError, match="'gain' has no optimizer state"):
        written(tmp_path, state)
    written(tmp_path, state, stage=0)
    state = made_up_state()
    state.optimizer["gain"]["step"] = torch.tensor(3.0)
    with pytest.raises(CheckpointError, match=r"different steps .*'gain' at 3"):
        written(tmp_path, state)
    state = made_up_state()
    state.optimizer["gain"]["exp_avg"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="'gain': its state does not have its shape"):
        written(tmp_path, state)
    state = made_up_state()
    state.extra = {}
    with pytest.raises(CheckpointError, match=r"'shift' a buffer or a frozen|'frozen' a buffer or a frozen"):
        written(tmp_path, state, stage=3)
    written(tmp_path, state, stage=2)


def test_a_state_before_its_first_step_is_written_as_step_0(tmp_path):
    state = made_up_state()
    state.optimizer = {}
    written(tmp_path, state)
    again = read_zero(tmp_path / "out")
    assert all(held["step"] == 0 and not held["exp_avg"].any() for held in again.optimizer.values())


def test_stage_0_names_come_from_the_sidecar_from_shapes_or_not_at_all(tmp_path):
    state = made_up_state()
    written(tmp_path, state, stage=0)
    (tmp_path / "out" / "parameters.json").unlink()
    assert [group["params"] for group in read_zero(tmp_path / "out").groups] == names_of_groups()
    # Two adjacent parameters of one shape, one of which may be frozen.
    del state.extra["shared"]
    written(tmp_path, state, stage=0)
    sidecar = tmp_path / "out" / "parameters.json"
    text = sidecar.read_text()
    sidecar.unlink()
    with pytest.raises(CheckpointError, match=r"do not identify them .*parameters.json"):
        read_zero(tmp_path / "out")
    sidecar.write_text(text.replace("first.weight", "first.wait"))
    with pytest.raises(CheckpointError, match=r"'first.wait' is not a model parameter"):
        read_zero(tmp_path / "out")
    sidecar.write_text("{")
    with pytest.raises(CheckpointError, match=r"parameters.json: does not have"):
        read_zero(tmp_path / "out")


def test_other_folders_are_no_deepspeed_checkpoint(tmp_path):
    assert not any(map(is_zero, (tmp_path, tmp_path / "none")))
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint"):
        read_zero(tmp_path)
    (tmp_path / "latest").write_text("gone")
    assert is_zero(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        read_zero(tmp_path)


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload_ran",)


def test_reading_runs_nothing_that_a_file_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, made_up_state())
    file = tmp_path / "out" / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file)
    torch.save({**content, "more": Payload()}, file)
    with pytest.raises(CheckpointError, match=r"rank_0_.*not safe to load"):
        read_zero(tmp_path / "out")
    assert not (tmp_path / "payload_ran").exists()
