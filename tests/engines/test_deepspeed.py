import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.engines.accelerate import base_optimizer, check
from robust_dist.engines.deepspeed import register
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.engines.toys import DECAY, LR, batch, build_model, groups_of, same, used, wanted
from tests.ranks import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)
TOTAL = 8
OPTIMIZER = {"type": "RAdaBeliefW", "params": {"lr": LR, "weight_decay": DECAY}}
SCHEDULER = {"type": "RobustSchedule", "params": {"total_num_steps": TOTAL}}


def config(stage, **more):
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    } | more


def start(stage, client, scheduler=SCHEDULER):
    """An engine with everything by name from its JSON, or with a client's optimizer and schedule."""
    import deepspeed

    model = build_model()
    if not client:
        json = config(stage, optimizer=OPTIMIZER, scheduler=scheduler)
        return deepspeed.initialize(model=model, model_parameters=groups_of(model), config=json)[0]
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL)
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config(stage))[0]


def train(engine, first, last):
    """Train; what every optimizer step used must be what its number says."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        before = used(base_optimizer(engine.optimizer))
        assert same(before, wanted(step, TOTAL)), (step, before)
        images, labels = (part[rank::world] for part in batch(step))
        loss = nn.functional.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach().clone())
        losses.append(loss.item() / world)
    return losses


def reference():
    """The losses of one process without an engine."""
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL, weight_decay_off_at=None)
    switch = WeightDecaySwitch(optimizer, TOTAL)
    losses = []
    for step in range(TOTAL):
        loss = nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        switch.step()
        losses.append(loss.item())
    return losses


def check_every_stage(folder):
    losses = reference()
    for stage in (0, 1, 2, 3):
        for client in (False, True):
            engine = start(stage, client)
            assert type(base_optimizer(engine.optimizer)) is RAdaBeliefW
            assert type(engine.lr_scheduler) is RobustSchedule
            path = f"{folder}/{stage}{client}"
            here = train(engine, 0, 3)
            engine.save_checkpoint(path, tag="before")
            here += train(engine, 3, 7)
            engine.save_checkpoint(path, tag="after")
            here += train(engine, 7, TOTAL)
            assert here == pytest.approx(losses, rel=1e-5), (stage, client)
            assert engine.lr_scheduler.last_epoch == TOTAL
            check_loads(engine, path, here)


def check_loads(engine, path, losses):
    # The engine is past the switch: back before it, then after it again.
    for tag, step in (("before", 3), ("after", 7), ("before", 3)):
        engine.load_checkpoint(path, tag=tag)
        assert train(engine, step, TOTAL) == losses[step:]


def check_loads_into_a_fresh_engine(folder):
    for stage, tag, step in ((2, "after", 7), (3, "before", 3)):
        engine = start(stage, client=False)
        engine.load_checkpoint(f"{folder}/{stage}False", tag=tag)
        train(engine, step, TOTAL)


def check_a_load_without_the_scheduler_keeps_the_engines_step(folder):
    engine = start(2, client=False)
    engine.load_checkpoint(f"{folder}/2False", tag="after", load_lr_scheduler_states=False)
    assert same(used(base_optimizer(engine.optimizer)), wanted(0, TOTAL))


def check_deepspeeds_warmup_is_taken_over():
    from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR

    for kind in ("log", "linear"):
        for warmup in (1, 2, 5, 20):
            shared = {"total_num_steps": 20, "warmup_num_steps": warmup, "warmup_type": kind}
            cosine = {**shared, "warmup_min_ratio": 0.0, "cos_min_ratio": 0.01}
            compare(WarmupCosineLR, cosine, 23)
            # Its decay is linear; the warm-up, with its start and its peak, is the same.
            compare(WarmupDecayLR, {**shared, "warmup_min_lr": 0.02, "warmup_max_lr": 0.3}, max(2, warmup) + 1)


def compare(theirs, params, steps):
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2)]
    schedules = [cls(optimizer, **params) for cls, optimizer in zip((theirs, RobustSchedule), optimizers, strict=True)]
    for step in range(steps):
        a, b = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        assert abs(a - b) < 1e-15, (theirs.__name__, params, step, a, b)
        for schedule in schedules:
            schedule.step()


def check_a_wrong_parameter_is_named():
    wrong = {"type": "RobustSchedule", "params": {"total_num_steps": TOTAL, "warmup_step": 3}}
    with pytest.raises(ValueError, match="no parameter 'warmup_step'"):
        start(1, client=False, scheduler=wrong)


AUTO = {
    "optimizer": {"type": "RAdaBeliefW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "RobustSchedule",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 10**9,
}


def accelerator_for(json):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    return accelerator


def check_accelerate_with_dummies():
    from accelerate.utils import DummyOptim, DummyScheduler

    accelerator = accelerator_for(AUTO)
    model = build_model()
    optimizer = DummyOptim(groups_of(model), lr=LR, weight_decay=DECAY)
    # Accelerate divides by the number of processes: the count is of batches of one process.
    schedule = DummyScheduler(optimizer, total_num_steps=TOTAL * accelerator.num_processes, warmup_num_steps=2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    check(accelerator, optimizer, num_processes=2, schedule=schedule, total_steps=TOTAL)
    decays = train_through(accelerator, model, optimizer, schedule)
    assert decays == [wanted(step, TOTAL)[0] for step in range(TOTAL)]


def check_accelerate_with_client_objects():
    accelerator = accelerator_for({k: v for k, v in AUTO.items() if k not in ("optimizer", "scheduler")})
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    check(accelerator, optimizer, num_processes=2, schedule=schedule, total_steps=TOTAL)
    decays = train_through(accelerator, model, optimizer, schedule, rates_too=True)
    assert decays == [wanted(step, TOTAL)[0] for step in range(TOTAL)]


def train_through(accelerator, model, optimizer, schedule, rates_too=False):
    decays = []
    for step in range(TOTAL):
        before = used(optimizer)
        decays.append(before[0])
        assert not rates_too or same(before, wanted(step, TOTAL)), (step, before)
        images, labels = (part[accelerator.process_index :: accelerator.num_processes] for part in batch(step))
        accelerator.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return decays


def every_scenario(folder):
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_SIZE"] = str(dist.get_world_size())
    register()
    register()
    check_deepspeeds_warmup_is_taken_over()
    check_every_stage(folder)
    check_loads_into_a_fresh_engine(folder)
    check_a_load_without_the_scheduler_keeps_the_engines_step(folder)
    check_a_wrong_parameter_is_named()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    check_accelerate_with_dummies()
    check_accelerate_with_client_objects()
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    return ZERO_SUPPORTED_OPTIMIZERS.count(RAdaBeliefW)


def test_under_deepspeed_every_optimizer_step_has_its_own_rate_and_decay_at_every_stage(tmp_path):
    assert run_ranks(every_scenario, 2, str(tmp_path), timeout=300.0) == [1, 1]


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_registering_is_asked_for_cheap_and_may_be_repeated_in_any_order_with_the_import():
    code = """
import sys, torch
import robust_dist.engines, robust_dist.engines.deepspeed
print(hasattr(torch.optim, "RAdaBeliefW"), hasattr(torch.optim.lr_scheduler, "RobustSchedule"))
import robust_dist.autoregister
from robust_dist.engines.deepspeed import register
register()
print(torch.optim.RAdaBeliefW.__name__, torch.optim.lr_scheduler.RobustSchedule.__name__, "deepspeed" in sys.modules)
print(len([finder for finder in sys.meta_path if type(finder).__module__.startswith("robust_dist")]))
import importlib.util
importlib.util.find_spec("deepspeed.runtime.zero.utils") and None
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as supported
register()
print(supported.count(torch.optim.RAdaBeliefW))
"""
    lines = [line for line in printed(code) if not line.startswith("[")]
    words = ["False", "False", "RAdaBeliefW", "RobustSchedule", "False", "1", "1"]
    assert [word for word in lines if word in {*words, "0", "2", "True"}] == words
