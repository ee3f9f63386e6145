"""Wrong JSONs and wrong checkpoints: an error on every rank, in seconds, that says what to change."""

import contextlib
import copy
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.engines.deepspeed import check_checkpoint
from robust_dist.engines.deepspeed.check_checkpoint import CheckpointMismatchError
from robust_dist.optim import RAdaBeliefW
from tests.engines import course
from tests.engines import deepspeed_course as ds
from tests.engines import deepspeed_scenarios as scenarios
from tests.engines.course import DECAY, LR, TOTAL

# A fifth of what a collective waits.
SECONDS = 60.0


@contextlib.contextmanager
def error(kind, *texts):
    """The block raises `kind` on this rank, soon, and the message has every text."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert time.monotonic() - begin < SECONDS
    message = str(caught.value)
    for text in texts:
        assert re.search(text, message), f"{text!r} is not in {message!r}"


def forgotten_registration():
    with error((AssertionError, AttributeError), "RAdaBeliefW"):
        ds.from_json(ds.named_config(2))


def optimizer(**params):
    return {"optimizer": {"type": "RAdaBeliefW", "params": params}}


def scheduler(**params):
    return {"scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": TOTAL, **params}}}


WRONG = [
    ({"optimizer": {"type": "RAdaBelifW"}}, "optimizer.type='RAdaBelifW'", "'RAdaBeliefW'"),
    ({"optimizer": {"type": "Radabeliefw"}}, "optimizer.type='Radabeliefw'", "'RAdaBeliefW'"),
    ({"scheduler": {"type": "RobustScheduler"}}, "scheduler.type='RobustScheduler'", "'RobustSchedule'"),
    (optimizer(weight_decy=0.1), "optimizer.params.weight_decy=0.1", "'weight_decay'"),
    (optimizer(lr="auto"), "optimizer.params.lr='auto'", "give the value"),
    (optimizer(lr="0.1"), "lr must be a number, got '0.1'"),
    (optimizer(betas=0.9), "betas must be a pair of numbers, got 0.9"),
    (optimizer(adam_w_mode=False), "optimizer.params.adam_w_mode=False", "always decoupled"),
    (scheduler(warmup_num_step=3), "no parameter 'warmup_num_step'", "'warmup_num_steps'"),
    (scheduler(warmup_num_steps="3"), "warmup_num_steps='3' is a str"),
    (scheduler(warmup_num_steps=99), "warmup_num_steps=99 is above"),
    (scheduler(total_num_steps="auto"), "scheduler.params.total_num_steps='auto'", "give the value"),
]


EVERYTHING = {
    **optimizer(amsgrad=True, freeze_step=400, cuda_aware=False, betas=[0.9], max_grad_norm=1.0),
    "scheduler": {"type": "RobustSchedule", "params": {"cycle_min_lr": 0.0, "warmup_max_lr": -1, "warmup_type": "log"}},
}
ALL_THAT_IS_WRONG = (
    "params.amsgrad=True; .* no maximum",
    "params.freeze_step=400, optimizer.params.cuda_aware=False; .* no parameter 'freeze_step', 'cuda_aware': drop them",
    'params.max_grad_norm=1.0; .*"gradient_clipping"',
    r"params.betas=\[0.9\]; .* must be a pair",
    "params.cycle_min_lr=0.0; .* no parameter 'cycle_min_lr'",
    "params.warmup_max_lr=-1; .* out of range",
    'total_steps is missing.*"total_num_steps": "auto" where Trainer or Accelerate',
)
WRONG += [(EVERYTHING, *ALL_THAT_IS_WRONG)]


def wrong_jsons():
    for wrong, *texts in WRONG:
        with error(ValueError, f"rank {dist.get_rank()}: ", *texts):
            ds.from_json({**ds.named_config(2), **wrong})


COMMON = {
    "optimizer": {
        "type": "RAdaBeliefW",
        "params": {
            **ds.OPTIMIZER["params"],
            "torch_adam": True,
            "adam_w_mode": True,
            "bias_correction": True,
            "amsgrad": False,
            "eps": 1e-8,
            "betas": [0.9, 0.999],
        },
    },
    "scheduler": {
        "type": "RobustSchedule",
        "params": {"total_num_steps": float(TOTAL), "weight_decay_off_at": course.OFF_AT, "last_batch_iteration": -1.0},
    },
}


def common_jsons_train_as_if_they_said_nothing_of_adam():
    written = copy.deepcopy(COMMON)
    json = ds.config(2, **written)
    ds.follow(ds.from_json(json), 0, 2)
    assert {key: json[key] for key in COMMON} == COMMON


AUTO = {"total_num_steps": "auto", "warmup_num_steps": "auto"}
NOT_OURS = [
    {},
    {"optimizer": {"type": None}, "scheduler": {"type": None}},
    {"optimizer": {}, "scheduler": {}},
    {"optimizr": {"type": "AdamW"}},
    # What Trainer leaves of our JSON for evaluate() and predict().
    {"scheduler": {"type": "RobustSchedule", "params": {**AUTO, "total_num_steps": 0}}},
]


def engines_that_name_nothing_of_ours_start_as_without_us():
    """Frozen teachers, evaluations, and a client's own optimizer beside a JSON that names one of ours."""
    import deepspeed

    trained = ds.from_json(ds.named_config(2))
    for stage, json in [*((0, json) for json in NOT_OURS), (3, NOT_OURS[-1])]:
        teacher = course.Net().requires_grad_(False)
        engine = deepspeed.initialize(model=teacher, config=ds.config(stage, **json))[0]
        engine.eval()
        assert engine(torch.ones(2, 6)).shape == (2, 3)
        assert engine.basic_optimizer is None
    ignored = {**optimizer(weight_decy=1), "scheduler": {"type": "RobustScheduler"}}
    engine = ds.from_client(ds.config(0, **ignored), adamw)
    assert type(engine.optimizer) is torch.optim.AdamW
    ds.follow(trained, 0, 2)


class Wide(course.Net):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 3)


def adamw(model):
    return torch.optim.AdamW(course.groups_of(model), lr=LR)


def one_group(model):
    return RAdaBeliefW(model.parameters(), lr=LR, weight_decay=DECAY)


def refused(engine, folder, tag, *texts):
    """By the check, and by the engine's own load."""
    with error(CheckpointMismatchError, *texts):
        check_checkpoint(engine, folder, tag)
    with error(CheckpointMismatchError, *texts):
        engine.load_checkpoint(folder, tag=tag)


def wrong_checkpoints(folder):
    for stage in range(4):
        kind, path = f"ZeRO {stage}", f"{folder}/ZeRO {stage}"
        engine = scenarios.client(kind)
        check_checkpoint(engine, path, "step2")
        refused(engine, path, "step5", "^there is no checkpoint .*step5$")
        with error(CheckpointMismatchError, "there is no .*latest: give the tag"):
            check_checkpoint(engine, f"{folder}/nothing", None)
        assert engine.load_checkpoint(f"{folder}/nothing") == (None, None)
        refused(scenarios.client(kind, model=Wide()), path, "step2", "of another model.*gate.bias")
        refused(scenarios.client(kind, one_group), path, "step2", "has 2 param groups, the optimizer has 1")
        other = ds.from_client(ds.config(stage, zero_allow_untested_optimizer=True), adamw)
        other.save_checkpoint(path, tag="adamw")
        refused(engine, path, "adamw", "of another optimizer than RAdaBeliefW", "no .*rectify_threshold")
        torn_checkpoints(engine, stage, path)
    refused(scenarios.client("ZeRO 1"), f"{folder}/ZeRO 3", "step2", "mp_rank_00_model_states.pt is missing")


def torn_checkpoints(engine, stage, path):
    """Only rank 1's file is torn; both ranks raise, and say whose it is. ZeRO-0's ranks read the same file."""
    whose = "rank 1: " if stage else "^"
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt" if stage else "mp_rank_00_model_states.pt"
    if dist.get_rank() == 0:
        shutil.copytree(f"{path}/step2", f"{path}/torn")
        with open(f"{path}/torn/{name}", "r+b") as file:
            file.truncate(Path(file.name).stat().st_size // 2)
    dist.barrier()
    refused(engine, path, "torn", f"{whose}.*{name} is torn", "take the one before")
    dist.barrier()
    if dist.get_rank() == 0:
        Path(f"{path}/torn/{name}").unlink()
    dist.barrier()
    refused(engine, path, "torn", f"{whose}.*{name} is missing")


def plain_checkpoints_of_another_world(folder):
    """DeepSpeed refuses them, too; ours says what to run."""
    for stage in scenarios.UNIVERSAL_STAGES:
        refused(scenarios.unequal(stage), f"{folder}/{stage}", "step2", "written by . ranks, . run", "ds_to_universal")


def wrong_universal_checkpoints(folder):
    universal = {"checkpoint": {"load_universal": True}}
    for stage in scenarios.UNIVERSAL_STAGES:
        path = f"{folder}/{stage}"
        check_checkpoint(scenarios.unequal(stage, **universal), path, "step2u")
        single = ds.from_client(ds.config(stage, **universal), one_group)
        refused(single, path, "step2u", "has 2 param groups, the optimizer has 1")
        wide = scenarios.unequal(stage, Wide(), **universal)
        refused(wide, path, "step2u", "of another model.*gate.bias")
        # What the converter wrote last is found by the file that it leaves.
        refused(wide, path, None, "step6u is of another model")
