"""Transformers: a callback of its Trainer that switches the weight decay and serves averaging and a measured rate."""

import contextlib
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback

from robust_dist.checkpoint import CheckpointError, note_parameters
from robust_dist.engines.accelerate import EngineError, fit_rate, replaced_by_offload
from robust_dist.engines.engine import BATCH_NORMS
from robust_dist.engines.rate import feed, idle_schedule, measures
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import WeightDecaySwitch, base_optimizer
from robust_dist.schedule.hooks import in_charge
from robust_dist.validate import real_number

__all__ = ["RobustTrainerCallback"]


# Frames between Trainer's loop and its callbacks.
_MAX_FRAMES = 10


class RobustTrainerCallback(TrainerCallback, ExportableState):
    """Switches the weight decay of `transformers.Trainer`'s optimizer off for the last part of training.

    The optimizer is set by Trainer's arguments, `optimizer_cls_and_kwargs=(RAdaBeliefW, {"lr": 1e-2})` or, without FSDP
    and DeepSpeed, `optimizers=(optimizer, scheduler)`, or by name in a DeepSpeed JSON; the cosine is set by
    `TrainingArguments(lr_scheduler_type="cosine")`. Of `state.max_steps` optimizer steps, those from
    `weight_decay_off_at * max_steps` on use no decay, for any number of processes, accumulation and engine.

    A resumed run takes its step from `state.global_step` and the base decays from the checkpoint's callback state, not
    from the param groups in the checkpoint. Each checkpoint under DDP or in one process gets a `parameters.json`, so
    that `robust-dist convert` can convert it for another engine.

    An optimizer with `rate_guard` gets the loss of every step, minus the entropy of `label_smoothing_factor`, and the
    gradients before they are clipped. A loss smoothed by the model or `compute_loss_func` is used unchanged; your own
    `compute_loss` may call `self.optimizer.optimizer.observe(loss - entropy)`, and only that value is used.

    With `averaging`, Trainer evaluates the average, and checkpoints, the best model and the final model contain the
    average; training continues with the trained weights. `lr_scheduler_type` must be "constant", also with
    rate_guard=1.

    Args:
        weight_decay_off_at: Fraction of the steps after which decay is off, in [0, 1]; 1 keeps it.
        any_optimizer: Accept an optimizer other than RAdaBeliefW. Otherwise it is an error, because Trainer and
            DeepSpeed silently replace optimizers.

    Attributes:
        switch: The WeightDecaySwitch of the current run; None before training.
        switch_state: Its state at the last save; None before.

    Raises:
        TypeError: `weight_decay_off_at` is not a number.
        ValueError: `weight_decay_off_at` is outside [0, 1].
    """

    def __init__(self, weight_decay_off_at: float = 0.75, any_optimizer: bool = False) -> None:
        self.weight_decay_off_at = real_number("weight_decay_off_at", weight_decay_off_at, 0.0, 1.0)
        self.any_optimizer = bool(any_optimizer)
        self.switch: WeightDecaySwitch | None = None
        self.switch_state: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """The state for trainer_state.json."""
        if self.switch is not None:
            self.switch_state = self.switch.state_dict()
        return {
            "args": {"weight_decay_off_at": self.weight_decay_off_at, "any_optimizer": self.any_optimizer},
            "attributes": {"switch_state": self.switch_state},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Create the switch at the run's current step.

        Raises:
            EngineError: The optimizer is not RAdaBeliefW, and `any_optimizer` is not set.
            ValueError: The number of steps is unknown, no param group has a weight decay, or another switch sets it; or
                Trainer's schedule lowers the rate of an optimizer with `averaging`, or sets that of one which takes
                none.
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
        _serve_rate(base)
        schedule, model = kwargs.get("lr_scheduler"), kwargs.get("model")
        _check_averaging(args, base, state.max_steps, schedule=schedule, model=model)
        _check_rates_count(args, base, schedule)
        # Trainer's save fails for a callback that was not in the checkpoint from which it resumed.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Write the names of the optimizer's parameters beside `optimizer.pt`, for `robust-dist convert`."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and (folder / "optimizer.pt").is_file():
            # An optimizer may have parameters that are not the model's; the run continues without the file.
            with contextlib.suppress(CheckpointError):
                note_parameters(folder, model, optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimizer step.

        Raises:
            RankDisagreementError: On every rank that still runs, if the ranks' settings, steps or groups differed.
        """
        assert self.switch is not None
        self.switch.step()
        # Trainer's own callback, which is called before, has already decided.
        if control.should_save or control.should_evaluate:
            self._hold_average()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch to the average if the epoch's end is saved or evaluated, or ends the training."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends or control.should_save or control.should_evaluate:
            self._hold_average()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the average in the model; the best checkpoint's weights, if Trainer has loaded them, are averages."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._hold_average()

    def _hold_average(self) -> None:
        """Switch the parameters to the average; Trainer switches back before it trains."""
        assert self.switch is not None
        if getattr(self.switch.optimizer, "averages_weights", False):
            self.switch.optimizer.eval()  # type: ignore[attr-defined]

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
            "weight_decay is 0 in every param group, so that there is nothing to switch off: Trainer replaces the "
            "optimizer's own by TrainingArguments(weight_decay=...), which is 0 by default",
            UserWarning,
            stacklevel=2,
        )


def _training_loop() -> Trainer | None:
    """The Trainer whose loop makes the current call; it does not pass itself to its callbacks."""
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def _serve_rate(base: Any) -> None:
    """Connect an optimizer with `rate_guard` to Trainer and its engine."""
    trainer: Any = _training_loop() if measures(base) else None
    if trainer is None:
        return
    fit_rate(trainer.accelerator, base)
    smoother = trainer.label_smoother
    if smoother is not None and not isinstance(smoother, _Smoother):
        trainer.label_smoother = smoother = _Smoother(smoother)
    feed(trainer.accelerator).divergence = None if smoother is None else smoother.divergence


class _Smoother:
    """Trainer's label smoother, which notes the fraction of its last loss that is not the smoothed labels' entropy.

    A fraction, because Trainer scales the loss before it passes it on.
    """

    def __init__(self, smoother: Any) -> None:
        self.smoother = smoother
        self._share: Tensor | None = None

    def __call__(self, model_output: Any, labels: Tensor, shift_labels: bool = False, **kwargs: Any) -> Tensor:
        loss: Tensor = self.smoother(model_output, labels, shift_labels=shift_labels, **kwargs)
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        counted = (labels[..., 1:] if shift_labels else labels) != self.smoother.ignore_index
        of = kwargs.get("num_items_in_batch")
        parts = 1.0 if of is None else counted.sum() / of
        self._share = 1 - parts * _entropy(self.smoother.epsilon, logits.shape[-1]) / loss.detach()
        return loss

    def divergence(self, loss: Tensor) -> Tensor:
        """The last loss, after any scaling, minus the entropy."""
        return loss if self._share is None else loss * self._share


def _entropy(smoothing: float, num_classes: int) -> float:
    """The entropy of a label of which a fraction is spread over all classes."""
    rest = smoothing / num_classes
    own = 1 - smoothing + rest
    return -sum(p * math.log(p) for p in [own] + [rest] * (num_classes - 1) if p > 0)


def _kind(args: Any) -> Any:
    return getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)


def _check_rates_count(args: Any, base: Any, schedule: Any) -> None:
    if idle_schedule(base, schedule) is not None:
        raise ValueError(
            f"lr_scheduler_type={_kind(args)!r} sets the learning rate, and RAdaBeliefW's rate_guard=1 takes none: set "
            "TrainingArguments(lr_scheduler_type='constant'), or rate_guard above 1, within which the rate counts"
        )


def _check_averaging(args: Any, base: Any, max_steps: int, *, schedule: Any, model: torch.nn.Module | None) -> None:
    if not getattr(base, "averages_weights", False):
        return
    curves = [
        [factor(max_steps * eighth // 8) for eighth in range(9)] for factor in getattr(schedule, "lr_lambdas", ())
    ]
    if isinstance(schedule, ReduceLROnPlateau) or any(factors[-1] < max(factors) for factors in curves):
        raise ValueError(
            f"lr_scheduler_type={_kind(args)!r} lowers the learning rate, but averaging='schedule_free' averages the "
            "weights instead; set TrainingArguments(lr_scheduler_type='constant')"
        )
    if model is not None and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        warnings.warn(
            "averaging: Trainer evaluates and saves the average of the weights, but the model's batch normalisation "
            "keeps the statistics of the trained weights; after the training, run the model in training mode over "
            "some batches without a step, then save it again",
            UserWarning,
            stacklevel=2,
        )
