"""The parameters of a group that have gradients, and the batches of local tensors that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.optim.backend import Batch, Origin, Slot, batches, one_batch
from robust_dist.optim.state import all_plain, first_index, is_dtensor, local_columns, local_slot, traced_columns


def _local(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    """The same with the local tensors of DTensors."""
    one_of_each = {type(p): p for p in columns[0]}
    sharded = {kind: is_dtensor(p) for kind, p in one_of_each.items()}
    local = local_columns(*columns) if all(sharded.values()) else None
    if local is not None or not any(sharded.values()):
        return local or columns
    rows = (local_slot(*row) if sharded[type(row[0])] else row for row in zip(*columns, strict=True))
    return [list(column) for column in zip(*rows, strict=True)]


@dataclass
class Gathered:
    """Parameters with their gradients and state; the lists are parallel.

    Attributes:
        params: The parameters.
        grads: Their gradients.
        exp_avgs: State.
        exp_avg_sqs: State.
        steps: State.
        masters: State, the parameter itself where it has no master; empty without `master_weights`.
        places: Each parameter's place among all of the optimizer's; empty without `stochastic_rounding`.
        firsts: Beside `places` in a compiled step, what `first_index` says of them, which cannot be traced.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)

    def local(self) -> list[list[Tensor]]:
        """The local tensors: params, grads, exp_avgs, exp_avg_sqs, and masters if any."""
        columns = [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs]
        columns += [self.masters] if self.masters else []
        if all_plain(self.params):
            return columns
        return traced_columns(*columns) if torch.compiler.is_compiling() else _local(columns)

    def batches(self, steps: list[Tensor], counts: Sequence[float | None]) -> list[Batch]:
        """Batches of local tensors; `counts` are the step counts where the host may know them."""
        columns = self.local()
        if self.masters or self.places:
            return batches(self._slots(columns, steps), counts)
        alike = one_batch([*columns, steps], counts)
        return [alike] if alike is not None else batches(self._slots(columns, steps), counts)

    def _slots(self, columns: list[list[Tensor]], steps: list[Tensor]) -> list[Slot]:
        found: list[Slot] = []
        for index, (param, grad, exp_avg, exp_avg_sq, *rest) in enumerate(zip(*columns, strict=True)):
            master = rest[0] if rest and rest[0].dtype != param.dtype else None
            found.append((param, grad, exp_avg, exp_avg_sq, steps[index], master, self.origin(index)))
        return found

    def origin(self, index: int) -> Origin | None:
        """Where rounding.py's bits of a parameter come from; None where it is not rounded by chance."""
        if not self.places:
            return None
        return self.places[index], self.firsts[index] if self.firsts else first_index(self.params[index])
