"""The learning rate as a pure function of the optimizer step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

from torch import Tensor

from robust_dist.validate import one_of, real_number, whole_number

DecayKind = Literal["cosine", "step", "constant"]
# The fraction of the base rate, from the step (from 0) and the total number of steps.
OwnDecay = Callable[[int, int], float]
DECAYS: tuple[DecayKind, ...] = ("cosine", "step", "constant")
_Rate = TypeVar("_Rate", float, Tensor)
# The paper's baseline: a tenth from epoch 150 of 300 on, a hundredth from epoch 225 on.
_MILESTONES = (Fraction(1, 2), Fraction(3, 4))
# At how many steps a curve is looked at.
_LOOKS = 64


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Warm-up, then half a cosine (eq. 17) or another decay, per optimizer step.

    With T = total_steps, W = warmup_steps, r = min_lr_ratio and the base learning rate eta, step s (from 0) has

    - s < W: eta (s + 1)/(W + 1), linear, never 0, reaching eta at s = W;
    - s >= W: eta (r + (1 - r)(1 + cos(pi p))/2) with p = min(1, (s - W)/(T - W)), hence r eta from T on.

    The paper's t and T are in epochs; here they are in steps, so that the rate also falls within an epoch.

    Attributes:
        total_steps: T.
        warmup_steps: W.
        min_lr_ratio: r.
        decay: "cosine": as above. "step": eta, eta/10 for s >= T/2, eta/100 for s >= 3 T/4 (the paper's baseline,
            epochs 150 and 225 of 300). "constant": eta. A function: eta decay(s, T) for s >= W.
    """

    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay: DecayKind | OwnDecay = "cosine"

    def lr(self, step: int, base_lr: float) -> float:
        """The learning rate of optimizer step `step` (from 0) for the base learning rate `base_lr`."""
        if step < self.warmup_steps:
            return base_lr * ((step + 1) / (self.warmup_steps + 1))
        return base_lr * self._decayed(step)

    def scaled(self, step: int, base_lr: float, rate: _Rate) -> _Rate:
        """The rate of step `step` for a group whose current rate need not be this curve's.

        It continues from any rate, like torch's schedulers: the part above the floor (r eta while the cosine falls,
        else 0) is scaled like the curve's; if that is 0, the curve's difference is added. Step 0 is scaled from
        `base_lr`.
        """
        eta = base_lr or 1.0
        before, now = self.lr(step - 1, eta) if step > 0 else eta, self.lr(step, eta)
        falling = self.decay == "cosine" and step > self.warmup_steps
        share = self.min_lr_ratio if falling else 0.0
        above = before - share * eta
        if above == 0.0:
            return rate + (now - before) * (base_lr / eta)
        floor = share * base_lr
        return floor + (rate - floor) * ((now - share * eta) / above)

    @property
    def changes(self) -> bool:
        """Whether the rate is another at some step than its peak, or 0."""
        return not self._shares(0) <= {0.0, 1.0}

    @property
    def falls(self) -> bool:
        """Whether the rate is lower at some step than at an earlier one, after the warm-up."""
        return self.decay != "constant" and any(share < 1.0 for share in self._shares(self.warmup_steps))

    def _shares(self, first: int) -> set[float]:
        """The share of the peak at some steps from `first` on."""
        left = self.total_steps - first
        steps = {first + left * part // _LOOKS for part in range(_LOOKS)}
        return {self.lr(step, 1.0) for step in steps}

    def _decayed(self, step: int) -> float:
        if callable(self.decay):
            return float(self.decay(step, self.total_steps))
        if self.decay == "step":
            return 0.1 ** sum(step >= share * self.total_steps for share in _MILESTONES)
        return 1.0 if self.decay == "constant" else self._cosine(step)

    def _cosine(self, step: int) -> float:
        length = max(1, self.total_steps - self.warmup_steps)
        progress = 1.0 if step >= self.total_steps else (step - self.warmup_steps) / length
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine


def checked_curve(total_steps: Any, warmup_steps: Any, min_lr_ratio: Any, decay: Any) -> Curve:
    """The curve for a user's settings; raises TypeError or ValueError naming the wrong one."""
    total = whole_number("total_steps", total_steps, 1)
    warmup = whole_number("warmup_steps", warmup_steps, 0, total)
    ratio = real_number("min_lr_ratio", min_lr_ratio, 0.0, 1.0)
    if not callable(decay):
        one_of("decay", decay, DECAYS)
    if decay != "cosine" and ratio:
        raise ValueError(f"min_lr_ratio={ratio} is the final value of the cosine; with decay={decay!r} it must be 0")
    return Curve(total_steps=total, warmup_steps=warmup, min_lr_ratio=ratio, decay=decay)
