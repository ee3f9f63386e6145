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
        exp_avgs: First moments, float32 or better, updated in place.
        exp_avg_sqs: Second moments, float32 or better, updated in place.
        steps: 0-d float32 tensors, t of the step that is being done.
        step: That t on the host where all of the batch share it; None where it stays on the device.
        inverse_scale: 0-d factor that unscales the gradients, or None.
        found_inf: 0-d tensor, not 0 where nothing may change; None for never. Host-side batches are skipped
            before a backend sees them, so only batches without `step` carry it.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    step: float | None = None
    inverse_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def append(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> None:
        """Add one parameter; complex tensors join as real ones with a last dimension of 2."""
        if param.is_complex():
            param, grad, exp_avg, exp_avg_sq = (
                torch.view_as_real(t.resolve_conj()) for t in (param, grad, exp_avg, exp_avg_sq)
            )
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)
        self.steps.append(step)

    def like(self, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor]) -> "Batch":
        """The same scalars with other tensors, for backends that work piece by piece on the host's `step`."""
        return Batch(params, grads, m, v, [], self.step, self.inverse_scale, self.found_inf)


Backend = Callable[[Batch, Hyper], None]
Slot = tuple[Tensor, ...]


def one_batch(columns: Sequence[list[Tensor]], counts: Sequence[float | None]) -> Batch | None:
    """What `batches` would find where all of it is one batch of real tensors, at a fraction of its price; else None.

    Args:
        columns: Local params, grads, exp_avgs, exp_avg_sqs and steps; parallel, not empty.
        counts: As for `batches`.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = columns
    if len(set(counts)) > 1 or any(len({t.dtype for t in column}) > 1 for column in columns[:4]):
        return None
    if params[0].is_complex() or len({t.device for t in params}) > 1:
        return None
    return Batch(params, grads, exp_avgs, exp_avg_sqs, steps, counts[0])


def batches(slots: Iterable[Slot], counts: Iterable[float | None]) -> list[Batch]:
    """Sort (param, grad, exp_avg, exp_avg_sq, step) into batches of one device, dtype and step count.

    Args:
        slots: Local tensors.
        counts: For each, its step count on the host, or None to leave it on the device.
    """
    found: dict[tuple, Batch] = {}
    for slot, count in zip(slots, counts, strict=True):
        param, grad, exp_avg, exp_avg_sq, _ = slot
        key = (param.device, param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype, count)
        if key not in found:
            found[key] = Batch(step=count)
        found[key].append(*slot)
    return list(found.values())
