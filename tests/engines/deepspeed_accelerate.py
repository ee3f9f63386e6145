"""A JSON full of "auto" under Accelerate, of which only the two "type" words were changed."""

import pytest
import torch
from torch import nn

from robust_dist.engines.accelerate import EngineError, check
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule
from tests.engines.toys import DECAY, LR, batch, build_model, groups_of, same, used, wanted

TOTAL = 8
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
    "gradient_clipping": "auto",
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


def dummies(stage):
    from accelerate.utils import DummyOptim, DummyScheduler

    accelerator = accelerator_for(AUTO | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}})
    model = build_model()
    optimizer = DummyOptim(groups_of(model), lr=LR, weight_decay=DECAY)
    # Accelerate divides by the number of processes: the count is of batches of one process.
    schedule = DummyScheduler(optimizer, total_num_steps=TOTAL * accelerator.num_processes, warmup_num_steps=2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    check(accelerator, optimizer, num_processes=2, schedule=schedule, total_steps=TOTAL)
    with pytest.raises(ValueError, match=r"total_num_steps=18, as Accelerate divides it by the 2 processes.*JSON"):
        check(accelerator, optimizer, schedule=schedule, total_steps=TOTAL + 1)
    decays = train_through(accelerator, model, optimizer, schedule)
    assert decays == [wanted(step, TOTAL)[0] for step in range(TOTAL)]


def client_objects(stage):
    json = {k: v for k, v in AUTO.items() if k not in ("optimizer", "scheduler")}
    accelerator = accelerator_for(json | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}})
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    check(accelerator, optimizer, num_processes=2, schedule=schedule, total_steps=TOTAL)
    decays = train_through(accelerator, model, optimizer, schedule, rates_too=True)
    assert decays == [wanted(step, TOTAL)[0] for step in range(TOTAL)]


def unregistered():
    """Without `register()` nobody gives a rate its gradients, which `check` says."""
    json = {k: v for k, v in AUTO.items() if k not in ("optimizer", "scheduler")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        accelerator = accelerator_for(json)
        model = build_model()
        model, optimizer = accelerator.prepare(model, RAdaBeliefW(groups_of(model), lr=LR, rate_guard=1.0))
        with pytest.raises(EngineError, match=r"rate_guard need robust_dist.register\(\)"):
            check(accelerator, optimizer)


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


def offload_replaces_a_client_silently_unless_told():
    """Accelerate puts DeepSpeedCPUAdam in the place of a client's optimizer; `check` says so. Compiles cpu_adam."""
    json = {k: v for k, v in AUTO.items() if k not in ("optimizer", "scheduler")}
    offload = {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    for told in (False, True):
        more = {"zero_force_ds_cpu_optimizer": False} if told else {}
        accelerator = accelerator_for(json | {"zero_optimization": offload} | more)
        model = build_model()
        model, optimizer = accelerator.prepare(model, RAdaBeliefW(groups_of(model), lr=LR))
        if told:
            check(accelerator, optimizer, num_processes=torch.distributed.get_world_size())
            continue
        with pytest.raises(EngineError, match=r"DeepSpeedCPUAdam, not RAdaBeliefW.*zero_force_ds_cpu_optimizer"):
            check(accelerator, optimizer)
