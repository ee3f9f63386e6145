"""Transformers: the weight-decay switch as a callback of its Trainer."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers.trainer_callback import ExportableState, TrainerCallback

from robust_dist.checkpoint import CheckpointError, note_parameters
from robust_dist.engines.accelerate import EngineError, replaced_by_offload
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import WeightDecaySwitch, base_optimizer
from robust_dist.schedule.hooks import in_charge
from robust_dist.validate import real_number

__all__ = ["RobustTrainerCallback"]


class RobustTrainerCallback(TrainerCallback, ExportableState):
    """Switches the weight decay of `transformers.Trainer`'s optimizer off for the last part of training.

    The optimizer comes in by Trainer's own arguments, `optimizer_cls_and_kwargs=(RAdaBeliefW, {"lr": 1e-2})` or,
    without FSDP and DeepSpeed, `optimizers=(optimizer, scheduler)`, or by name from a DeepSpeed JSON; the cosine by
    `TrainingArguments(lr_scheduler_type="cosine")`. Of `state.max_steps` optimizer steps those from
    `weight_decay_off_at * max_steps` on use no decay, whatever the processes, the accumulation and the engine.

    A run that resumes takes its step from `state.global_step` and the base decays from the checkpoint's callback state,
    whatever the param groups in the checkpoint hold. Each save under DDP or on one process gets a `parameters.json`,
    with which `robust-dist convert` takes it to another engine.

    Args:
        weight_decay_off_at: Share of the steps after which the decay is off, in [0, 1]; 1 keeps it.
        any_optimizer: Work with another optimizer than RAdaBeliefW. Otherwise one is an error, because Trainer and
            DeepSpeed replace an optimizer silently.

    Attributes:
        switch: The WeightDecaySwitch of the present run; None before training.
        switch_state: Its state at the last save; None before.

    Raises:
        TypeError: `weight_decay_off_at` is no number.
        ValueError: `weight_decay_off_at` is outside [0, 1].
    """

    def __init__(self, weight_decay_off_at: float = 0.75, any_optimizer: bool = False) -> None:
        self.weight_decay_off_at = real_number("weight_decay_off_at", weight_decay_off_at, 0.0, 1.0)
        self.any_optimizer = bool(any_optimizer)
        self.switch: WeightDecaySwitch | None = None
        self.switch_state: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The state that Trainer writes into trainer_state.json."""
        if self.switch is not None:
            self.switch_state = self.switch.state_dict()
        return {
            "args": {"weight_decay_off_at": self.weight_decay_off_at, "any_optimizer": self.any_optimizer},
            "attributes": {"switch_state": self.switch_state},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Make the switch, at the step that the run is at.

        Raises:
            EngineError: Another optimizer trains than RAdaBeliefW, and `any_optimizer` is not set.
            ValueError: The number of steps is unknown, no param group has a weight decay, or another switch sets it.
        """
        if state.max_steps < 1:
            raise ValueError(
                f"max_steps={state.max_steps}: the switch needs the number of optimizer steps; give TrainingArguments "
                "max_steps, or a dataset with a length"
            )
        base = base_optimizer(optimizer)
        self._check(base)
        self.switch = WeightDecaySwitch(base, state.max_steps, off_at=self.weight_decay_off_at)
        if state.global_step > 0:
            self._resume(state)
        _warn_without_decay(self.switch)
        # Trainer's save fails on a callback that the checkpoint it resumed from did not have.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Write the names of the optimizer's parameters beside `optimizer.pt`, which `robust-dist convert` asks for."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and (folder / "optimizer.pt").is_file():
            # An optimizer may hold parameters that are not the model's; the run goes on without the note.
            with contextlib.suppress(CheckpointError):
                note_parameters(folder, model, optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimizer step.

        Raises:
            RankDisagreementError: On every rank that still runs, if the ranks' settings, steps or groups differed.
        """
        assert self.switch is not None
        self.switch.step()

    def _check(self, base: Optimizer) -> None:
        name = type(base).__name__
        if not (self.any_optimizer or isinstance(base, RAdaBeliefW)):
            why = replaced_by_offload(base, RAdaBeliefW.__name__) or (
                'give Trainer optimizer_cls_and_kwargs=(RAdaBeliefW, {"lr": ...}), or name it in the DeepSpeed JSON '
                "(under DeepSpeed Trainer drops what optimizers=(...) held)"
            )
            raise EngineError(
                f"the optimizer that trains is {type(base).__module__}.{name}, not RAdaBeliefW: {why}. If it is meant, "
                "RobustTrainerCallback(any_optimizer=True) switches its decay"
            )
        if not any("weight_decay" in group for group in base.param_groups):
            raise ValueError(f"no param group of {name} has a weight_decay to switch off; drop RobustTrainerCallback")
        if in_charge(base) not in (None, self.switch):
            raise ValueError(
                "a RobustSchedule, a WeightDecaySwitch or a second RobustTrainerCallback already sets the weight decay "
                "of this optimizer; drop RobustTrainerCallback, or make the schedule with weight_decay_off_at=None "
                "(in a DeepSpeed JSON: null)"
            )

    def _resume(self, state: Any) -> None:
        assert self.switch is not None
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        known = saved.get("attributes", {}).get("switch_state")
        self.switch.load_state_dict((known or self.switch.state_dict()) | {"step": state.global_step})


def _warn_without_decay(switch: WeightDecaySwitch) -> None:
    if not any(switch.state_dict()["base_weight_decay"]):
        warnings.warn(
            "weight_decay is 0 in every param group, so that there is nothing to switch off: Trainer puts "
            "TrainingArguments(weight_decay=...), which is 0 unless given, in the place of the optimizer's own",
            UserWarning,
            stacklevel=2,
        )
