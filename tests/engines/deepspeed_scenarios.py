"""What each kind of DeepSpeed engine must hold, run inside a launch of some ranks."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.engines.deepspeed.schedule import DeepSpeedRobustSchedule
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RankDisagreementError, RobustSchedule, base_optimizer
from tests.engines import course
from tests.engines import deepspeed_course as ds
from tests.engines.course import DECAY, LR, TOTAL
from tests.engines.odd_moments import SpareNet

OFFLOAD = {"offload_optimizer": ds.CPU}
ENGINES = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
    "ZeRO 0, bf16": {"stage": 0, "bf16": True},
    "ZeRO 1, bf16": {"stage": 1, "bf16": True},
    "ZeRO 1, bf16, gradients in fp32": {"stage": 1, "bf16": True, "data_types": {"grad_accum_dtype": "fp32"}},
    "ZeRO 2, bf16": {"stage": 2, "bf16": True},
    "ZeRO 3, bf16": {"stage": 3, "bf16": True},
    "ZeRO 2, offload": {"stage": 2, "zero": OFFLOAD},
    "ZeRO 3, offload": {"stage": 3, "zero": OFFLOAD},
    "ZeRO 3, parameter offload": {"stage": 3, "zero": {**OFFLOAD, "offload_param": ds.CPU}},
}
# Each rank rounds its part of a gradient to 8 bits before the sum: 2.6e-4 was seen. One decay too many: 7.8e-3.
BF16_TOLERANCE = 4e-4
FP16_TOLERANCE = BF16_TOLERANCE / 8


@functools.cache
def masters_track(low_dtype):
    return ds.track_alone(course.optimizer_of, low_dtype)


def hold(engine, first=0, last=TOTAL):
    """Train, held to one process of the same precision; returns the whole parameters."""
    if engine.bfloat16_enabled():
        return ds.hold(engine, masters_track(torch.bfloat16), first, last, BF16_TOLERANCE)
    return ds.follow(engine, first, last)


def named(kind, **more):
    return ds.from_json(ds.named_config(**ENGINES[kind], **more))


def client(kind, optimizer_of=course.optimizer_of, model=None):
    return ds.from_client(ds.config(**ENGINES[kind], zero_force_ds_cpu_optimizer=False), optimizer_of, model)


def steps_of(engine):
    return {float(state["step"]) for state in base_optimizer(engine.optimizer).state.values()}


def trajectory(kind, folder=None):
    """By name from the JSON; leaves checkpoints of steps 2 and 6 where there is a folder."""
    engine = named(kind)
    base = base_optimizer(engine.optimizer)
    assert type(base) is RAdaBeliefW
    assert isinstance(engine.lr_scheduler, RobustSchedule)
    assert engine.lr_scheduler.optimizer is base
    assert steps_of(engine) <= {0.0}
    for first, last in ((0, 2), (2, 6), (6, TOTAL)):
        end = hold(engine, first, last)
        if folder and last < TOTAL:
            engine.save_checkpoint(f"{folder}/{kind}", tag=f"step{last}")
    assert steps_of(engine) == {float(TOTAL)}
    assert engine.lr_scheduler.last_epoch == TOTAL
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in base.state.values())
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in base.state.values())
    return end


def resume(kind, folder, end):
    """Into a fresh engine, and into one that is elsewhere: the rest of the run, bit for bit."""
    fresh = client(kind)
    fresh.load_checkpoint(f"{folder}/{kind}", tag="step2")
    ds.assert_same_bits(hold(fresh, 2), end)
    elsewhere = named(kind)
    hold(elsewhere, 0, 2)
    elsewhere.load_checkpoint(f"{folder}/{kind}", tag="step6")
    ds.assert_same_bits(hold(elsewhere, 6), end)


def switch(kind, folder, end):
    """An engine that is past the switch goes back before it, after it, and before it again."""
    engine = named(kind)
    for tag, step in (("step6", 6), ("step2", 2), ("step6", 6), ("step2", 2)):
        engine.load_checkpoint(f"{folder}/{kind}", tag=tag)
        ds.assert_same_bits(hold(engine, step), end)


def odd_moment(kind, folder):
    """After an evaluation, with a parameter that never had a gradient, and with gradients of a part of a step."""
    net, path = SpareNet(torch.float32), f"{folder}/{kind}"
    engine = client(kind, model=net)
    steps(engine, 0, 3)
    evaluate(engine)
    part(engine, 3, 0)
    engine.save_checkpoint(path, tag="odd")
    part(engine, 3, 1)
    net.asked = True
    end = steps(engine, 4, 6)
    other = SpareNet(torch.float32)
    fresh = client(kind, model=other)
    evaluate(fresh)
    fresh.load_checkpoint(path, tag="odd")
    steps(fresh, 3, 4)
    other.asked = True
    ds.assert_same_bits(steps(fresh, 4, 6), end)


def part(engine, step, index):
    ds.train_part(engine)(*course.part(step, index, dist.get_rank(), dist.get_world_size()), index == 1)


def steps(engine, first, last):
    for step in range(first, last):
        for index in range(course.ACCUMULATION):
            part(engine, step, index)
    return ds.whole(engine)


def evaluate(engine):
    engine.eval()
    with torch.no_grad():
        engine(course.part(0, 0)[0].to(engine.device, ds.dtype_of(engine)))
    engine.train()


def with_an_empty_group(model):
    first, second = course.groups_of(model)
    return RAdaBeliefW([first, {"params": []}, second], lr=LR)


def groups(kind, folder):
    """Each group keeps its own settings through a save and a load; DeepSpeed's dropping of an empty one harms none."""
    engine = client(kind, with_an_empty_group)
    hold(engine, 0, 3)
    engine.save_checkpoint(f"{folder}/{kind}", tag="dropped")
    assert len(base_optimizer(engine.optimizer).param_groups) == 2
    other = named(kind)
    other.load_checkpoint(f"{folder}/{kind}", tag="dropped")
    hold(other, 3, 6)
    engine = client(kind, ds.unequal_optimizer)
    engine.save_checkpoint(f"{folder}/{kind}", tag="unequal")
    other = client(kind, ds.unequal_optimizer)
    other.load_checkpoint(f"{folder}/{kind}", tag="unequal")
    assert_unequal(other)


def assert_unequal(engine):
    groups = base_optimizer(engine.optimizer).param_groups
    settings = ("betas", "eps", "accumulate_eps", "weight_decay")
    found = [tuple(group[name] for name in settings) for group in groups]
    assert [one[:3] for one in found] == [((0.9, 0.999), 1e-8, True), ((0.8, 0.99), 1e-6, False)]
    assert [group["initial_weight_decay"] for group in groups] == [DECAY, 0.0]


def dry_step_leaves_no_trace():
    """DeepSpeed steps once at the start of ZeRO 0 in bfloat16; another optimizer still sees that step."""
    engine = named("ZeRO 0, bf16")
    assert not base_optimizer(engine.optimizer).state
    start = {name: p.float() for name, p in course.Net(torch.bfloat16).named_parameters()}
    ds.assert_same_bits(ds.whole(engine), start)
    adamw = ds.from_client(ds.config(0, bf16=True), lambda model: torch.optim.AdamW(course.groups_of(model), lr=LR))
    assert steps_of(adamw) == {1.0}


def split_by_names_survives_zero_init():
    """Under zero.Init every parameter is flat and empty; a JSON may still be full of "auto" then."""
    import deepspeed

    auto = {"lr": "auto", "weight_decay": "auto"}
    json = ds.config(3, optimizer={"type": "RAdaBeliefW", "params": auto})
    with deepspeed.zero.Init(config_dict_or_path=json):
        model = course.Net()
    assert {p.ndim for p in model.parameters()} == {1}
    hold(ds.from_json(ds.named_config(3), model))


def schedule_is_no_clock_of_step_calls():
    """ZeRO steps the optimizer once per group or sub-group, with the groups cut down; the schedule counts none."""
    calls = {1: 2, 3: 3}
    for stage, per_step in calls.items():
        engine, counted = named(f"ZeRO {stage}"), []
        base = base_optimizer(engine.optimizer)
        base.register_step_pre_hook(lambda optimizer, args, kwargs, to=counted: to.append(1))
        hold(engine)
        assert len(counted) >= per_step * TOTAL, (stage, len(counted))
        assert engine.lr_scheduler.last_epoch == TOTAL


def schedule_unwraps_what_deepspeed_hands_it():
    engine = named("ZeRO 2")
    assert not isinstance(engine.optimizer, torch.optim.Optimizer)
    assert engine.lr_scheduler.optimizer is engine.optimizer.optimizer


def schedule_errors_are_not_swallowed():
    """DeepSpeed catches a TypeError of a schedule's step() and steps again with another argument."""
    engine = named("ZeRO 1")
    for _ in range(course.ACCUMULATION - 1):
        engine.backward(engine(torch.ones(6, 6)).sum())
        engine.step()
    engine.backward(engine(torch.ones(6, 6)).sum())
    with pytest.raises(ValueError, match="epoch='nine'"):
        engine.step(lr_kwargs={"epoch": "nine"})


def a_rank_that_misses_a_step_is_named():
    """One rank leaves out a step of its schedule under ZeRO 2; what the schedule asks is no collective."""
    import deepspeed

    model, last = course.Net(), dist.get_world_size() - 1
    optimizer = course.optimizer_of(model)
    schedule = course.schedule_of(optimizer)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds.config(2))[0]
    switch, asked = schedule.weight_decay_switch, []

    def counted(call):
        before = dist.group.WORLD._get_sequence_number_for_group()
        try:
            call()
        finally:
            asked.append(dist.group.WORLD._get_sequence_number_for_group() - before)

    switch._before_step = functools.partial(counted, switch._before_step)

    def steps():
        for step in range(TOTAL):
            for index in range(course.ACCUMULATION):
                ds.train_part(engine)(*course.part(step, index), index == course.ACCUMULATION - 1)
            if not (step == 1 and dist.get_rank() == last):
                counted(schedule.step)

    with pytest.raises(RankDisagreementError, match=f"step: rank.*; rank {last}: "):
        steps()
    assert set(asked) == {0}
    assert len(asked) < 3 * TOTAL


def overflows_are_no_steps():
    """The loss scale overflows at first, on a GPU: skipped steps change nothing, the others are the course's."""
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 1}
    engine = ds.from_json(ds.named_config(2, fp16=fp16))
    track, part = masters_track(torch.float16), ds.train_part(engine)
    done = skipped = 0
    while done < TOTAL:
        course.assert_settings(base_optimizer(engine.optimizer).param_groups, done)
        before = ds.whole(engine)
        for index in range(course.ACCUMULATION):
            part(*course.part(done, index), index == course.ACCUMULATION - 1)
        if engine.skipped_steps > skipped:
            skipped = engine.skipped_steps
            ds.assert_same_bits(ds.whole(engine), before)
        else:
            done += 1
            found = {name: value.cpu() for name, value in ds.whole(engine).items()}
            assert ds.distance(found, track[done]) <= FP16_TOLERANCE
        assert engine.lr_scheduler.last_epoch == done
        assert steps_of(engine) <= {float(done)}
    assert skipped > 0
    assert steps_of(engine) == {float(TOTAL)}


def load_without_the_schedule_keeps_the_engines_step(folder):
    engine = named("ZeRO 2")
    engine.load_checkpoint(f"{folder}/ZeRO 2", tag="step6", load_lr_scheduler_states=False)
    course.assert_settings(base_optimizer(engine.optimizer).param_groups, 0)


def deepspeeds_warmup_is_taken_over():
    from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

    for kind in ("log", "linear"):
        for warmup in (1, 2, 5, 20):
            shared = {"warmup_num_steps": warmup, "warmup_type": kind}
            cosine = {**shared, "total_num_steps": 20, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.01}
            compare(WarmupCosineLR, cosine, 23)
            # Their decays are a line and none; the warm-up, with its start and its peak, is the same.
            rates = {**shared, "warmup_min_lr": 0.02, "warmup_max_lr": 0.3}
            compare(WarmupDecayLR, {**rates, "total_num_steps": 20}, max(2, warmup) + 1)
            compare(WarmupLR, rates, max(2, warmup) + 1, {"total_num_steps": 20})


def compare(theirs, params, steps, added=None):
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2)]
    schedules = [theirs(optimizers[0], **params), DeepSpeedRobustSchedule(optimizers[1], **params, **(added or {}))]
    for step in range(steps):
        a, b = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        assert abs(a - b) < 1e-15, (theirs.__name__, params, step, a, b)
        for schedule in schedules:
            schedule.step()


def offload_refuses_a_client_unless_told():
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    for kind in ("ZeRO 2, offload", "ZeRO 3, offload"):
        with pytest.raises(ZeRORuntimeException, match='"zero_force_ds_cpu_optimizer": false'):
            ds.from_client(ds.config(**ENGINES[kind]))


UNIVERSAL_STAGES = (1, 2, 3)


def unequal(stage, model=None, **more):
    return ds.from_client(ds.config(stage, **more), ds.unequal_optimizer, model)


def save_for_another_world(folder):
    """Checkpoints of steps 2 and 6 of a run with unequal groups, and their universal form."""
    track = ds.track_alone(ds.unequal_optimizer)
    for stage in (0, *UNIVERSAL_STAGES):
        engine = unequal(stage)
        for first, last in ((0, 2), (2, 6)):
            ds.hold(engine, track, first, last)
            engine.save_checkpoint(f"{folder}/{stage}", tag=f"step{last}")
        if stage and dist.get_rank() == 0:
            for tag in ("step2", "step6"):
                ds.make_universal(f"{folder}/{stage}/{tag}", f"{folder}/{stage}/{tag}u", stage)
        dist.barrier()


def load_from_another_world(stage, folder):
    """The rest of one process's run, from before the switch and from after it, fresh and elsewhere."""
    track = ds.track_alone(ds.unequal_optimizer)
    more = {"checkpoint": {"load_universal": True}} if stage else {}
    suffix = "u" if stage else ""
    engine = unequal(stage, **more)
    for step in (2, 6, 2):
        engine.load_checkpoint(f"{folder}/{stage}", tag=f"step{step}{suffix}")
        assert_unequal(engine)
        owners = [state["step"].data_ptr() for state in base_optimizer(engine.optimizer).state.values()]
        assert len(set(owners)) == len(owners)
        ds.hold(engine, track, step)
        assert steps_of(engine) == {float(TOTAL)}


def deepspeeds_universal_fault_is_still_there(folder):
    """Without our patch, ZeRO-3 gives both groups the first one's settings and both parameters one step tensor."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    name = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
    mended = getattr(Stage3, name)
    setattr(Stage3, name, mended.__wrapped__)
    try:
        engine = unequal(3, checkpoint={"load_universal": True})
        engine.load_checkpoint(f"{folder}/3", tag="step2u")
    finally:
        setattr(Stage3, name, mended)
    base = base_optimizer(engine.optimizer)
    assert [group["betas"] for group in base.param_groups] == [(0.9, 0.999)] * 2
    assert len({id(state["step"]) for state in base.state.values()}) == 1
