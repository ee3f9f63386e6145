"""`TensorLists`: the parallel lists of tensors that are passed from the param groups to a backend."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.optim.state import all_plain, is_dtensor, local_columns, local_slot, traced_columns

Origin = tuple[int, int]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, contiguous or channels_last."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def can_flatten(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors have no gaps in memory and the same order, so that they can be processed as flat arrays."""
    return is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


@dataclass
class TensorLists:
    """Parameters with their gradients and state; all lists are parallel.

    `RAdaBeliefW` collects the parameters of one group that have a gradient. `batches` splits them into what a backend's
    `step` accepts: real local tensors of one device, one combination of dtypes and one step count.

    Attributes:
        params: Parameters, updated in place.
        grads: Gradients as autograd left them (scaled, perhaps of another dtype); never written to.
        exp_avgs: First moments, bfloat16 or at least float32, updated in place.
        exp_avg_sqs: Second moments, at least float32, updated in place; the arithmetic uses their dtype.
        steps: 0-d float32 tensors that encode t of the current step (counting.py).
        step: In a batch, the t shared by all its tensors, on the host; None if it stays on the device.
        inverse_scale: In a batch, a 0-d factor that unscales the gradients, or None.
        found_inf: In a batch without `step`, a 0-d tensor; the step changes nothing where it is not 0. None for never.
            On the host such a step is skipped before it reaches a backend.
        masters: float32 masters of low-precision parameters; the parameter itself where it has none. The step updates
            the master and also writes the rounded parameter. Empty if no parameter has a master.
        origins: The inputs of rounding.py for each tensor: the position of its parameter in the optimizer, and the
            index of its first element. Empty if nothing is rounded stochastically.
        zs: Fast weights for averaging, in the dtype of the second moments, updated in place. Empty without averaging.
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
    origins: list[Origin] = field(default_factory=list)
    zs: list[Tensor] = field(default_factory=list)

    @property
    def columns(self) -> list[list[Tensor]]:
        """The lists that every backend uses: params, grads, exp_avgs, exp_avg_sqs, then masters and zs if any."""
        optional = [column for column in (self.masters, self.zs) if column]
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, *optional]

    def like(self, columns: Sequence[Sequence[Tensor]], origins: Sequence[Origin] = ()) -> "TensorLists":
        """The same scalars with other tensors, for backends that split a batch.

        Args:
            columns: The tensors, in the order of the property `columns`.
            origins: Their origins, if these lists have any.
        """
        params, grads, m, v, *rest = map(list, columns)
        # Not by `rest.pop`: to torch 2.6's compiler it is a tuple.
        masters = rest[0] if self.masters else []
        zs = rest[-1] if self.zs else []
        scalars = (self.step, self.inverse_scale, self.found_inf)
        return TensorLists(params, grads, m, v, [], *scalars, masters, list(origins) if self.origins else [], zs)

    def local(self) -> "TensorLists":
        """The same with the local tensors of DTensors."""
        if all_plain(self.params):
            return self
        columns = traced_columns(*self.columns) if torch.compiler.is_compiling() else _local(self.columns)
        found = self.like(columns, self.origins)
        found.steps = self.steps
        return found

    def batches(self, counts: Sequence[float | None]) -> "list[TensorLists]":
        """Split lists of local tensors into the batches that backends step.

        Args:
            counts: The step count of each parameter on the host, or None to leave it on the device.
        """
        if not self.params:
            return []
        if self._is_one_batch(counts):
            columns = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
            return [TensorLists(*columns, counts[0], origins=self.origins, zs=self.zs)]
        found: dict[tuple, list[int]] = {}
        for index, count in enumerate(counts):
            row = [column[index] for column in self.columns]
            dtypes = [tensor.dtype for tensor in row[:4]]
            # Not by `bool`, which torch 2.6's compiler does not know of lists.
            has_master = len(self.masters) > 0 and row[4].dtype != row[0].dtype
            found.setdefault((row[0].device, *dtypes, has_master, count), []).append(index)
        return [self._batch(indices, key[-2], key[-1]) for key, indices in found.items()]

    def _is_one_batch(self, counts: Sequence[float | None]) -> bool:
        """Whether the lists already form one batch of real tensors; cheaper than sorting them."""
        columns = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs)
        if self.masters or len(set(counts)) > 1 or any(len({t.dtype for t in column}) > 1 for column in columns):
            return False
        on_cpu = {t.is_cpu for t in self.params}
        return not self.params[0].is_complex() and (False not in on_cpu or len({t.device for t in self.params}) == 1)

    def _batch(self, indices: Sequence[int], has_masters: bool, count: float | None) -> "TensorLists":
        """The batch of some rows; complex tensors become real ones with a last dimension of 2."""
        columns = [[column[index] for index in indices] for column in self.columns]
        if columns[0][0].is_complex():
            columns = [[torch.view_as_real(t.resolve_conj()) for t in column] for column in columns]
        found = self.like(columns, [self.origins[index] for index in indices] if self.origins else ())
        found.steps, found.step = [self.steps[index] for index in indices], count
        if not has_masters:
            found.masters = []
        return found


def _local(columns: list[list[Tensor]]) -> list[list[Tensor]]:
    one_of_each = {type(p): p for p in columns[0]}
    sharded = {kind: is_dtensor(p) for kind, p in one_of_each.items()}
    local = local_columns(*columns) if all(sharded.values()) else None
    if local is not None or not any(sharded.values()):
        return local or columns
    rows = (local_slot(*row) if sharded[type(row[0])] else row for row in zip(*columns, strict=True))
    return [list(column) for column in zip(*rows, strict=True)]


def inverse(grad_scale: Tensor | None) -> Tensor | None:
    """The factor that unscales gradients: 0-d float32, or None."""
    return None if grad_scale is None else grad_scale.reshape(()).double().reciprocal().float()
