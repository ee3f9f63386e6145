"""DeepSpeed: RAdaBeliefW and RobustSchedule as names for "type" in a JSON, with checks and patches."""

import torch

from robust_dist.engines.deepspeed import patches
from robust_dist.engines.deepspeed.check_checkpoint import check_checkpoint
from robust_dist.engines.deepspeed.config import check_config
from robust_dist.engines.deepspeed.engine import ENGINES
from robust_dist.engines.deepspeed.schedule import DeepSpeedRobustSchedule
from robust_dist.optim import RAdaBeliefW

__all__ = ["ENGINES", "check_checkpoint", "check_config", "register"]


def register() -> None:
    """Make RAdaBeliefW and RobustSchedule available as "type" in a DeepSpeed JSON, and patch DeepSpeed for them.

    DeepSpeed looks up unknown optimizers in `torch.optim` and unknown schedulers in `torch.optim.lr_scheduler`, and
    ZeRO rejects optimizers that are not on its list. Some methods of DeepSpeed are also wrapped, without any change for
    other optimizers: its engine first checks its JSON like `check_config`; it checks a checkpoint with
    `check_checkpoint` before loading it; the initial step of ZeRO-0's wrapper for bfloat16 and float16 is undone; a
    universal checkpoint restores each param group's settings and each parameter's step count; `rate_guard` and
    `averaging` get access to the gradients and weights inside the wrappers.

    Call this on every rank before `deepspeed.initialize` or `Accelerator.prepare`. It may be called repeatedly, before
    or after `import deepspeed`, which it does not import itself.
    """
    torch.optim.RAdaBeliefW = RAdaBeliefW  # type: ignore[attr-defined]
    torch.optim.lr_scheduler.RobustSchedule = DeepSpeedRobustSchedule  # type: ignore[attr-defined]
    patches.when_imported(
        {
            "deepspeed.runtime.zero.utils": patches.pass_gate,
            "deepspeed.runtime.engine": patches.patch_engine,
            "deepspeed.runtime.fp16.fused_optimizer": patches.patch_dry_step,
            "deepspeed.runtime.fp16.unfused_optimizer": patches.patch_unfused,
            "deepspeed.runtime.bf16_optimizer": patches.patch_step,
            "deepspeed.runtime.zero.stage_1_and_2": patches.patch_step,
            "deepspeed.runtime.zero.stage3": patches.patch_stage3,
        }
    )
