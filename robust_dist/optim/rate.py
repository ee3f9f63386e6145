"""A learning rate measured during the run (`rate_guard`), from the loss and the L1 norm of the gradient.

At each step, with F the loss minus the entropy of its targets, and g the gradient before clipping::

    A <- 0.9 A + 0.1 sum|g|,   L <- 0.9 L + 0.1 F,   e = c L / A
    eta = min(max(lr, e / k), k e)        k is `rate_guard`, c is `rate_constant`

e is Polyak's step size for Adam's geometry, where each element of an update is about 1. k = 1 ignores `lr`.

Growing weights shrink the gradients of scale-invariant layers, which increases e and in turn the weights. If the
loss does not fall (noise, strong augmentation) this diverges, so e is limited to `BOUND` times its smallest value.

sum|g| is over the whole model, whichever ranks hold its elements: see `Ranks`.
"""

import math
import reprlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robust_dist.optim import fused_cpu
from robust_dist.optim.record import Found
from robust_dist.optim.settings import MEASURED, option
from robust_dist.optim.state import all_plain, is_dtensor, is_fake, local_slot
from robust_dist.validate import whole_number

_device = attrgetter("device")
MEMORY = 0.9
BOUND = 2.0
_TAKES_NO_RATE = "rate_guard=1 takes no learning rate (0 alone counts: it stops a group)"
_ABOVE = "set rate_guard above 1, within which lr counts"


def ignores_rate(group: Mapping[str, Any]) -> bool:
    """Whether a param group's `lr` has no part in its steps, unless it is 0."""
    return bool(option(group, "rate_guard") == 1.0)


def all_ignore_rate(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no group's `lr` has a part, so that a schedule of rates has no effect."""
    return bool(groups) and all(map(ignores_rate, groups))


def check_one_rate(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rates that differ from group to group, where none of them has a part.

    Raises:
        ValueError: Two groups with `rate_guard=1` were made with different rates, and neither is 0.
    """
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups if ignores_rate(group)} - {0.0})
    if len(rates) > 1:
        raise ValueError(_several(rates))


def _several(rates: Iterable[float]) -> str:
    found = " and ".join(f"lr={rate:g}" for rate in rates)
    return f"param groups have {found}, and would step alike: {_TAKES_NO_RATE}; give them one lr, or {_ABOVE}"


@dataclass(frozen=True)
class Ranks:
    """The ranks over which a rate is measured.

    Attributes:
        group: The ranks that train together; None for all.
        copies: How many of them hold the same elements of a parameter that is not a DTensor: None if all do, as under
            DDP; 1 if each holds its own, as under FSDP1 and ZeRO.
    """

    group: Any = None
    copies: int | None = None

    def __post_init__(self) -> None:
        if self.copies is not None:
            whole_number("copies", self.copies, 1)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def holders(self, param: Any, world_size: int) -> int:
        """How many ranks hold each element of a parameter."""
        if world_size == 1:
            return 1
        if is_dtensor(param):
            sizes = zip(param.device_mesh.shape, param.placements, strict=True)
            return world_size // math.prod(size for size, placement in sizes if not placement.is_replicate())
        if self.copies is not None:
            return self.copies
        if world_size > 1 and getattr(param, "_fsdp_flattened", False):
            raise RuntimeError(
                "rate_guard sums the gradient over all ranks, and a parameter is a flat shard of FSDP1, which does not "
                "say how many ranks hold a copy of it; call optimizer.measure_over(copies=1), or with HSDP the number "
                "of replicas, after wrapping"
            )
        return world_size

    def holders_of_all(self, params: Sequence[Any]) -> int | None:
        """How many ranks hold each element of these parameters; None if they differ."""
        world_size = self.world_size
        if world_size == 1:  # the common case, without a loop
            return 1
        found = {self.holders(param, world_size) for param in params}
        return found.pop() if len(found) == 1 else None


class Measured:
    """An optimizer's measurements of its run.

    Args:
        groups: Its param groups, with the saved measurements.
    """

    _told = False  # of a rate that has no part

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self.ranks = Ranks()
        self.restore(groups)

    def restore(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Read the measurements from the groups, and discard what was observed since."""
        guarded = [group for group in groups if option(group, "rate_guard") is not None]
        saved = guarded[0] if guarded else {}  # a group given `rate_guard` between two steps has none yet
        self._on_host = [float(saved.get(name, 0.0)) for name in MEASURED]
        self._on_device: Tensor | None = None  # the same as float64 [3], if measured on the gradients' device
        self._ratio: float | Tensor = _bounded_ratio(*self._on_host)  # L / A of the current step
        self._stepped: list[Sequence[Any]] = []  # parameters already stepped: engines step group by group
        self._idle: dict[int, float] = {}  # the first rate of each group that ignores it, by the group's id
        self.forget()

    def save(self, groups: Iterable[Any]) -> None:
        """Write the measurements into the groups, for their state dict; waits for the device."""
        values = self._values()
        for group in groups:
            if option(group, "rate_guard") is not None:
                group.update(zip(MEASURED, values, strict=True))

    def _values(self) -> list[float]:
        return list(self._on_host) if self._on_device is None else self._on_device.tolist()

    def forget(self) -> None:
        """Discard what was observed for the next step."""
        self._loss: float | Tensor | None = None
        self._parts = 0
        self._gradient: float | Tensor | None = None
        self._automatic_loss = self._automatic_gradient = False
        self._too_early = False  # gradients were observed when there were none

    def forget_automatic(self) -> None:
        """Discard what an engine observed for a step that is not taken."""
        if self._automatic_loss:
            self._loss, self._parts, self._automatic_loss = None, 0, False
        if self._automatic_gradient:
            self._gradient, self._automatic_gradient, self._too_early = None, False, False

    def observe(self, loss: float | Tensor, *, automatic: bool = False) -> None:
        """Add a micro-batch's loss for the next step; the mean is used, or the sum of automatic ones."""
        loss = _checked_loss(loss)
        if automatic and self._loss is not None and not self._automatic_loss:
            return
        if not automatic and self._automatic_loss:
            self._loss, self._parts = None, 0
        self._automatic_loss = automatic
        if not isinstance(loss, Tensor) or loss.is_cpu:
            value: float | Tensor = float(loss)
        else:  # a copy: the loss may be divided in place later
            value = loss.detach().reshape(()).to(_wide(loss.device), copy=True)
        self._loss = value if self._loss is None else self._loss + value
        self._parts = 1 if automatic else self._parts + 1

    def rate_of(self, group: Mapping[str, Any]) -> float:
        """The group's learning rate in the last step."""
        return float(_limited(group, self._ratio))

    def observe_gradients(
        self, groups: Iterable[Mapping[str, Any]], factor: float = 1.0, *, automatic: bool = False
    ) -> None:
        """Measure the current gradients times a factor; they may be clipped afterwards."""
        if automatic and self._gradient is not None:
            return
        if self._automatic_gradient:
            self._gradient = None
        self._automatic_gradient = automatic
        grads = _with_gradient(groups)
        self._too_early = not grads  # also on a rank with an empty shard, where a step has none either
        self.add_gradients(grads, factor)

    @torch.no_grad()
    def add_gradients(self, grads: Iterable[tuple[Any, Any]], factor: float | Tensor = 1.0) -> None:
        """Add gradients to the sum for the next step.

        Args:
            grads: Pairs of a parameter and its gradient.
            factor: The factor that unscales the sum.
        """
        total = _local_sum(list(grads), self.ranks) * factor
        self._gradient = total if self._gradient is None else _sum_on_device([self._gradient, total])

    def rates(
        self,
        groups: Sequence[Mapping[str, Any]],
        inverse_scale: Tensor | None,
        found_inf: Tensor | None,
        found: Found | None = None,
    ) -> dict[int, float | Tensor]:
        """The learning rate of each group with `rate_guard`, by its id; empty if none is measured or the step is dry.

        Args:
            groups: The groups that are stepped.
            inverse_scale: The factor that unscales the gradients, or None.
            found_inf: Not 0 if nothing may change, or None.
            found: The valid record of this step, which knows the gradients, or None.

        Raises:
            RuntimeError: No loss was observed for this step, or gradients were observed before there were any.
        """
        guarded = [group for group in groups if option(group, "rate_guard") is not None]
        params = [param for param, _ in _with_gradient(groups)] if found is None else found.params
        if self._loss is None and (not params or _is_dry(guarded)):
            return {}
        if not params and self._gradient is None and self.ranks.world_size == 1:  # nothing to step or to measure
            self.forget()
            return {}
        if self._too_early and params:
            self.forget()
            raise RuntimeError(
                f"rate_guard={guarded[0]['rate_guard']!r}: observe_gradients() was called when no parameter had a "
                "gradient; call it after backward(), before the gradients are clipped"
            )
        if not self._told:
            self._check_idle(guarded)
        if self._loss is not None:
            if self._gradient is None:
                self._add_all(groups, inverse_scale, found)
            self._measure(params[0].device if params else None, found_inf)
            self._stepped = [params]
        elif not self._stepped or not set(map(id, params)).isdisjoint(id(p) for some in self._stepped for p in some):
            raise RuntimeError(
                f"rate_guard={guarded[0]['rate_guard']!r} needs the loss of every step: call optimizer.observe(loss) "
                "before backward(), with the mean loss of the micro-batch, minus the entropy of its targets"
            )
        else:
            self._stepped.append(params)
        return {id(group): _limited(group, self._ratio) for group in guarded}

    def _check_idle(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Say once where `lr` is set as if it had a part: an error before the first step, from then on a warning."""
        for group in groups:
            lr = _readable(group["lr"]) if ignores_rate(group) else 0.0
            if not lr:
                continue
            first = self._idle.setdefault(id(group), lr)
            rates = sorted(set(self._idle.values()))
            if lr == first and len(rates) == 1:
                continue
            if lr == first and self._on_device is None and not any(self._on_host):
                self._idle.clear()
                raise ValueError(_several(rates))
            self._told = True
            what = _several(rates) if lr == first else f"lr has changed from {first:g} to {lr:g}: {_TAKES_NO_RATE}"
            warnings.warn(
                f"{what}. Leave a scheduler of rates out (RobustSchedule(..., decay='constant') still switches the "
                f"weight decay off), or {_ABOVE}",
                UserWarning,
                stacklevel=4,
            )
            return

    def _add_all(self, groups: Iterable[Mapping[str, Any]], inverse_scale: Tensor | None, found: Found | None) -> None:
        """Add the current gradients, through the record if possible, as it has checked them already."""
        holders = None if found is None else self.ranks.holders_of_all(found.params)
        total = None if found is None or holders is None else found.sum_abs()
        if total is None or holders is None:
            self.observe_gradients(groups)
        else:
            self._gradient = total / holders
        if inverse_scale is not None and isinstance(self._gradient, Tensor):
            self._gradient = self._gradient * inverse_scale.to(self._gradient.device)
        elif inverse_scale is not None and self._gradient is not None:
            self._gradient *= float(inverse_scale)

    def _measure(self, device: torch.device | None, found_inf: Tensor | None) -> None:
        """Update the means with this step's loss and gradients."""
        assert self._loss is not None
        loss = self._loss / self._parts
        gradient = 0.0 if self._gradient is None else self._gradient
        self.forget()
        if device is None:  # nothing to step, as on a rank with an empty shard
            device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        gradient, loss = self._over_ranks(gradient, loss, device)
        if device.type != "cpu":
            self._advance_on_device(_as_double(gradient, device), _as_double(loss, device), found_inf)
        elif found_inf is None or float(found_inf) == 0.0:
            self._advance_on_host(float(gradient), float(loss))

    def _over_ranks(
        self, gradient: float | Tensor, loss: float | Tensor, device: torch.device
    ) -> tuple[float | Tensor, float | Tensor]:
        """The sum of the gradients' shares and the mean loss, in one all-reduce of two numbers."""
        world_size = self.ranks.world_size
        if world_size == 1:
            return gradient, loss
        # On the loss's GPU, if it has one: an offloaded optimizer's gradients are on the CPU, which NCCL does not take.
        home = loss.device if isinstance(loss, Tensor) else device
        both = torch.stack([_as_double(gradient, home), _as_double(loss / world_size, home)])
        dist.all_reduce(both, group=self.ranks.group)
        return both[0], both[1]

    def _advance_on_host(self, gradient: float, loss: float) -> None:
        mean_gradient, mean_loss, smallest = self._values()
        mean_gradient = MEMORY * mean_gradient + (1 - MEMORY) * gradient
        mean_loss = MEMORY * mean_loss + (1 - MEMORY) * loss
        ratio = _ratio(mean_gradient, mean_loss)
        smallest = min(smallest or ratio, ratio)
        self._on_host, self._on_device = [mean_gradient, mean_loss, smallest], None
        self._ratio = _bounded_ratio(*self._on_host)

    @torch.no_grad()
    def _advance_on_device(self, gradient: Tensor, loss: Tensor, found_inf: Tensor | None) -> None:
        """`_advance_on_host` without synchronising, in fixed memory for CUDA graphs."""
        if self._on_device is None or self._on_device.device != gradient.device:
            self._on_device = torch.tensor(self._values(), dtype=gradient.dtype).to(gradient.device)
        mean_gradient, mean_loss, smallest = self._on_device.unbind()
        mean_gradient = MEMORY * mean_gradient + (1 - MEMORY) * gradient
        mean_loss = MEMORY * mean_loss + (1 - MEMORY) * loss
        ratio = torch.where(mean_gradient == 0, 0.0, mean_loss.clamp(min=0) / mean_gradient)
        smallest = torch.where(smallest == 0, ratio, torch.minimum(smallest, ratio))
        new = torch.stack([mean_gradient, mean_loss, smallest])
        if found_inf is not None:
            new = torch.where(found_inf.reshape(()).to(new.device) == 0, new, self._on_device)
        self._on_device.copy_(new)
        self._ratio = torch.minimum(ratio, BOUND * smallest)


def _ratio(mean_gradient: float, mean_loss: float) -> float:
    return max(mean_loss, 0.0) / mean_gradient if mean_gradient else 0.0


def _bounded_ratio(mean_gradient: float, mean_loss: float, smallest: float) -> float:
    """L / A as a step takes it, from the `MEASURED` values after that step."""
    return min(_ratio(mean_gradient, mean_loss), BOUND * smallest)


def _readable(lr: float | Tensor) -> float:
    """A group's rate; 0 where it lies on a device, which would have to be waited for."""
    if isinstance(lr, Tensor):
        return float(lr) if lr.is_cpu and not is_fake(lr) else 0.0
    return lr


def _checked_loss(loss: Any) -> float | Tensor:
    """A loss as a float, or a plain real tensor of 1 element without its graph.

    Raises:
        TypeError: It is no real number.
        ValueError: It has more than one element, or none.
    """
    if not isinstance(loss, Tensor):
        try:
            if not isinstance(loss, (bool, str, bytes)):
                return float(loss)
        except (TypeError, ValueError):
            pass
        raise TypeError(f"observe() takes a loss as a number or a tensor of 1 element, got {reprlib.repr(loss)}")
    if loss.numel() != 1:
        raise ValueError(
            f"observe() takes a loss of 1 element, got shape {tuple(loss.shape)}; give the mean over the micro-batch"
        )
    if loss.is_complex() or loss.dtype is torch.bool:
        raise TypeError(f"observe() takes a real loss, got a tensor of {loss.dtype}")
    loss = loss.detach()
    # Of a loss that is split over ranks each rank's own part would be read.
    return loss.full_tensor() if is_dtensor(loss) else loss


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _as_double(value: float | Tensor, device: torch.device) -> Tensor:
    """A number as a 0-d tensor on a device; a Python number is written there without synchronising."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, _wide(device))
    return torch.full((), value, dtype=_wide(device), device=device)


def _with_gradient(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(param, grad) for group in groups for param in group["params"] if (grad := param.grad) is not None]


def _is_dry(groups: Iterable[Mapping[str, Any]]) -> bool:
    return all(float(group["lr"]) == 0.0 for group in groups)


def _limited(group: Mapping[str, Any], ratio: float | Tensor) -> float | Tensor:
    """The group's learning rate from L / A; 0 if its lr is 0."""
    lr, guard, measured = group["lr"], group["rate_guard"], option(group, "rate_constant") * ratio
    if not isinstance(measured, Tensor):
        lr = float(lr)
        if math.isnan(measured):  # min and max would return lr and hide a NaN loss
            return measured if lr else 0.0
        return min(max(lr, measured / guard), guard * measured) if lr else 0.0
    if not isinstance(lr, Tensor):  # as a number: a copy to the device would synchronise
        return torch.minimum((measured / guard).clamp(min=lr), guard * measured) if lr else 0.0
    lr = lr.to(measured.device, measured.dtype).reshape(())
    return torch.where(lr == 0, lr, torch.minimum(torch.maximum(lr, measured / guard), guard * measured))


def _local_sum(grads: Sequence[tuple[Any, Any]], ranks: Ranks) -> float | Tensor:
    """This rank's share of sum|g|, in double precision; over all ranks, every element counts once."""
    tensors = [grad for _, grad in grads]
    if not all_plain(tensors) or any(map(Tensor.is_complex, tensors)):
        tensors = [_real(param, grad) for param, grad in grads]
    params = [param for param, _ in grads]
    holders, devices = ranks.holders_of_all(params), set(map(_device, tensors))
    if holders is not None and len(devices) == 1:
        return _sum_abs(tensors) / holders
    found: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
    for tensor, param in zip(tensors, params, strict=True):
        found[tensor.device, ranks.holders(param, ranks.world_size)].append(tensor)
    return _sum_on_device([_sum_abs(some) / count for (_, count), some in found.items()])


def _real(param: Any, grad: Any) -> Tensor:
    """This rank's part of a gradient, as real numbers."""
    grad = local_slot(param, grad)[1] if is_dtensor(param) else grad
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _sum_on_device(values: Sequence[float | Tensor]) -> float | Tensor:
    """The sum, on the device of the first tensor."""
    on_device = [value for value in values if isinstance(value, Tensor)]
    total = sum((value for value in values if not isinstance(value, Tensor)), start=0.0)
    return sum((value.to(on_device[0].device) for value in on_device), start=total)


def _sum_abs(tensors: list[Tensor]) -> float | Tensor:
    """The sum of the absolute values of tensors on one device, in double precision; a tensor on a GPU.

    torch's norm on the CPU accumulates in float32, with an error of 2 % at 16 million elements.
    """
    if tensors[0].device.type == "cpu":
        return fused_cpu.sum_abs(tensors)
    tensors = [tensor for tensor in tensors if tensor.numel()] or tensors[:1]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 1, dtype=dtype)
    return torch.stack(norms).to(_wide(tensors[0].device)).sum()
