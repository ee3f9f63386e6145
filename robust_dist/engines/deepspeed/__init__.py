"""DeepSpeed: RAdaBeliefW and RobustSchedule as names for a JSON's "type", and what keeps them right there."""

import torch

from robust_dist.engines.deepspeed import patches
from robust_dist.engines.deepspeed.check_checkpoint import check_checkpoint
from robust_dist.engines.deepspeed.config import check_config
from robust_dist.engines.deepspeed.engine import ENGINES
from robust_dist.engines.deepspeed.schedule import DeepSpeedRobustSchedule
from robust_dist.optim import RAdaBeliefW

__all__ = ["ENGINES", "check_checkpoint", "check_config", "register"]


def register() -> None:
    """Let a DeepSpeed JSON name RAdaBeliefW and RobustSchedule in "type", and keep DeepSpeed from harming them.

    DeepSpeed looks an unknown optimizer up on `torch.optim` and an unknown scheduler up on `torch.optim.lr_scheduler`,
    and ZeRO refuses optimizers that are not on its list. Besides, some methods of DeepSpeed are wrapped, and do what
    they did for other optimizers: its engine begins with `check_config`'s checks of what it takes by name from its
    JSON; it loads what `check_checkpoint` has passed; ZeRO-0's wrapper for bfloat16 and float16 leaves no trace of the
    step that it makes at its start; a universal checkpoint gives each param group its own settings and each parameter
    its own step count; `rate_guard` and `averaging` are given the gradients and weights that the wrappers hide.

    Call this on every rank before `deepspeed.initialize` or `Accelerator.prepare`. It may be called again, and before
    or after `import deepspeed`, which it does not import.
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
