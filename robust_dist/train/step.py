"""One optimizer step of a run."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_dist.data import Batch
from robust_dist.data.batches import Pipeline
from robust_dist.engines.engine import engine_of
from robust_dist.schedule import base_optimizer
from robust_dist.train.graph import StaticStep
from robust_dist.train.recipe import Recipe


def summed_loss(logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """The summed cross-entropy, 0-d float32.

    Args:
        logits: [B, C], of any floating dtype.
        targets: [B, C], floating, each row summing to 1; or int64 classes [B].
        weights: float32 [B], factors of the samples' losses; None if all count.
        label_smoothing: Fraction of a target spread over all classes.
    """
    logits = logits.float()
    if weights is None:
        return nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    each = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (each * weights).sum()


def summed_entropy(targets: Tensor, num_classes: int, weights: Tensor | None, label_smoothing: float) -> Tensor | float:
    """The summed entropy of the targets of `summed_loss`, the loss that remains for a perfect model."""
    if not targets.is_floating_point():
        if label_smoothing == 0.0:
            return 0.0
        targets = nn.functional.one_hot(targets, num_classes)
    smooth = targets.float() * (1 - label_smoothing) + label_smoothing / num_classes
    each = torch.special.entr(smooth).sum(1)
    return each.sum() if weights is None else (each * weights).sum()


class TrainStep:
    """Augmentation, forward and backward pass, clipping and update: the mean loss over the global batch.

    Args:
        recipe: All settings.
        accelerator: The engine, which produced `model`, `optimizer` and `schedule`.
        model: See `accelerator`.
        optimizer: See `accelerator`.
        schedule: See `accelerator`.
        pipeline: The augmentation, compiled or not.
        loss_sum: 0-d float64 on the device; this rank's summed loss is added to it.
        full_size: Number of samples in a batch other than an epoch's last, with which `cuda_graph` captures its graph.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        pipeline: Pipeline,
        loss_sum: Tensor,
        full_size: int,
    ) -> None:
        self.recipe, self.accelerator, self.pipeline = recipe, accelerator, pipeline
        self.model, self.optimizer, self.schedule, self.loss_sum = model, optimizer, schedule, loss_sum
        engine = engine_of(accelerator)
        self.input_dtype = engine.input_dtype(accelerator.unwrap_model(model))
        self._base: Any = base_optimizer(optimizer)
        self._measures_rate = getattr(self._base, "measures_rate", False)
        # If backward steps, the engine gives the optimizer its gradients.
        self._shows_gradients = self._measures_rate and not engine.steps_in_backward
        self._static: StaticStep | None = None
        if recipe.cuda_graph:
            self._static = StaticStep(self._learn, optimizer, accelerator.device, full_size)

    def __call__(self, parts: list[Batch]) -> None:
        """Train on this rank's micro-batches of a global batch, and set the rates of the next step."""
        for batch in parts:
            with self.accelerator.accumulate(self.model):
                if self._static is None:
                    self._learn(batch, len(parts))
                else:
                    self._static(batch)
                self.schedule.step()

    @property
    def measured_rate(self) -> float | None:
        """The learning rate of the last step, if the optimizer measures it; waits for the device."""
        return self._base.measured_rate if self._measures_rate else None

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's input and its targets."""
        images, targets = batch.augmented(self.pipeline)
        return images.to(self.input_dtype), targets

    def _learn(self, batch: Batch, parts: int = 1) -> None:
        images, targets = self.inputs(batch)
        logits = self.model(images)
        loss = summed_loss(logits, targets, batch.weights, self.recipe.label_smoothing)
        # Engines average over ranks and micro-batches; samples must count equally even if these are uneven.
        parts_in_all = self.accelerator.num_processes * parts
        if self._measures_rate:
            entropy = summed_entropy(targets, logits.shape[1], batch.weights, self.recipe.label_smoothing)
            self._base.observe((loss.detach() - entropy) * (parts_in_all / batch.global_size))
        self.accelerator.backward(loss * (parts_in_all / batch.global_size))
        self.loss_sum += loss.detach().double()
        if self.accelerator.sync_gradients and self.recipe.optimizer.clip_norm is not None:
            if self._shows_gradients:
                scaler = self.accelerator.scaler
                self._base.observe_gradients(scale=1.0 if scaler is None else scaler.get_scale())
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
