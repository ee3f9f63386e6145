"""What a backend is: a function `backend(batch, hyper)` that steps lists of plain local tensors in place."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.optim.settings import Hyper


@dataclass
class Batch:
    """Parameters of one device, with their gradients and state; all lists are parallel.

    Attributes:
        params: Local real tensors of one dtype, updated in place.
        grads: Gradients as autograd left them (scaled, perhaps of another dtype); never written to.
        exp_avgs: First moments, float32 or better or bfloat16, updated in place.
        exp_avg_sqs: Second moments, float32 or better, updated in place; their dtype is that of the arithmetic.
        steps: 0-d float32 tensors that stand for t of the step that is being done (counting.py).
        step: That t on the host where all of the batch share it; None where it stays on the device.
        inverse_scale: 0-d factor that unscales the gradients, or None.
        found_inf: 0-d tensor, not 0 where nothing may change; None for never. Host-side batches are skipped
            before a backend sees them, so only batches without `step` carry it.
        masters: float32 masters of low-precision parameters: the step works on them and writes the rounded parameter,
            too. Parallel to `params`, or empty where there are none.
        origins: Where rounding.py's bits of each tensor come from: the place of its parameter in the optimizer, and
            the index of its first element. Parallel to `params`, or empty where nothing is rounded stochastically.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    step: float | None = None
    inverse_scale: Tensor | None = None
    found_inf: Tensor | None = None
    masters: list[Tensor] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)

    @property
    def columns(self) -> list[list[Tensor]]:
        """The lists of tensors that every backend walks: params, grads, exp_avgs, exp_avg_sqs, and masters if any."""
        found = [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs]
        return [*found, self.masters] if self.masters else found

    def append(self, slot: "Slot") -> None:
        """Add one parameter; complex tensors join as real ones with a last dimension of 2."""
        *tensors, step, master, origin = slot
        if tensors[0].is_complex():
            tensors = [torch.view_as_real(t.resolve_conj()) for t in tensors]
            master = None if master is None else torch.view_as_real(master)
        for column, tensor in zip(self.columns[:4], tensors, strict=True):
            column.append(tensor)
        self.steps.append(step)
        if master is not None:
            self.masters.append(master)
        if origin is not None:
            self.origins.append(origin)

    def like(self, columns: Sequence[Sequence[Tensor]], origins: Sequence[tuple[int, int]] = ()) -> "Batch":
        """The same scalars with other tensors, for backends that work piece by piece on the host's `step`.

        Args:
            columns: In the order of `columns`.
            origins: Of those tensors, where this batch has any.
        """
        params, grads, m, v, *rest = map(list, columns)
        masters = rest[0] if rest else []
        scalars = (self.step, self.inverse_scale, self.found_inf)
        return Batch(params, grads, m, v, [], *scalars, masters, list(origins) if self.origins else [])


Backend = Callable[[Batch, Hyper], None]
Origin = tuple[int, int]
# param, grad, exp_avg, exp_avg_sq, step, master if it has one, origin if it is rounded stochastically
Slot = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Origin | None]


def one_batch(columns: Sequence[list[Tensor]], counts: Sequence[float | None]) -> Batch | None:
    """What `batches` would find where all of it is one batch of real tensors, at a fraction of its price; else None.

    Args:
        columns: Local params, grads, exp_avgs, exp_avg_sqs and steps; parallel, not empty.
        counts: As for `batches`.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = columns
    if len(set(counts)) > 1 or any(len({t.dtype for t in column}) > 1 for column in columns[:4]):
        return None
    if params[0].is_complex() or (False in {t.is_cpu for t in params} and len({t.device for t in params}) > 1):
        return None
    return Batch(params, grads, exp_avgs, exp_avg_sqs, steps, counts[0])


def batches(slots: Iterable[Slot], counts: Iterable[float | None]) -> list[Batch]:
    """Sort parameters into batches of one device, one combination of dtypes, and one step count.

    Args:
        slots: Local tensors.
        counts: For each, its step count on the host, or None to leave it on the device.
    """
    found: dict[tuple, Batch] = {}
    for slot, count in zip(slots, counts, strict=True):
        param, grad, exp_avg, exp_avg_sq, _, master, _ = slot
        key = (param.device, param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype, master is None, count)
        if key not in found:
            found[key] = Batch(step=count)
        found[key].append(slot)
    return list(found.values())
