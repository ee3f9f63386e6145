"""robust_dist.engines.fsdp: what `check` refuses, what `save` leaves behind, what `load` will not take."""

import functools
import json
import shutil
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from robust_dist.checkpoint import CheckpointError, make_state, note_parameters
from robust_dist.engines import fsdp
from robust_dist.engines.accelerate import EngineError
from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.schedule import RankDisagreementError
from tests.engines import course
from tests.engines.matrix import assert_passed, run_scenarios
from tests.engines.torch_engines import Run, same_bits
from tests.ranks import TIMEOUT, run_ranks
from tests.versions import needs_torch_2_7

pytestmark = needs_torch_2_7

WORLD = 2
SHARDED = ("FSDP1", "FSDP1, use_orig_params=False", "FSDP2")


def refused(error, call, *words):
    """The call raises this error with these words, on this rank, before any collective could time out."""
    began = time.perf_counter()
    with pytest.raises(error) as found:
        call()
    assert time.perf_counter() - began < TIMEOUT / 2
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


def _shard(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def an_optimizer_made_before_fully_shard_is_refused():
    model = course.Net()
    optimizer = course.optimizer_of(model)
    _shard(model)
    # Without the check: steps that raise nothing and train nothing.
    before = [p.full_tensor().clone() for p in model.parameters()]
    course.loss_of(model(course.part(0, 0)[0]), course.part(0, 0)[1]).backward()
    optimizer.step()
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before, strict=True))
    refused(
        EngineError, lambda: fsdp.check(model, optimizer), "8 parameters that are not the model's", "after wrapping"
    )
    refused(EngineError, lambda: fsdp.save("unused", model, optimizer), "after wrapping")
    fsdp.check(model, course.optimizer_of(model))


def an_optimizer_made_before_flat_parameters_is_refused():
    model = course.Net()
    optimizer = course.optimizer_of(model)
    flat = FSDP(model, use_orig_params=False, device_id=torch.device("cpu"))
    refused(EngineError, lambda: fsdp.check(flat, optimizer), "_flat_param", "after wrapping")
    fsdp.check(flat, RAdaBeliefW(flat.parameters()))


def groups_over_flat_parameters_are_refused():
    run = Run("FSDP1, use_orig_params=False")
    params = list(run.model.parameters())
    optimizer = RAdaBeliefW([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}])
    refused(EngineError, lambda: fsdp.check(run.model, optimizer), "2 param groups", "use_orig_params=True")


def a_lost_parameter_is_refused_on_every_rank():
    model = _shard(course.Net())
    everything = course.groups_of(model)
    fsdp.check(model, RAdaBeliefW(everything))
    groups = everything[:1] if dist.get_rank() == 1 else everything
    refused(EngineError, lambda: fsdp.check(model, RAdaBeliefW(groups)), "rank 1: ", "norm.bias", "no param group")


def frozen_and_mixed_parameters_pass():
    model = course.Net()
    model.gate.requires_grad_(False)
    fully_shard(model.up, mesh=init_device_mesh("cpu", (WORLD,)))
    fsdp.check(model, course.optimizer_of(model))
    wrapped = nn.parallel.DistributedDataParallel(course.Net())
    fsdp.check(wrapped, course.optimizer_of(wrapped))


def a_child_called_module_hides_no_lost_parameter():
    class Scaled(course.Net):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.module = nn.Linear(3, 3, bias=False)

    model = _shard(Scaled())
    kept = [param for name, param in model.named_parameters() if name != "weight"]
    refused(EngineError, lambda: fsdp.check(model, RAdaBeliefW(kept)), "no param group", ": weight;")
    wrapped = nn.parallel.DistributedDataParallel(Scaled())
    kept = [param for name, param in wrapped.named_parameters() if name != "module.module.weight"]
    refused(EngineError, lambda: fsdp.check(wrapped, RAdaBeliefW(kept)), "no param group", ": module.weight;")


def whole_parameters_are_sharded_again(folder):
    """Under reshard_after_forward=False, after a part's own forward pass, and in a compiled model."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = course.Net()
    for module in (model.up, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    compiled = torch.compile(model, backend="eager")
    optimizer = course.optimizer_of(compiled)
    images, labels = course.part(0, 0)
    for _ in range(2):
        course.loss_of(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(images)
        model.up(images)
    assert not any(isinstance(param, DTensor) for param in model.parameters())
    fsdp.save(folder / "never resharded", compiled, optimizer)
    with torch.no_grad():
        model(images)
    fsdp.check(compiled, optimizer)
    with torch.no_grad():
        model(images)
    note_parameters(folder, compiled, optimizer)
    made = course.groups_of(compiled)
    assert all(isinstance(param, DTensor) for group in made for param in group["params"])
    with torch.no_grad():
        model(images)
    fsdp.load(folder / "never resharded", model, optimizer)
    # Between a forward and its backward, too: the gradients are those that they would have been.
    loss = course.loss_of(model(images), labels)
    fsdp.check(model, optimizer)
    loss.backward()
    found = [param.grad.to_local().clone() for param in model.parameters()]
    optimizer.zero_grad()
    course.loss_of(model(images), labels).backward()
    assert all(torch.equal(a, p.grad.to_local()) for a, p in zip(found, model.parameters(), strict=True))


def a_group_of_whole_parameters_is_refused():
    model = _shard(course.Net())
    optimizer = RAdaBeliefW(model.down.parameters())
    with torch.no_grad():
        model(course.part(0, 0)[0])
    # Its own shards are the group's; what the root holds now is not.
    refused(ValueError, lambda: optimizer.add_param_group({"params": model.gate.parameters()}), "2 param", "reshard()")
    refused(ValueError, lambda: RAdaBeliefW(model.parameters()), "6 parameters", "param_groups(model)")
    assert len(optimizer.param_groups) == 1
    for group in param_groups(nn.ModuleList([model.gate, model.norm, model.up]), 0.1):
        optimizer.add_param_group(group)
    fsdp.check(model, optimizer)


def a_refused_load_leaves_state_gradients_and_what_is_frozen(folder):
    path, run = _saved(folder), Run("FSDP2")
    run.go(0, 1)
    run.train_part(*course.part(1, 0, *run.engine.data()), True)
    run.model.gate.requires_grad_(False)
    groups = run.optimizer.param_groups
    state, rates = dict(run.optimizer.state), [group["lr"] for group in groups]
    del run.optimizer.state[run.model.up.weight]
    before, grads = {p: dict(s) for p, s in run.optimizer.state.items()}, run.gradients()
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    load = functools.partial(fsdp.load, path, run.model, run.optimizer, run.schedule)
    refused(CheckpointError, load, "param group 0 has other parameters")
    assert run.optimizer.state.keys() == before.keys() < state.keys()
    assert all(run.optimizer.state[p][key] is value for p, one in before.items() for key, value in one.items())
    assert all(torch.equal(a, b) for a, b in zip(run.gradients().values(), grads.values(), strict=True))
    assert [n for n, p in run.model.named_parameters() if not p.requires_grad] == ["gate.weight", "gate.bias"]
    assert [group["lr"] for group in groups] == rates


def another_step_on_one_rank_is_not_saved(folder):
    run = Run("FSDP2")
    if dist.get_rank() == 1:
        run.schedule.last_epoch = 3
    save = functools.partial(fsdp.save, folder / "other step", run.model, run.optimizer, run.schedule)
    refused(RankDisagreementError, save, "step: rank 0: 0; rank 1: 3")
    assert not (folder / "other step").exists()


def an_asynchronous_save_is_of_its_step(engine, folder):
    run = Run(engine)
    run.go(0, 3)
    path = folder / f"{engine}, asynchronous"
    writing = fsdp.save(path, run.model, run.optimizer, run.schedule, async_=True)
    end = run.go(3)
    writing.result()
    fresh = Run(engine)
    fsdp.load(path, fresh.model, fresh.optimizer, fresh.schedule)
    assert same_bits(fresh.go(3), end)


def a_save_before_the_first_step_is_step_0(engine, folder):
    path, run = folder / f"{engine}, step 0", Run(engine)
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    assert not run.optimizer.state
    fresh = Run(engine)
    fsdp.load(path, fresh.model, fresh.optimizer, fresh.schedule)
    assert not fresh.optimizer.state
    end = fresh.go(0)
    assert same_bits(run.go(0), end)
    fresh.assert_ends_on_track()


def a_save_replaces_the_older_one_of_its_name(folder):
    path, run = folder / "replaced", Run("FSDP2")
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    run.go(0, 2)
    # What a killed save left.
    (folder / ".replaced.partial").mkdir(exist_ok=True)
    dist.barrier()
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    assert json.loads((path / "manifest.json").read_text())["step"] == 2
    assert sorted(p.name for p in folder.iterdir() if "replaced" in p.name) == ["replaced"]


def _saved(folder, engine="FSDP2"):
    run, path = Run(engine), folder / f"{engine}, whole"
    if not path.exists():
        run.go(0, 4)
        fsdp.save(path, run.model, run.optimizer, run.schedule)
    return path


def _torn(folder, name, tear):
    path = folder / name
    if dist.get_rank() == 0:
        shutil.copytree(_saved_path(folder), path)
        tear(path)
    dist.barrier()
    return path


def _saved_path(folder):
    return folder / "FSDP2, whole"


def _cut_short(path):
    file = next(path.glob("__1_*"))
    file.write_bytes(file.read_bytes()[:-7])


def _change_a_bit(path):
    file = next(path.glob("__0_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _change_a_step(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 5'))


TEARS = {
    "another step": (_change_a_step, "its checksum differs"),
    "cut short": (_cut_short, "__1_0.distcp"),
    "changed": (_change_a_bit, "__0_0.distcp"),
    "a file gone": (lambda path: next(path.glob("__1_*")).unlink(), "__1_0.distcp"),
    "not to its end": (lambda path: (path / "manifest.json").unlink(), "not completely written"),
}


def a_torn_folder_is_refused(folder):
    _saved(folder)
    run = Run("FSDP2")
    before = run.whole()
    for name, (tear, word) in TEARS.items():
        path = _torn(folder, name, tear)
        load = functools.partial(fsdp.load, path, run.model, run.optimizer, run.schedule)
        refused(CheckpointError, load, str(path), word)
    assert same_bits(run.whole(), before)
    assert not run.optimizer.state


class Wider(course.Net):
    """Another `down`, and a layer more."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(10, 4)
        self.extra = nn.Linear(2, 2, bias=False)


class Narrower(course.Net):
    def __init__(self):
        super().__init__()
        del self.gate


def another_model_is_refused(folder):
    path = _saved(folder)
    for made, words in (
        (Wider, ("lacks extra.weight", "down.weight [3, 10] there, [4, 10] here")),
        (Narrower, ("this one lacks gate.bias, gate.weight",)),
    ):
        model = _shard(made())
        optimizer = course.optimizer_of(model)
        before = [p.to_local().clone() for p in model.parameters()]
        schedule = course.schedule_of(optimizer)
        load = functools.partial(fsdp.load, path, model, optimizer, schedule)
        refused(CheckpointError, load, "another model", *words)
        assert all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
        assert not optimizer.state
        course.assert_settings(optimizer.param_groups, 0)


def another_optimizer_is_refused(folder):
    run = Run("FSDP2")
    path = folder / "AdamW"
    adamw = torch.optim.AdamW(course.groups_of(run.model), amsgrad=True)
    make_state(adamw)
    fsdp.save(path, run.model, adamw)
    load = functools.partial(fsdp.load, path, run.model, run.optimizer)
    refused(CheckpointError, load, "another optimizer: AdamW", "max_exp_avg_sq", "this is RAdaBeliefW")
    fsdp.load(path, run.model, adamw)
    refused(CheckpointError, functools.partial(fsdp.load, path, run.model, run.optimizer, run.schedule), "no schedule")


def other_groups_are_refused(folder):
    path, run = _saved(folder), Run("FSDP2")
    decaying, others = course.groups_of(run.model)
    three = [decaying, {**others, "params": others["params"][:2]}, {**others, "params": others["params"][2:]}]
    swapped = [others, decaying]
    named = [{**decaying, "label": "decaying"}, others]
    for groups, words in (
        (three, ("2 param groups", "has 3")),
        (swapped, ("param group 0 has other parameters", "gate.bias")),
        (named, ("param group 0 has other settings", "label")),
    ):
        load = functools.partial(fsdp.load, path, run.model, RAdaBeliefW(groups))
        refused(CheckpointError, load, *words)


def other_groups_on_one_rank_are_refused_on_both(folder):
    path, run = _saved(folder), Run("FSDP2")
    groups = course.groups_of(run.model)
    if dist.get_rank() == 1:
        groups = groups[::-1]
    load = functools.partial(fsdp.load, path, run.model, RAdaBeliefW(groups))
    refused(CheckpointError, load, "rank 1: ", "param group 0 has other parameters")


def accelerate_swaps_the_parameters_of_an_optimizer_made_before():
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

    pretend_fsdp_runs_on_cpus()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = course.Net()
    made = course.optimizer_of(model)
    wrapped, optimizer = accelerator.prepare(model, made)
    assert optimizer.optimizer is made
    fsdp.check(wrapped, optimizer)
    refused(EngineError, lambda: fsdp.check(wrapped, course.optimizer_of(course.Net())), "after wrapping")


SCENARIOS = (
    an_optimizer_made_before_fully_shard_is_refused,
    an_optimizer_made_before_flat_parameters_is_refused,
    groups_over_flat_parameters_are_refused,
    a_lost_parameter_is_refused_on_every_rank,
    frozen_and_mixed_parameters_pass,
    a_child_called_module_hides_no_lost_parameter,
    whole_parameters_are_sharded_again,
    a_group_of_whole_parameters_is_refused,
    a_refused_load_leaves_state_gradients_and_what_is_frozen,
    another_step_on_one_rank_is_not_saved,
    *(functools.partial(an_asynchronous_save_is_of_its_step, engine) for engine in SHARDED),
    *(functools.partial(a_save_before_the_first_step_is_step_0, engine) for engine in (*SHARDED[::2], "DDP")),
    a_save_replaces_the_older_one_of_its_name,
    a_torn_folder_is_refused,
    another_model_is_refused,
    another_optimizer_is_refused,
    other_groups_are_refused,
    other_groups_on_one_rank_are_refused_on_both,
    # Accelerate's state is the process's: nothing comes after it.
    accelerate_swaps_the_parameters_of_an_optimizer_made_before,
)


def _name(scenario):
    partial = isinstance(scenario, functools.partial)
    return f"{scenario.func.__name__} {scenario.args[0]}" if partial else scenario.__name__


def _bound(scenario, folder):
    function = getattr(scenario, "func", scenario)
    return functools.partial(scenario, folder) if "folder" in function.__code__.co_varnames else scenario


def _launch(folder):
    warnings.simplefilter("ignore")
    return run_scenarios({_name(scenario): _bound(scenario, folder) for scenario in SCENARIOS})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(_launch, WORLD, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", [_name(scenario) for scenario in SCENARIOS])
def test_of_two_ranks(results, name):
    assert_passed(results, name)


def test_one_process_without_a_group_saves_and_loads(tmp_path):
    model = course.Net()
    optimizer = course.optimizer_of(model)
    schedule = course.schedule_of(optimizer)
    fsdp.check(model, optimizer)
    fsdp.save(tmp_path / "0", model, optimizer, schedule)
    for step in range(8):
        course.assert_settings(optimizer.param_groups, step)
        course.loss_of(model(course.part(step, 0)[0]), course.part(step, 0)[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    fsdp.save(tmp_path / "8", model, optimizer, schedule)
    end = course.named(model)
    fsdp.load(tmp_path / "0", model, optimizer, schedule)
    course.assert_settings(optimizer.param_groups, 0)
    assert same_bits(course.named(model), course.named(course.Net()))
    fsdp.save(tmp_path / "1", model, optimizer, schedule, async_=True).result()
    fsdp.load(tmp_path / "8", model, optimizer, schedule)
    course.assert_settings(optimizer.param_groups, 8)
    assert same_bits(course.named(model), end)
    assert {state["step"].item() for state in optimizer.state.values()} == {8.0}


def test_a_save_that_was_killed_between_its_two_renames_is_finished_by_the_next_load_or_save(tmp_path):
    model = course.Net()
    optimizer = course.optimizer_of(model)
    whole, cut_off = tmp_path / "here", tmp_path / ".here.partial"
    fsdp.save(whole, model, optimizer)
    whole.rename(cut_off)
    fsdp.load(whole, model, optimizer)
    assert whole.is_dir()
    assert not cut_off.exists()
    whole.rename(cut_off)
    fsdp.save(whole, model, optimizer)
    fsdp.load(whole, model, optimizer)
    (whole / "manifest.json").unlink()
    whole.rename(cut_off)
    with pytest.raises(CheckpointError, match="has no manifest"):
        fsdp.load(whole, model, optimizer)


def test_state_is_made_without_a_trace_but_the_state():
    """No hook, no schedule and no gradient sees the step that makes it; parameters keep their bits."""
    model = course.Net()
    optimizer = course.optimizer_of(model)
    schedule = course.schedule_of(optimizer)
    seen, before = [], course.named(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    grad = model.up.weight.grad = torch.ones(10, 6)
    model.gate.requires_grad_(False)
    make_state(optimizer)
    assert {*optimizer.state} == {param for param in model.parameters() if param.requires_grad}
    assert not seen
    assert model.up.weight.grad is grad
    assert all(param.grad is None for name, param in model.named_parameters() if name != "up.weight")
    assert same_bits(course.named(model), before)
    course.assert_settings(optimizer.param_groups, 0)
    assert schedule.last_epoch == 0
    made = {param: dict(state) for param, state in optimizer.state.items()}
    make_state(optimizer, model.gate.parameters())
    assert all(optimizer.state[p][key] is value for p, one in made.items() for key, value in one.items())
    assert model.gate.weight in optimizer.state
