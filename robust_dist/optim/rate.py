"""A learning rate that the run measures itself (`rate_guard`), in the norm of the gradients' absolute values.

At each step, with F the loss less the entropy of its targets, and g the gradient before it is clipped::

    A <- 0.9 A + 0.1 sum|g|,   L <- 0.9 L + 0.1 F,   e = c L / A
    eta = min(max(lr, e / k), k e)        k is `rate_guard`, c is `rate_constant`

e is Polyak's step in Adam's norm, where an update has about size 1 in each element. With k = 1 `lr` has no part.

Weights that grow shrink the gradients of scale-invariant layers, so that e grows, and with it the weights. Where the
loss does not fall (noise, hard augmentation) that runs away, so e may not exceed `BOUND` times its smallest value.

sum|g| is one number for the whole model, on whatever rank an element lies: see `Ranks`.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robust_dist.optim import fused_cpu
from robust_dist.optim.settings import MEASURED, option
from robust_dist.optim.state import is_dtensor, local_slot

MEMORY = 0.9
BOUND = 2.0


@dataclass(frozen=True)
class Ranks:
    """The ranks over which a rate is measured.

    Attributes:
        group: Those that train together; None for all.
        copies: How many of them hold the same elements of a parameter that is no DTensor; None where all do, as under
            DDP. 1 where each holds its own, as under FSDP1 and ZeRO.
    """

    group: Any = None
    copies: int | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def holders(self, param: Any, world_size: int) -> int:
        """How many ranks hold each element of a parameter."""
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


class Measured:
    """What an optimizer has measured of its run.

    Args:
        groups: Its param groups, which bring what was saved.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self.ranks = Ranks()
        self.restore(groups)

    def restore(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take up what the groups hold, and forget what was observed since."""
        guarded = [group for group in groups if option(group, "rate_guard") is not None]
        self._saved = [float(guarded[0][name]) for name in MEASURED] if guarded else [0.0] * len(MEASURED)
        self._values: Tensor | None = None  # float64 [3] on the gradients' device
        self._ratio: float | Tensor = 0.0  # L / A of the step that is being done
        self._stepped: set[int] = set()  # parameters that it has stepped: engines step group by group
        self.forget()

    def save(self, groups: Iterable[Any]) -> None:
        """Write what was measured into the groups, for their state dict; waits for the device."""
        values = self._saved if self._values is None else self._values.tolist()
        for group in groups:
            if option(group, "rate_guard") is not None:
                group.update(zip(MEASURED, values, strict=True))

    def forget(self) -> None:
        """Forget what was observed for the next step."""
        self._loss: Tensor | None = None
        self._parts = 0
        self._gradient: Tensor | None = None
        self._automatic_loss = self._automatic_gradient = False

    def forget_automatic(self) -> None:
        """Forget what an engine observed for a step that is not done."""
        if self._automatic_loss:
            self._loss, self._parts, self._automatic_loss = None, 0, False
        if self._automatic_gradient:
            self._gradient, self._automatic_gradient = None, False

    def observe(self, loss: float | Tensor, *, automatic: bool = False) -> None:
        """Add a micro-batch's loss to those of the next step, of which the mean counts; of automatic ones the sum."""
        if automatic and self._loss is not None and not self._automatic_loss:
            return
        if not automatic and self._automatic_loss:
            self._loss, self._parts = None, 0
        self._automatic_loss = automatic
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)
        if value.numel() != 1:
            raise ValueError(f"observe() takes a loss of 1 element, got shape {tuple(value.shape)}")
        value = value.reshape(()).to(_wide(value.device))
        self._loss = value if self._loss is None else self._loss + value
        self._parts = 1 if automatic else self._parts + 1

    def rate_of(self, group: Mapping[str, Any]) -> float:
        """The group's rate in the last step."""
        return float(_limited(group, self._ratio))

    def observe_gradients(
        self, groups: Iterable[Mapping[str, Any]], factor: float = 1.0, *, automatic: bool = False
    ) -> None:
        """Measure the gradients as they are now, times a factor; they may be clipped afterwards."""
        if automatic and self._gradient is not None:
            return
        if self._automatic_gradient:
            self._gradient = None
        self._automatic_gradient = automatic
        grads = [(param, grad) for group in groups for param in group["params"] if (grad := param.grad) is not None]
        self.add_gradients(grads, factor)

    def add_gradients(self, grads: Iterable[tuple[Any, Any]], factor: float | Tensor = 1.0) -> None:
        """Add to the sum of the next step.

        Args:
            grads: Parameters, each with its gradient.
            factor: What the sum is multiplied by, where gradients are scaled.
        """
        total = _local_sum(grads, self.ranks) * factor
        self._gradient = total if self._gradient is None else self._gradient + total.to(self._gradient.device)

    def rates(
        self, groups: Sequence[Mapping[str, Any]], inverse_scale: Tensor | None, found_inf: Tensor | None
    ) -> dict[int, float | Tensor]:
        """The rate of each guarded group, by its id; empty where none is measured, or where a step is dry.

        Raises:
            RuntimeError: No loss was observed for this step.
        """
        guarded = [group for group in groups if option(group, "rate_guard") is not None]
        params = {id(param) for group in groups for param in group["params"] if param.grad is not None}
        if self._loss is None and (not params or _is_dry(guarded)):
            return {}
        device = next((p.device for group in groups for p in group["params"] if p.grad is not None), None)
        if self._loss is not None:
            self._measure(groups, device, inverse_scale, found_inf)
            self._stepped = set()
        elif self._stepped & params or not self._stepped:
            raise RuntimeError(
                f"rate_guard={guarded[0]['rate_guard']!r} needs the loss of every step: call optimizer.observe(loss) "
                "before backward(), with the mean loss of the micro-batch, less the entropy of its targets"
            )
        self._stepped |= params
        return {id(group): _limited(group, self._ratio) for group in guarded}

    def _measure(
        self,
        groups: Sequence[Mapping[str, Any]],
        device: torch.device | None,
        inverse_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take this step's loss and gradients into the means."""
        assert self._loss is not None
        if self._gradient is None:
            self.observe_gradients(groups)
            if inverse_scale is not None and self._gradient is not None:
                self._gradient = self._gradient * inverse_scale.to(self._gradient.device)
        loss = self._loss / self._parts
        gradient = loss.new_zeros(()) if self._gradient is None else self._gradient
        self.forget()
        home = loss.device if device is None else device
        gradient, loss = self._over_ranks(gradient, loss)
        if home.type == "cpu":
            if found_inf is None or float(found_inf) == 0.0:
                self._advance_on_host(float(gradient), float(loss))
            return
        self._advance_on_device(gradient.to(home), loss.to(home), found_inf)

    def _over_ranks(self, gradient: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the gradients' shares and the mean loss, in one all-reduce of two numbers."""
        world_size = self.ranks.world_size
        if world_size == 1:
            return gradient, loss
        # Where the loss is: a backend for GPUs takes no tensor of the host, where an offloaded optimizer's are.
        both = torch.stack([gradient.to(loss.device, loss.dtype), loss / world_size])
        dist.all_reduce(both, group=self.ranks.group)
        return both[0], both[1]

    def _advance_on_host(self, gradient: float, loss: float) -> None:
        if self._values is None:
            self._values = torch.tensor(self._saved, dtype=torch.float64)
        mean_gradient, mean_loss, smallest = self._values.tolist()
        mean_gradient = MEMORY * mean_gradient + (1 - MEMORY) * gradient
        mean_loss = MEMORY * mean_loss + (1 - MEMORY) * loss
        ratio = max(mean_loss, 0.0) / mean_gradient if mean_gradient else 0.0
        smallest = min(smallest or ratio, ratio)
        self._values = torch.tensor([mean_gradient, mean_loss, smallest], dtype=torch.float64)
        self._ratio = min(ratio, BOUND * smallest)

    def _advance_on_device(self, gradient: Tensor, loss: Tensor, found_inf: Tensor | None) -> None:
        """The same without reading a value, in memory that a CUDA graph finds again."""
        dtype = _wide(gradient.device)
        if self._values is None or self._values.device != gradient.device:
            saved = self._saved if self._values is None else self._values.tolist()
            self._values = torch.tensor(saved, dtype=dtype).to(gradient.device)
        mean_gradient, mean_loss, smallest = self._values.unbind()
        mean_gradient = MEMORY * mean_gradient + (1 - MEMORY) * gradient
        mean_loss = MEMORY * mean_loss + (1 - MEMORY) * loss
        ratio = torch.where(mean_gradient == 0, 0.0, mean_loss.clamp(min=0) / mean_gradient)
        smallest = torch.where(smallest == 0, ratio, torch.minimum(smallest, ratio))
        new = torch.stack([mean_gradient, mean_loss, smallest])
        if found_inf is not None:
            new = torch.where(found_inf.reshape(()).to(new.device) == 0, new, self._values)
        self._values.copy_(new)
        self._ratio = torch.minimum(ratio, BOUND * smallest)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _is_dry(groups: Iterable[Mapping[str, Any]]) -> bool:
    return all(float(group["lr"]) == 0.0 for group in groups)


def _limited(group: Mapping[str, Any], ratio: float | Tensor) -> float | Tensor:
    """The group's rate from L / A; 0 where its own is 0."""
    lr, guard, measured = group["lr"], group["rate_guard"], option(group, "rate_constant") * ratio
    if not isinstance(measured, Tensor):
        lr = float(lr)
        return min(max(lr, measured / guard), guard * measured) if lr else 0.0
    lr = torch.as_tensor(lr, dtype=measured.dtype).to(measured.device).reshape(())
    return torch.where(lr == 0, lr, torch.minimum(torch.maximum(lr, measured / guard), guard * measured))


def _local_sum(grads: Iterable[tuple[Any, Any]], ranks: Ranks) -> Tensor:
    """This rank's share of sum|g|, 0-d and of double precision: over all ranks every element counts once."""
    found: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
    world_size = ranks.world_size
    for param, given in grads:
        holders = 1 if world_size == 1 else ranks.holders(param, world_size)
        grad = local_slot(param, given)[1] if is_dtensor(param) else given
        if grad.numel():
            found[grad.device, holders].append(torch.view_as_real(grad) if grad.is_complex() else grad)
    totals = [_sum_abs(tensors) / holders for (_, holders), tensors in found.items()]
    device = next(iter(found))[0] if found else torch.device("cpu")
    return torch.stack([total.to(device) for total in totals]).sum() if totals else torch.zeros((), dtype=torch.float64)


def _sum_abs(tensors: list[Tensor]) -> Tensor:
    """The sum of the absolute values of tensors of one device, 0-d and of double precision.

    torch's norm on the CPU adds float32 one by one, and is wrong by 2 % at 16 million elements.
    """
    if tensors[0].device.type == "cpu":
        return torch.tensor(fused_cpu.sum_abs(tensors), dtype=torch.float64)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 1, dtype=dtype)
    return torch.stack(norms).to(_wide(tensors[0].device)).sum()
