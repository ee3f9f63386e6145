"""The course under DeepSpeed: engines, how they train, and whole parameters by name."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import base_optimizer
from tests.engines import course
from tests.engines.course import ACCUMULATION, BATCH, CLIP, DECAY, LR, OFF_AT, TOTAL

OPTIMIZER = {"type": "RAdaBeliefW", "params": {"lr": LR, "weight_decay": DECAY}}
SCHEDULER = {"type": "RobustSchedule", "params": {"total_num_steps": TOTAL, "weight_decay_off_at": OFF_AT}}
CPU = {"device": "cpu"}


def config(stage, zero=None, bf16=False, **more):
    """A DeepSpeed JSON of the course, without optimizer and schedule."""
    return {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        # Small sub-groups, so that ZeRO-3 steps a group in several calls.
        "zero_optimization": {"stage": stage, "sub_group_size": 40, **(zero or {})},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    } | more


def named_config(stage, **more):
    return config(stage, optimizer=OPTIMIZER, scheduler=SCHEDULER, **more)


def from_json(json, model=None, groups=None):
    import deepspeed

    model = model or course.Net()
    return deepspeed.initialize(model=model, model_parameters=groups or course.groups_of(model), config=json)[0]


def from_client(json, optimizer_of=course.optimizer_of, model=None):
    import deepspeed

    model = model or course.Net()
    optimizer = optimizer_of(model)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=course.schedule_of(optimizer), config=json
    )[0]


def whole(engine):
    """Every parameter in float32, gathered, by name: the masters' where the engine computes in bfloat16."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() > 0:
        return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in engine.module.named_parameters()}
    masters = {}
    if engine.bfloat16_enabled():
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        masters = {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}
    return {name: masters.get(p, p).detach().float().clone() for name, p in engine.module.named_parameters()}


def dtype_of(engine):
    if engine.fp16_enabled():
        return torch.float16
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float32


def train_part(engine):
    dtype, device = dtype_of(engine), engine.device

    def part(images, labels, is_last):
        engine.backward(course.loss_of(engine(images.to(device, dtype)), labels.to(device)))
        engine.step()

    return part


def follow(engine, first=0, last=TOTAL, tolerance=course.TOLERANCE):
    """Train over steps [first, last), held to one process's track; returns the whole parameters."""
    return course.drive(
        train_part(engine),
        lambda: None,
        lambda: base_optimizer(engine.optimizer).param_groups,
        lambda: whole(engine),
        first=first,
        last=last,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tolerance=tolerance,
    )


def run(engine, first=0, last=TOTAL):
    """Train over steps [first, last) with the step's settings; the parameters before each step and after the last."""
    part, track = train_part(engine), [whole(engine)]
    for step in range(first, last):
        course.assert_settings(base_optimizer(engine.optimizer).param_groups, step)
        for index in range(ACCUMULATION):
            part(*course.part(step, index, dist.get_rank(), dist.get_world_size()), index == ACCUMULATION - 1)
        track.append(whole(engine))
    return track


def hold(engine, wanted, first=0, last=TOTAL, tolerance=course.TOLERANCE):
    """Train over steps [first, last), held to the parameters that one process has before and after each step."""
    track = run(engine, first, last)
    errors = [distance(found, wanted[first + step]) for step, found in enumerate(track)]
    assert max(errors) <= tolerance, f"from step {first} on the parameters are off by {errors}"
    return track[-1]


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def unequal_optimizer(model):
    """Two groups that differ in every setting that a load could mix up."""
    first, second = course.groups_of(model)
    return RAdaBeliefW([first, {**second, "betas": (0.8, 0.99), "eps": 1e-6, "accumulate_eps": False}], lr=LR)


def track_alone(optimizer_of, low_dtype=None):
    """One process's run of the course without an engine: parameters before each step and after the last.

    With `low_dtype` the model computes in it from float32 parameters, as DeepSpeed's wrappers do.
    """
    model = course.Net(low_dtype or torch.float32).float()
    low = course.Net(low_dtype) if low_dtype else model
    optimizer = optimizer_of(model)
    schedule = course.schedule_of(optimizer)
    track = [course.named(model)]
    for step in range(TOTAL):
        for index in range(ACCUMULATION):
            images, labels = course.part(step, index)
            logits = low(images.to(low_dtype or torch.float32))
            (course.loss_of(logits, labels) / ACCUMULATION).backward()
        if low_dtype:
            _hand_over_gradients(low, model)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if low_dtype:
            low.load_state_dict(model.state_dict())
        track.append(course.named(model))
    return track


def _hand_over_gradients(low, model):
    for p, master in zip(low.parameters(), model.parameters(), strict=True):
        master.grad, p.grad = p.grad.float(), None


def distance(found, wanted):
    return max((found[name] - value).abs().max().item() for name, value in wanted.items())


def wait_for(path, seconds=240.0):
    """Wait until another launch has made this file."""
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.2)


def make_universal(source, target, stage):
    """`python -m deepspeed.checkpoint.ds_to_universal`, in this process."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=stage < 3,
        )
    )
