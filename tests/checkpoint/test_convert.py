"""A checkpoint of any engine can be resumed under any other, on any number of ranks, with nothing lost."""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from robust_dist.checkpoint import CheckpointError, CheckpointStore, convert, note_parameters, read, verify
from robust_dist.checkpoint.training_state import bare_names
from robust_dist.cli import main
from robust_dist.optim import RAdaBeliefW
from tests.checkpoint.engines import (
    SAVED,
    TorchRun,
    fsdp1_loads_nothing_into_an_optimizer_without_state,
    go_on,
    odd_moments,
    write,
)
from tests.engines import course
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks
from tests.small_disk import no_file_above
from tests.versions import TORCH_2_7

WRITERS, READERS = 2, 3
SOURCES = (
    "accelerate ddp",
    "file",
    "FSDP1",
    "FSDP2",
    "accelerate fsdp1",
    "accelerate fsdp2",
    "accelerate fsdp2 full",
)
# (writer, reader)
PAIRS = (
    ("accelerate ddp", "FSDP2"),
    ("accelerate ddp", "accelerate fsdp1"),
    ("accelerate ddp", "accelerate fsdp1 full"),
    ("accelerate ddp", "accelerate fsdp2"),
    ("accelerate ddp", "accelerate fsdp2 full"),
    ("file", "FSDP1"),
    ("file", "accelerate ddp"),
    ("FSDP1", "accelerate ddp"),
    ("FSDP1", "accelerate fsdp2"),
    ("FSDP2", "accelerate ddp"),
    ("FSDP2", "accelerate fsdp1"),
    ("accelerate fsdp1", "accelerate ddp"),
    ("accelerate fsdp1", "FSDP2"),
    ("accelerate fsdp2", "accelerate ddp"),
    ("accelerate fsdp2 full", "accelerate ddp"),
    ("accelerate fsdp2 full", "FSDP1"),
)
ODD_MOMENTS = ("accelerate ddp", "accelerate fsdp1", "accelerate fsdp2", "accelerate fsdp2 full")
ROW = {"accelerate ddp": "DDP", "file": "DDP"}


def _write_all(folder):
    scenarios = {kind: functools.partial(write, kind, folder) for kind in SOURCES}
    scenarios["one rank converts"] = functools.partial(_convert_on_one_rank, folder)
    odd = {f"odd moments {kind}": functools.partial(odd_moments, kind, folder) for kind in ODD_MOMENTS}
    return run_scenarios(scenarios | odd)


def _convert_on_one_rank(folder):
    if dist.get_rank() == 1:
        convert(folder / "FSDP2 at 2", folder / "by one rank", "fsdp", 2)
    dist.barrier()


def _read_all(folder):
    found = {
        "fsdp1 without state": functools.partial(fsdp1_loads_nothing_into_an_optimizer_without_state, _sharded(folder))
    }
    for writer, reader in PAIRS:
        for step in SAVED:
            path = _converted(folder, writer, reader, step)
            found[f"{writer} -> {reader} at {step}"] = functools.partial(go_on, reader, path, step)
    return run_scenarios(found)


def _sharded(folder):
    return _converted(folder, "FSDP2", "accelerate fsdp1", 6)


def _target(reader):
    return "ddp" if "ddp" in reader else "fsdp", reader.endswith("full")


def _converted(folder, writer, reader, step):
    return Path(folder, f"{writer} for {_target(reader)} at {step}")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder, and the result of writing every engine's checkpoints into it."""
    if not TORCH_2_7:
        pytest.skip("needs torch 2.7")
    folder = tmp_path_factory.mktemp("written")
    return folder, run_ranks(_write_all, WRITERS, folder)


@pytest.fixture(scope="module")
def written(two):
    """A folder with every engine's checkpoints."""
    folder, results = two
    for name in results[0]:
        if "odd moments" not in name:
            assert_passed(results, name)
    return folder


@pytest.fixture(scope="module")
def outcomes(written):
    """The result of every pair."""
    for writer, reader in PAIRS:
        (to, full), where = _target(reader), functools.partial(_converted, written, writer, reader)
        for step in SAVED:
            if not where(step).exists():
                source, unwrap = written / f"{writer} at {step}", writer == "file"
                convert(source, where(step), to, READERS, full_state_dict=full, unwrap=unwrap)
    return run_ranks(_read_all, READERS, written)


def _row(kind):
    return ROW.get(kind, "FSDP1" if "fsdp1" in kind.lower() else "FSDP2")


def _odd_cells():
    for kind in ODD_MOMENTS:
        columns = ("after an evaluation", "a parameter without a gradient")
        marks = [pytest.mark.cell(_row(kind), column, str(WRITERS)) for column in columns]
        yield pytest.param(kind, marks=marks, id=kind)


@pytest.mark.parametrize("kind", list(_odd_cells()))
def test_accelerates_checkpoints_hold_what_was_stepped_and_nothing_else(two, kind):
    """Saved and loaded after an evaluation, with a parameter never stepped, with gradients, and with a frozen layer."""
    assert_passed(two[1], f"odd moments {kind}")


def _cells(writer, reader):
    yield pytest.mark.cell(_row(writer), "convert out", str(READERS))
    yield pytest.mark.cell(_row(reader), "convert in", str(READERS))


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize(
    ("writer", "reader"), [pytest.param(w, r, marks=list(_cells(w, r)), id=f"{w} -> {r}") for w, r in PAIRS]
)
def test_a_run_of_2_ranks_goes_on_under_another_engine_at_3_on_the_track_of_one_process(outcomes, writer, reader, step):
    assert_passed(outcomes, f"{writer} -> {reader} at {step}")


def test_accelerates_fsdp1_loads_nothing_into_an_optimizer_without_state(outcomes):
    """The bug that our `load_state` fixes; once this fails, Accelerate's own load suffices."""
    assert_passed(outcomes, "fsdp1 without state")


def test_one_rank_of_several_converts_while_the_others_wait(written):
    assert (written / "by one rank").is_dir()


def same(mine, theirs):
    """Whether two nested values are equal bit for bit."""
    if isinstance(mine, torch.Tensor):
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return type(mine) is type(theirs) and len(mine) == len(theirs) and all(map(same, mine, theirs))
    return type(mine) is type(theirs) and mine == theirs


def assert_same_state(mine, theirs):
    for part in ("model", "optimizer", "groups", "schedule"):
        assert same(getattr(mine, part), getattr(theirs, part)), part


def chain(start, tmp_path, *steps):
    at = start
    for number, (to, world) in enumerate(steps):
        convert(at, tmp_path / str(number), to, world)
        at = tmp_path / str(number)
    return at


@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back_again_is_bit_for_bit(written, tmp_path, source):
    start = written / f"{source} at 6"
    other, own = ("fsdp", "ddp") if _row(source) == "DDP" else ("ddp", "fsdp")
    assert_same_state(read(chain(start, tmp_path, (other, 5), (own, 2))), read(start))


def test_ddp_to_zero2_to_fsdp_to_ddp_is_bit_for_bit(written, tmp_path):
    start = written / "accelerate ddp at 6"
    end = read(chain(start, tmp_path, ("zero2", 3), ("fsdp", 2), ("ddp", 1)))
    assert_same_state(end, read(start))
    assert end.world_size == 1


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("step", SAVED)
@pytest.mark.cell("one process", "convert in", "1")
def test_what_2_ranks_wrote_goes_on_in_one_plain_process(written, tmp_path, source, step):
    convert(written / f"{source} at {step}", tmp_path / "one", "ddp", 1, unwrap=source == "file")
    run = TorchRun("one process")
    for part, file in (("model", "pytorch_model"), ("optimizer", "optimizer"), ("schedule", "scheduler")):
        getattr(run, part).load_state_dict(torch.load(tmp_path / "one" / f"{file}.bin", weights_only=True))
    course.assert_settings(run.optimizer.param_groups, step)
    run.go(step)


@pytest.fixture
def trained():
    """A model, its optimizer and schedule after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    return _train(model)


def _train(model):
    optimizer = course.optimizer_of(model)
    schedule = course.schedule_of(optimizer)
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


def save_plainly(folder, trained, **more):
    """Saved in torch's own format, as by Accelerate under DDP."""
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer, schedule = trained
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(schedule.state_dict(), folder / "scheduler.bin")
    for name, content in more.items():
        (folder / name).write_text(content)
    return folder


def as_safetensors(folder):
    from safetensors.torch import save_file

    model = torch.load(folder / "pytorch_model.bin")
    save_file({name: tensor.clone() for name, tensor in model.items()}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()


def names_of(folder):
    return [group["params"] for group in read(folder).groups]


def named_groups(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_names_are_told_from_order_and_shapes_where_one_answer_is_possible(tmp_path, trained):
    folder = save_plainly(tmp_path / "plain", trained)
    assert names_of(folder) == named_groups(*trained[:2])


def test_names_are_told_from_torchs_own_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    named = list(model.named_parameters())[::-1]
    optimizer = course.RAdaBeliefW([{"params": named[:1]}, {"params": named[1:]}])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    folder = save_plainly(tmp_path / "named", (model, optimizer, course.schedule_of(optimizer)))
    as_safetensors(folder)
    assert names_of(folder) == [["1.bias"], ["1.weight", "0.bias", "0.weight"]]


def test_names_that_cannot_be_told_are_an_error_that_the_note_resolves(tmp_path, trained):
    folder = save_plainly(tmp_path / "plain", trained)
    as_safetensors(folder)
    with pytest.raises(CheckpointError, match=r"optimizer\.bin: numbers its parameters.*note_parameters"):
        convert(folder, tmp_path / "no", "fsdp", 2)
    note_parameters(folder, torch.nn.DataParallel(trained[0]), trained[1])
    assert names_of(folder) == named_groups(*trained[:2])


def test_a_swapped_order_is_not_guessed(tmp_path):
    """Two groups of equal shapes: either could be either."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    groups = [{"params": [model[1].weight]}, {"params": [model[0].weight], "weight_decay": 0.0}]
    optimizer = course.RAdaBeliefW(groups)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    folder = save_plainly(tmp_path / "two", (model, optimizer, course.schedule_of(optimizer)))
    with pytest.raises(CheckpointError, match="do not identify them uniquely"):
        read(folder)


def test_a_shape_that_a_frozen_parameter_has_too_names_nothing(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[0].requires_grad_(False)
    optimizer = course.RAdaBeliefW(model[1].parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = save_plainly(tmp_path / "frozen", (model, optimizer, course.schedule_of(optimizer)))
    with pytest.raises(CheckpointError, match="do not identify them uniquely"):
        read(folder)
    note_parameters(folder, model, optimizer)
    assert names_of(folder) == [["1.weight"]]
    assert read(folder).extra["frozen"] == ["0.weight"]


def test_what_goes_to_ddp_is_the_safetensors_file_that_accelerate_writes(tmp_path, trained):
    from safetensors.torch import load_file, load_model

    model, optimizer, _ = trained
    model.add_module("again", model[2])
    file = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    notes = chain(file, tmp_path, ("ddp", 1), ("fsdp", 2), ("ddp", 1))
    for folder in (tmp_path / "0", notes):
        found = load_file(folder / "model.safetensors")
        assert set(found) == {name for name in model.state_dict() if not name.startswith("again")}
        fresh = copy.deepcopy(model)
        torch.nn.init.zeros_(fresh[2].weight)
        # As Accelerate's load_state does; it rejects a file with both names.
        load_model(fresh, folder / "model.safetensors")
        assert same(dict(fresh.state_dict()), dict(model.state_dict()))
        assert same(dict(torch.load(folder / "pytorch_model.bin")), dict(model.state_dict()))


def test_a_shared_parameter_that_shards_hold_twice_is_told_by_its_bits(tmp_path, trained):
    """Without a note of names; a buffer and a frozen parameter of equal constants are no proof."""
    from safetensors.torch import load_file

    model, optimizer, _ = trained
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights |= {"again.weight": model[2].weight.detach().clone(), "scale": torch.ones(4), "other": torch.ones(4)}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    note_parameters(tmp_path, model, optimizer)
    (tmp_path / "parameters.json").write_text(json.dumps({"groups": named_groups(model, optimizer)}))
    convert(tmp_path / "run.pt", tmp_path / "ddp", "ddp", 1)
    assert {*weights} - {*load_file(tmp_path / "ddp" / "model.safetensors")} == {"again.weight"}
    assert same(read(tmp_path / "ddp").model, weights)


def test_slices_of_one_flat_tensor_go_to_safetensors(tmp_path):
    from safetensors.torch import load_file

    flat = torch.arange(12.0)
    weights = {"a.weight": flat[:6].view(2, 3), "a.bias": flat[6:8], "turned": flat[6:].view(3, 2).T, "all": flat}
    step = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    optimizer = {"state": {"a.bias": step}, "param_groups": [{"lr": 0.1, "params": ["a.bias"]}]}
    torch.save({"model": weights, "optimizer": optimizer}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "ddp", "ddp", 1)
    assert same(load_file(tmp_path / "ddp" / "model.safetensors"), weights)


def test_a_dtype_that_safetensors_does_not_have_is_in_torchs_file_alone(tmp_path):
    model = torch.nn.Linear(2, 1, dtype=torch.complex128)
    optimizer = RAdaBeliefW(model.parameters())
    model(torch.ones(2, dtype=torch.complex128)).abs().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "ddp", "ddp", 1)
    assert not (tmp_path / "ddp" / "model.safetensors").exists()
    assert same(read(tmp_path / "ddp").model, dict(model.state_dict()))


def test_both_names_of_a_shared_parameter_come_back_from_safetensors(tmp_path, trained):
    model, optimizer, _ = trained
    model.add_module("again", model[2])
    folder = save_plainly(tmp_path / "shared", trained)
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("again")}
    torch.save(kept, folder / "pytorch_model.bin")
    as_safetensors(folder)
    note_parameters(folder, model, optimizer)
    state = read(chain(folder, tmp_path, ("fsdp", 2), ("ddp", 2)))
    assert set(state.model) == set(model.state_dict())
    assert torch.equal(state.model["again.weight"], model[2].weight)


def test_names_lose_what_a_wrapper_has_surely_added_and_nothing_else():
    wrapped = ["module.a.weight", "module._orig_mod.b"]
    assert bare_names(["a.module.weight", "b._checkpoint_wrapped_module.c"]) == ["a.module.weight", "b.c"]
    assert bare_names(wrapped) == ["module.a.weight", "module.b"]
    assert bare_names(wrapped, unwrap=True) == ["a.weight", "b"]
    assert bare_names(wrapped, ["a.weight"]) == bare_names(wrapped, ["a.weight", "b", "c"]) == ["a.weight", "b"]
    reserved = ["weight", "_orig_mod.weight"]
    assert bare_names(reserved) == bare_names([f"_orig_mod.{name}" for name in reserved]) == reserved
    assert bare_names(reserved[1:]) == ["weight"]
    assert bare_names(reserved[1:], reserved) == reserved[1:]
    assert bare_names(wrapped, ["module.b"]) == bare_names(wrapped, ["elsewhere"]) == ["module.a.weight", "module.b"]


class Child(torch.nn.Module):
    """A model with everything inside one child of this name."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        self.forward = getattr(self, name).forward


def _stepped(model, given=None):
    optimizer = RAdaBeliefW(model.parameters() if given is None else given)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("to", ["ddp", "fsdp", "zero2"])
def test_a_model_whose_only_child_is_called_module_comes_back_with_its_own_names(tmp_path, to):
    model = Child("module")
    optimizer = _stepped(model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    notes = convert(tmp_path / "run.pt", tmp_path / "to", to, 1)
    assert any("every name begins with 'module.', which is kept" in note for note in notes)
    found = read(tmp_path / "to")
    assert set(found.model) == set(model.state_dict())
    assert sorted(found.optimizer) == sorted(model.state_dict())
    # An Accelerate folder has the model's own names; there is nothing to report.
    plain = save_plainly(tmp_path / "plain", (model, optimizer, course.schedule_of(optimizer)))
    assert not convert(plain, tmp_path / "again", to, 1)
    assert set(read(tmp_path / "again").model) == set(model.state_dict())


def test_names_beside_a_file_prove_that_a_wrapper_added_module(tmp_path):
    """Named by the note, or by the names that torch puts into the optimizer's groups."""
    model = Child("net")
    wrapped = torch.nn.DataParallel(model)
    optimizer = _stepped(model, model.named_parameters())
    torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "named.pt")
    if all("param_names" in group for group in optimizer.param_groups):
        assert set(read(tmp_path / "named.pt").model) == set(model.state_dict())
    note_parameters(tmp_path, wrapped, optimizer)
    assert set(read(tmp_path / "named.pt").model) == set(model.state_dict())


def test_a_parameter_that_was_never_stepped_gets_the_state_of_before_its_first_step(tmp_path):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(2, 1)})
    optimizer = course.optimizer_of(model)
    model["used"](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = save_plainly(tmp_path / "plain", (model, optimizer, course.schedule_of(optimizer)))
    note_parameters(folder, model, optimizer)
    notes = convert(folder, tmp_path / "fsdp", "fsdp", 2)
    assert "unused.weight" in notes[0]
    state = read(tmp_path / "fsdp").optimizer["unused.weight"]
    assert state["step"] == 0
    assert not state["exp_avg"].any()


def test_fsdp2_finds_the_base_values_that_a_robust_schedule_keeps_in_the_groups(tmp_path, trained):
    folder = save_plainly(tmp_path / "plain", trained)
    saved = torch.load(folder / "optimizer.bin")
    for group in saved["param_groups"]:
        del group["initial_lr"], group["initial_weight_decay"]
    torch.save(saved, folder / "optimizer.bin")
    convert(folder, tmp_path / "fsdp", "fsdp", 2)
    found = [(group["initial_lr"], group["initial_weight_decay"]) for group in read(tmp_path / "fsdp").groups]
    assert found == [(course.LR, course.DECAY), (course.LR, 0.0)]


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
def test_the_flattened_optimizer_of_torchtitan_is_read(tmp_path, trained):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer, schedule = trained
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, flat = get_state_dict(model, optimizer, options=options)
    content = {**weights, "optimizer": flat, "lr_scheduler": schedule.state_dict(), "train_state": {"step": 2}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(content, checkpoint_id=tmp_path / "titan")
    save_plainly(tmp_path / "plain", trained)
    mine, theirs = read(tmp_path / "titan"), read(tmp_path / "plain")
    groups = [[sorted(group["params"]) for group in state.groups] for state in (mine, theirs)]
    assert groups[0] == groups[1]
    assert same(mine.model, theirs.model)
    assert same(mine.optimizer, theirs.optimizer)
    assert same(mine.schedule, theirs.schedule)


@pytest.fixture
def run_checkpoint(tmp_path, trained):
    """A checkpoint from our training loop, on two ranks."""
    store = CheckpointStore(tmp_path / "run")
    folder = save_plainly(store.begin(2), trained)
    note_parameters(folder, *trained[:2])
    for name in ("random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_0.pkl"):
        (folder / name).write_bytes(name.encode())
    metadata = {"recipe": {"seed": 3, "epochs": 4}, "engine": "ddp", "num_processes": 2, "loss_sums": [1.5, 2.0]}
    return store.commit(2, metadata).path


def test_a_runs_checkpoint_stays_one_with_its_recipe_and_all_that_lies_beside(tmp_path, run_checkpoint):
    notes = convert(run_checkpoint, tmp_path / "converted", "fsdp", 3)
    assert "2 ranks, not 3" in notes[-1]
    found = verify(tmp_path / "converted")
    assert found.step == 2
    assert found.metadata == {
        "recipe": {"seed": 3, "epochs": 4},
        "engine": "fsdp",
        "num_processes": 3,
        "loss_sums": [3.5, 0.0, 0.0],
    }
    for name in ("random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_0.pkl"):
        assert (tmp_path / "converted" / name).read_bytes() == name.encode()
    convert(run_checkpoint, tmp_path / "one", "ddp", 1)
    assert not (tmp_path / "one" / "random_states_1.pkl").exists()


def damage(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("file", ["pytorch_model.bin", "optimizer.bin", "scheduler.bin"])
@pytest.mark.parametrize("how", [damage, Path.unlink])
def test_a_torn_runs_checkpoint_is_an_error_that_names_the_file(tmp_path, run_checkpoint, file, how):
    how(run_checkpoint / file)
    with pytest.raises(CheckpointError, match=rf"{file}: missing, short or changed"):
        convert(run_checkpoint, tmp_path / "to", "fsdp", 2)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("accelerate ddp", "model.safetensors"),
        ("accelerate ddp", "optimizer.bin"),
        ("accelerate ddp", "scheduler.bin"),
        ("file", ""),
        ("FSDP2", ".metadata"),
        ("FSDP2", "__1_0.distcp"),
        ("accelerate fsdp1", "optimizer_0/.metadata"),
        ("accelerate fsdp1", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("accelerate fsdp2 full", "pytorch_model_fsdp.bin"),
    ],
)
def test_a_torn_file_without_a_manifest_is_an_error_that_names_it(written, tmp_path, source, file):
    copy = tmp_path / "copy"
    start = written / f"{source} at 6"
    shutil.copytree(start, copy) if start.is_dir() else shutil.copy(start, copy)
    damage(copy / file if file else copy)
    with pytest.raises(CheckpointError, match=rf"{Path(file or 'copy').name}: .*(torn|short)"):
        read(copy)


@pytest.mark.parametrize(
    ("source", "file"),
    [("FSDP2", ".metadata"), ("FSDP2", "__0_0.distcp"), ("accelerate fsdp2", "optimizer_0/.metadata")],
)
def test_a_missing_shard_is_an_error_that_names_it(written, tmp_path, source, file):
    shutil.copytree(written / f"{source} at 6", tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{Path(file).name}: (is )?missing"):
        read(tmp_path / "copy")


def test_no_checkpoint_and_no_folder_are_told_apart(tmp_path, run_checkpoint):
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint; looked for .*DeepSpeed.*\.metadata"):
        read(_folder(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"name one, such as .*step-00000002"):
        read(run_checkpoint.parent)
    (tmp_path / "words").write_text("hello")
    with pytest.raises(CheckpointError, match="words: torn, or not a file of tensors"):
        read(tmp_path / "words")
    torch.save({"weights": {}}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has the keys \['weights'\], and no state_dict under"):
        read(tmp_path / "other")


def _folder(path):
    path.mkdir()
    return path


def test_an_interrupted_save_is_refused(tmp_path, trained):
    folder = save_plainly(tmp_path / ".step-00000002.partial", trained)
    with pytest.raises(CheckpointError, match="not completely written"):
        read(folder)


def test_two_checkpoints_in_one_folder_are_refused(written, tmp_path, trained):
    shutil.copytree(written / "accelerate fsdp2 at 6", tmp_path / "both")
    save_plainly(tmp_path / "both", trained)
    with pytest.raises(CheckpointError, match=r"holds .*DDP.* and .*sharded.*; move one"):
        read(tmp_path / "both")
    folder = save_plainly(tmp_path / "models", trained, **{"model_1.safetensors": "another"})
    with pytest.raises(CheckpointError, match=r"model_1\.safetensors: a second model"):
        read(folder)


@pytest.mark.parametrize("state", ["exp_avg_var", "momentum_buffer"])
def test_another_optimizers_state_is_refused_with_its_keys(tmp_path, trained, state):
    model, optimizer, schedule = trained
    optimizer.state[model[0].weight][state] = optimizer.state[model[0].weight].pop("exp_avg_sq")
    folder = save_plainly(tmp_path / "foreign", (model, optimizer, schedule))
    with pytest.raises(CheckpointError, match=rf"has \['exp_avg', '{state}', 'step'\], expected .*another optimizer"):
        read(folder)


def test_files_of_two_runs_are_refused(tmp_path, trained):
    folder = save_plainly(tmp_path / "mixed", trained)
    names = named_groups(*trained[:2])
    (folder / "parameters.json").write_text(json.dumps({"groups": [names[0][::-1], names[1]]}))
    with pytest.raises(CheckpointError, match=r"2\.weight has shape \(4, 4\), but its state \(4, 3\)"):
        read(folder)
    (folder / "parameters.json").write_text(json.dumps({"groups": [["a", "b"], names[1]]}))
    with pytest.raises(CheckpointError, match=r"the optimizer has \['a', 'b'\], which are not in the model"):
        read(folder)
    (folder / "parameters.json").write_text(json.dumps({"groups": [names[0]]}))
    with pytest.raises(
        CheckpointError, match=r"its groups have \[2, 4\] parameters, but .*parameters.json names \[2\]"
    ):
        read(folder)
    (folder / "parameters.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"parameters.json: does not have the form"):
        read(folder)


def test_a_note_for_another_model_is_refused(tmp_path, trained):
    with pytest.raises(CheckpointError, match="not in the model"):
        note_parameters(tmp_path, torch.nn.Linear(3, 4), trained[1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"to": "zero4"}, "to='zero4' is not one of ddp, fsdp"),
        ({"world_size": 0}, "world_size=0 is below 1: it must be a whole number in range"),
        ({"full_state_dict": True}, "full_state_dict applies to FSDP only"),
        ({"dst": "."}, "already exists"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(tmp_path, run_checkpoint, how, message):
    words = {"dst": "new", "to": "ddp", "world_size": 2, "full_state_dict": False} | how
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(run_checkpoint, tmp_path / words.pop("dst"), **words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path, run_checkpoint):
    before = sorted(tmp_path.iterdir())
    with pytest.raises((OSError, RuntimeError, SafetensorError)), no_file_above(700):
        convert(run_checkpoint, tmp_path / "new", "ddp", 2)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_converts_and_says_where_it_cannot(tmp_path, run_checkpoint, capsys):
    words = ["convert", str(run_checkpoint), str(tmp_path / "out"), "--to", "fsdp", "--world-size", "2"]
    assert main(words) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*words[:-3], "deepspeed", *words[-2:]]) == 2
    assert "engine 'deepspeed' is none of ddp, fsdp, zero0" in capsys.readouterr().err


def test_the_command_unwraps_a_file_of_ddps(tmp_path, trained, capsys):
    model, optimizer, _ = trained
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": wrapped, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    words = ["convert", str(tmp_path / "run.pt"), str(tmp_path / "kept"), "--to", "ddp", "--world-size", "2"]
    assert main(words) == 0
    assert "convert with --unwrap" in capsys.readouterr().out
    assert set(read(tmp_path / "kept").model) == set(wrapped)
    words[2] = str(tmp_path / "bare")
    assert main([*words, "--unwrap"]) == 0
    assert "--unwrap" not in capsys.readouterr().out
    assert set(read(tmp_path / "bare").model) == set(model.state_dict())


def test_a_run_with_masters_is_refused_by_its_name(tmp_path):
    model = torch.nn.Linear(2, 1).bfloat16()
    optimizer = RAdaBeliefW(model.parameters(), master_weights=True)
    model(torch.ones(2).bfloat16()).sum().backward()
    optimizer.step()
    file = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    with pytest.raises(CheckpointError, match="master_weights=True cannot be converted"):
        read(file)


class WithExtra(torch.nn.Linear):
    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    "extra", [{"scale": 1.5, "history": [1, 2]}, torch.arange(5), None], ids=["dict", "tensor", "None"]
)
def test_extra_state_of_modules_goes_through_every_engines_files(tmp_path, extra, capsys):
    from safetensors.torch import load_file

    model = torch.nn.Sequential(WithExtra(3, 4), torch.nn.Linear(4, 2))
    model[0].extra = extra
    model(torch.ones(2, 3)).sum().backward()
    optimizer = RAdaBeliefW(model.parameters())
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    assert convert(tmp_path / "run.pt", tmp_path / "zero", "zero2", 2) == []
    assert same(read(tmp_path / "zero").extra["objects"], {"0._extra_state": extra})
    module = torch.load(tmp_path / "zero" / "pytorch_model" / "mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    assert module.keys() == model.state_dict().keys()
    model[0].extra = "another"
    model.load_state_dict(module)
    assert same(model[0].extra, extra)
    assert main(["inspect", str(tmp_path / "zero")]) == 0
    assert "extra state:  0._extra_state" in capsys.readouterr().out
    source = tmp_path / "zero"
    for number, (engine, full) in enumerate([("fsdp", False), ("ddp", False), ("fsdp", True), ("ddp", False)]):
        folder = tmp_path / f"{number}"
        assert convert(source, folder, engine, 2, full_state_dict=full) == []
        state = read(folder)
        assert same(state.extra["objects"], {"0._extra_state": extra})
        assert state.entries().keys() == model.state_dict().keys()
        source = folder
    file = "model.safetensors" if isinstance(extra, torch.Tensor) else "pytorch_model.bin"
    saved = load_file(source / file) if file == "model.safetensors" else torch.load(source / file)
    model[0].extra = "another"
    model.load_state_dict(saved)
    assert same(model[0].extra, extra)
    assert (source / "model.safetensors").exists() == isinstance(extra, torch.Tensor)
