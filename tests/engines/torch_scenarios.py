"""What every torch engine is held to, as scenarios of one launch; `plan(world, folder)` lists a launch's."""

import contextlib
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from robust_dist.engines import fsdp
from robust_dist.optim import param_groups
from robust_dist.optim.groups import clean_name
from robust_dist.schedule import RankDisagreementError
from tests.engines import course, odd_moments
from tests.engines.torch_engines import Run, same_bits

ORDERS = ("optimizer first", "schedule first")
PLAIN = ("one process", "DDP")
# Engines of each world; a launch of one rank stands for the engines that make no sense there, too.
AT_ALL_WORLDS = (
    "DDP",
    "FSDP1",
    "FSDP1, use_orig_params=False",
    "FSDP1, SHARD_GRAD_OP",
    "FSDP2",
    "FSDP2, bf16",
    "FSDP2, bf16 mixed precision",
)
AT = {
    1: ("one process", *AT_ALL_WORLDS),
    2: AT_ALL_WORLDS,
    3: AT_ALL_WORLDS,
    4: (*AT_ALL_WORLDS, "HSDP", "FSDP1, HYBRID_SHARD", "FSDP2 + tensor parallel"),
}
# (engine that wrote, ranks that wrote, engine that reads, ranks that read)
RESHARDED = (
    ("FSDP1", 2, "FSDP1", 1),
    ("FSDP1", 2, "FSDP1", 3),
    ("FSDP1", 4, "FSDP1", 2),
    ("FSDP1, use_orig_params=False", 2, "FSDP1, use_orig_params=False", 1),
    ("FSDP1, use_orig_params=False", 2, "FSDP1, use_orig_params=False", 3),
    ("FSDP1, use_orig_params=False", 4, "FSDP1, use_orig_params=False", 2),
    ("FSDP1, SHARD_GRAD_OP", 2, "FSDP1, SHARD_GRAD_OP", 3),
    ("FSDP1, SHARD_GRAD_OP", 4, "FSDP1, SHARD_GRAD_OP", 2),
    ("FSDP2", 2, "FSDP2", 1),
    ("FSDP2", 2, "FSDP2", 3),
    ("FSDP2", 4, "FSDP2", 2),
    ("FSDP2", 2, "one process", 1),
    ("FSDP2", 2, "FSDP1", 3),
    ("FSDP2, bf16", 2, "FSDP2, bf16", 3),
    ("FSDP2, bf16", 4, "FSDP2, bf16", 2),
    ("HSDP", 4, "FSDP2", 2),
    ("FSDP2", 2, "HSDP", 4),
    ("FSDP2 + tensor parallel", 4, "FSDP2", 2),
    ("FSDP2", 2, "FSDP2 + tensor parallel", 4),
)

undisturbed, notes, ended = {}, {}, {}


def _path(folder, engine, world, step):
    return Path(folder, f"{engine} on {world} at {step}")


def save(run, path, plainly):
    """Before the switch as a user would, by torch.save of the state_dicts or by DCP; after it by our own function."""
    if path.name.endswith(str(course.SAVED[1])):
        fsdp.save(path, run.model, run.optimizer, run.schedule)
    elif not plainly:
        dcp.save(state_of(run), checkpoint_id=path)
    else:
        if dist.get_rank() == 0:
            torch.save({k: getattr(run, k).state_dict() for k in ("model", "optimizer", "schedule")}, path)
        dist.barrier()


def state_of(run):
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer, "schedule": run.schedule.state_dict()}


def _load_file(run, path):
    state = torch.load(path, weights_only=True)

    def parameters():
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])

    return parameters, state["schedule"]


def _load_dcp(run, path):
    state = state_of(run)
    # torch's own planner drops what has no shard on this rank, and then looks for names of before torch 2.4.
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(flatten_sharded_tensors=False))

    def parameters():
        set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    return parameters, state["schedule"]


def load(run, path, order=ORDERS[0], only_optimizer=False):
    if (path / "manifest.json").exists():
        fsdp.load(path, run.model, run.optimizer, run.schedule)
        return
    load_parameters, schedule = (_load_file if path.is_file() else _load_dcp)(run, path)
    if only_optimizer:
        load_parameters()
    elif order == ORDERS[0]:
        load_parameters()
        run.schedule.load_state_dict(schedule)
    else:
        run.schedule.load_state_dict(schedule)
        load_parameters()


def assert_state_is_placed(run):
    """Float32 moments, sharded as their parameter is; the step counts every update."""
    for name, (param, state) in run.states().items():
        assert state["step"].item() == course.TOTAL, name
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key]
            assert moment.dtype == torch.float32
            assert moment.shape == param.shape
            assert isinstance(moment, DTensor) == isinstance(param, DTensor)
            if isinstance(param, DTensor):
                assert moment.placements == param.placements
                assert moment.device_mesh == param.device_mesh
                assert moment.to_local().shape == param.to_local().shape


def _collectives():
    return dist.group.WORLD._get_sequence_number_for_group()


@contextlib.contextmanager
def comparisons(run):
    """Counts the collectives that the optimizer's and the schedule's steps run on the default group."""
    seen, steps = [], {run.optimizer: run.optimizer.step, run.schedule: run.schedule.step}

    def counted(step):
        before = _collectives()
        step()
        seen.extend(range(before, _collectives()))

    for stepped, step in steps.items():
        stepped.step = functools.partial(counted, step)
    try:
        yield seen
    finally:
        for stepped, step in steps.items():
            stepped.step = step


def _note(run, first, seen):
    return first, list(run.used), len(seen), run.schedule.weight_decay_switch.switch_step


def trajectory(engine):
    run = Run(engine)
    with comparisons(run) as seen:
        undisturbed[engine] = run.watched()
    notes[engine] = [_note(run, 0, seen)]
    assert_state_is_placed(run)
    if isinstance(next(run.model.parameters()), DTensor) and dist.get_world_size() > 2:
        sizes = torch.tensor([p.to_local().numel() for p in run.model.parameters()])
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
        assert (sizes == 0).any(), "no rank had an empty shard"


def _finish(run, engine, first):
    """Go on from `first` to the end, noting what the steps used and what the switch asked."""
    run.used.clear()
    with comparisons(run) as seen:
        end = run.go(first)
    notes[engine].append(_note(run, first, seen))
    assert same_bits(end, undisturbed[engine]), f"from step {first} on it is another run"


def resume(engine, folder):
    """Saved before and after the switch, loaded in both orders: on with the bits of the run that was never stopped."""
    paths = [_path(folder, engine, dist.get_world_size(), step) for step in course.SAVED]
    run = Run(engine)
    for first, last, path in zip((0, *course.SAVED), course.SAVED, paths, strict=False):
        run.go(first, last)
        save(run, path, engine in PLAIN)
    assert same_bits(run.go(course.SAVED[-1]), undisturbed[engine]), "saving disturbs the run"
    # `run` is past the switch: from the first file its decay must come back, from the second it must not.
    for made, order in ((lambda: Run(engine), ORDERS[0]), (lambda: run, ORDERS[1])):
        for step, path in zip(course.SAVED, paths, strict=True):
            fresh = made()
            load(fresh, path, order)
            fresh.assert_settings(step)
            _finish(fresh, engine, step)
    ended[engine] = run


def switch(engine):
    """Each step uses the decay and the rate of its number, on every rank alike, without a collective."""
    whole = notes[engine][0][1]
    assert [step[0][0] for step in whole] == [course.wanted(s)[0][0] for s in range(course.TOTAL)]
    assert all(decay == 0.0 for step in whole for decay, _ in step[1:])
    for first, used, asked, switch_step in notes[engine]:
        assert asked == 0
        assert used == whole[first:]
        assert switch_step == course.SWITCH
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, notes[engine])
    assert all(one == everyone[0] for one in everyone)


def _names(model, groups):
    names = {id(p): clean_name(n, model) for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def groups(engine, folder):
    """Weights decay, biases and the norm do not: by name, before and after wrapping, and after loads (traps 10, 11)."""
    bare = course.Net()
    wanted = _names(bare, course.groups_of(bare))
    assert wanted[0] == ["up.weight", "down.weight", "gate.weight"]
    run = Run(engine)
    if run.engine.one_group:
        _assert_flat_parameters_cannot_be_split(run.model)
    else:
        assert _names(run.model, run.optimizer.param_groups) == wanted
    # At its end the schedule is past the switch: an optimizer's file from before it must not bring the decay back.
    run, path = ended[engine], _path(folder, engine, dist.get_world_size(), course.SAVED[0])
    load(run, path, only_optimizer=True)
    run.assert_settings(course.TOTAL)
    load(run, path)
    run.assert_settings(course.SAVED[0])


def _assert_flat_parameters_cannot_be_split(model):
    with pytest.raises(ValueError, match="use_orig_params=True"):
        param_groups(model, course.DECAY)


def a_split_by_ndim_is_wrong(engine):
    """Under FSDP1 every parameter is flat: by dimensions the weights would lose their decay; by name they keep it."""
    run = Run(engine)
    assert all(p.ndim == 1 for p in run.model.parameters())
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [3, 5]


def write(engine, folder):
    """What another number of ranks will read."""
    run = Run(engine)
    run.go(0, course.SAVED[0])
    save(run, _path(folder, engine, dist.get_world_size(), course.SAVED[0]), False)


def other_world_size(engine, writers, reader, folder):
    """What `writers` ranks wrote goes on here, on the track of one process."""
    run, step = Run(reader), course.SAVED[engine != reader]
    load(run, _path(folder, engine, writers, step))
    run.assert_settings(step)
    run.go(step)
    run.assert_ends_on_track()


def _zero(moment):
    for local in [s.tensor for s in moment.local_shards()] if hasattr(moment, "local_shards") else [moment]:
        local.zero_()


def state_before_the_first_step(engine):
    """Trap 12: torch fills an empty state with a step of its own at lr = 0."""
    run = Run(engine)
    before = run.whole()
    saved = get_optimizer_state_dict(run.model, run.optimizer)
    assert same_bits(run.whole(), before)
    run.assert_settings(0)
    for state in saved["state"].values():
        state["step"] = torch.zeros(())
        _zero(state["exp_avg"])
        _zero(state["exp_avg_sq"])
    fresh = Run(engine)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, saved)
    assert {state["step"].item() for _, state in fresh.states().values()} == {0.0}
    assert same_bits(fresh.go(0), undisturbed[engine])


def asynchronous_save(engine, folder):
    """A checkpoint that is written while training goes on is that of the step at which it was asked for."""
    path = _path(folder, f"{engine}, asynchronous", dist.get_world_size(), 3)
    run = Run(engine)
    run.go(0, 3)
    # On the training's own group, the writer's collectives would run into those of the training.
    writing = dcp.async_save(state_of(run), checkpoint_id=path, process_group=dist.new_group(backend="gloo"))
    run.go(3)
    writing.result()
    fresh = Run(engine)
    load(fresh, path)
    assert same_bits(fresh.go(3), undisturbed[engine])


def _other_on_rank_1(engine, how):
    """A run that differs on rank 1 alone."""
    odd = dist.get_rank() == 1
    run = Run(engine, course.TOTAL + (how == "total_steps" and odd))
    if "group" in how and odd:
        run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    if how == "num_groups":
        run.schedule = course.schedule_of(run.optimizer)
    if how == "step" and odd:
        state = run.schedule.state_dict()
        switched = {**state["weight_decay_switch"], "step": 3}
        run.schedule.load_state_dict({**state, "last_epoch": 3, "weight_decay_switch": switched})
    return run


def ranks_disagree(engine, how):
    """Another total, other groups, another step: the same error on every rank after a few steps."""
    run = _other_on_rank_1(engine, how)

    def steps():
        for step in range(4):
            run.train_part(*course.part(step, 0, *run.engine.data()), True)
            run.finish_step()

    with pytest.raises(RankDisagreementError, match=f"{'num_groups' if 'group' in how else how}: rank 0: ") as raised:
        steps()
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(raised.value))
    assert messages == [messages[0]] * len(messages)


def _extras(world, folder):
    found = {}
    if world == 2:
        for engine in ("FSDP1", "FSDP2"):
            found[f"step 0 {engine}"] = functools.partial(state_before_the_first_step, engine)
            for how in ("total_steps", "num_groups", "step"):
                found[f"{how} {engine}"] = functools.partial(ranks_disagree, engine, how)
        # torch cannot stage FSDP1's ShardedTensors; robust_dist.engines.fsdp.save can.
        found["asynchronous FSDP2"] = functools.partial(asynchronous_save, "FSDP2", folder)
        found["ndim"] = functools.partial(a_split_by_ndim_is_wrong, "FSDP1")
        found["groups of a part"] = functools.partial(odd_moments.groups_of_a_part, "FSDP2")
        for engine in ("FSDP1", "FSDP2"):
            found[f"late group {engine}"] = functools.partial(ranks_disagree, engine, "late group")
    return found


FROZEN = {"one process": 1, "FSDP1": 2, "FSDP1, use_orig_params=False": 2, "FSDP2": 2}


def _odd_moments(engine, folder):
    found = {
        f"{engine}/after an evaluation": lambda: odd_moments.after_an_evaluation(engine, folder, undisturbed),
        f"{engine}/a parameter without a gradient": lambda: odd_moments.without_a_gradient(engine, folder),
    }
    if FROZEN.get(engine) == dist.get_world_size():
        found[f"{engine}/frozen at load"] = lambda: odd_moments.frozen_at_load(engine, folder)
        found[f"{engine}/with gradients"] = lambda: odd_moments.with_gradients(engine, folder, undisturbed)
    return found


def resumed(world):
    if world == 1:
        return ("one process",)
    if world == 2:
        return tuple(engine for engine in AT[2] if engine != "FSDP2, bf16 mixed precision")
    return ("HSDP", "FSDP2 + tensor parallel") if world == 4 else ()


def plan(world, folder):
    """Every scenario of the launch with `world` ranks: name -> function."""
    found = {f"{engine}/trajectory": functools.partial(trajectory, engine) for engine in AT[world]}
    for engine in resumed(world):
        found[f"{engine}/resume"] = functools.partial(resume, engine, folder)
        found[f"{engine}/switch"] = functools.partial(switch, engine)
        found[f"{engine}/groups"] = functools.partial(groups, engine, folder)
        found |= _odd_moments(engine, folder)
    writing = {engine for engine, writers, _, _ in RESHARDED if writers == world} - {*resumed(world)}
    for engine in sorted(writing):
        found[f"write {engine}"] = functools.partial(write, engine, folder)
    return found | resharding(world, folder) | _extras(world, folder)


def resharding_name(engine, writers, reader, readers):
    return f"{engine} {writers} to {reader} {readers}"


def resharding(world, folder, written_by=(1, 2)):
    """The scenarios that read other launches' files."""
    return {
        resharding_name(engine, writers, reader, world): functools.partial(
            other_world_size, engine, writers, reader, folder
        )
        for engine, writers, reader, readers in RESHARDED
        if readers == world and writers in written_by
    }
