"""The plan of the Triton kernels' launches and their tensors, rebuilt only when the tensors change."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.optim.fused_triton_table import (
    AVERAGING_COLUMNS,
    COLUMNS,
    HOST_COLUMNS,
    Z,
    chunk_length,
    chunk_table,
    upload,
)
from robust_dist.optim.settings import Hyper
from robust_dist.optim.state import PLAIN
from robust_dist.optim.tensors import TensorLists, can_flatten

# The kernels' names of dtypes; uint16 represents the bits of bfloat16.
_TYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "uint16",
    torch.complex64: "float32",
    torch.complex128: "float64",
}
# Types of PARAM, GRAD, EXP_AVG and the arithmetic; whether there is a master, stochastic rounding, averaging.
Kinds = tuple[str, str, str, str, bool, bool, bool]


@dataclass
class Rows:
    """The local tensors with gradients of several groups, on one device.

    Attributes:
        tensors: The tensors of all groups; the parameter replaces a missing master or missing fast weights.
        members: The index of each tensor's group.
        hypers: The groups' settings.
    """

    tensors: TensorLists = field(default_factory=TensorLists)
    members: list[int] = field(default_factory=list)
    hypers: list[Hyper] = field(default_factory=list)

    def add(self, group: TensorLists, h: Hyper) -> None:
        """Add the parameters of one group."""
        found, all_ = group.local(), self.tensors
        all_.params += found.params
        all_.grads += found.grads
        all_.exp_avgs += found.exp_avgs
        all_.exp_avg_sqs += found.exp_avg_sqs
        all_.masters += found.masters or found.params
        all_.zs += found.zs or found.params
        all_.steps += found.steps
        all_.origins += found.origins or [(0, 0)] * len(found.params)
        self.members += [len(self.hypers)] * len(found.params)
        self.hypers.append(h)

    def row(self, index: int) -> tuple[Tensor, ...]:
        """The tensors of a row."""
        return tuple(column[index] for column in self.tensors.columns)

    def of_group(self, group: int, indices: Sequence[int]) -> TensorLists:
        """The given rows that belong to one group."""
        chosen = [index for index in indices if self.members[index] == group]
        origins = [self.tensors.origins[index] for index in chosen]
        found = self.tensors.like([[column[index] for index in chosen] for column in self.tensors.columns])
        found.steps = [self.tensors.steps[index] for index in chosen]
        found.origins = origins if self.hypers[group].stochastic_rounding else []
        found.zs = found.zs if self.hypers[group].averaging else []
        return found

    def numel(self, index: int) -> int:
        """Real elements of a parameter: a complex element counts as two."""
        param = self.tensors.params[index]
        return param.numel() * (2 if param.is_complex() else 1)

    def chunk_length(self) -> int:
        """Elements per program of the kernel `step` for these tensors."""
        return chunk_length(sum(map(self.numel, range(len(self.members)))))

    @property
    def averages(self) -> bool:
        """Whether a group uses averaging."""
        return any(h.averaging for h in self.hypers)

    @property
    def _pointed(self) -> tuple[list[Tensor], ...]:
        t = self.tensors
        return t.params, t.exp_avgs, t.exp_avg_sqs, t.masters, t.steps

    def host_columns(self) -> list[list[int]]:
        """The table's entries from the host, in the order of its columns."""
        t = self.tensors
        return [
            *(list(map(Tensor.data_ptr, column)) for column in self._pointed),
            [self.numel(index) for index in range(len(t.params))],
            self.members,
            [place for place, _ in t.origins],
            [first for _, first in t.origins],
            [self.chunk_length()] * len(t.params),
        ]

    def key(self) -> Hashable:
        """A key that changes whenever these rows need another `Plan`."""
        t = self.tensors
        return (
            *[tuple(map(Tensor.data_ptr, column)) for column in self._pointed],
            *[tuple([tensor.dtype for tensor in column]) for column in (t.params, t.exp_avgs, t.masters)],
            tuple(map(Tensor.numel, t.params)),
            tuple(self.members),
            tuple(t.origins),
            tuple(map(Tensor.data_ptr, t.zs)) if self.averages else (),
            tuple((h.stochastic_rounding, h.averaging) for h in self.hypers),
            self._gradients_key(),
        )

    def _gradients_key(self) -> Hashable:
        """The dtypes of the gradients, and their layouts unless all are contiguous."""
        grads = self.tensors.grads
        dtypes = tuple([grad.dtype for grad in grads])
        lazy = any(map(Tensor.is_neg, grads)) or any(map(Tensor.is_conj, grads))
        if all(map(Tensor.is_contiguous, grads)) and not lazy:
            return dtypes, PLAIN.issuperset(map(type, grads))
        return dtypes, tuple((grad.stride(), grad.is_conj(), grad.is_neg(), type(grad)) for grad in grads)


@dataclass
class Launch:
    """One launch of the kernel `step`.

    Attributes:
        kinds: The types for which it is compiled.
        chunks: int64 [programs, 2], see fused_triton_table.py.
    """

    kinds: Kinds
    chunks: Tensor


@dataclass
class Plan:
    """How to step a set of rows.

    Attributes:
        table: int64 [COLUMNS, rows]; [AVERAGING_COLUMNS, rows] if a group uses averaging.
        launches: One for each combination of dtypes.
        rest: Rows that only foreach supports.
        sent: For "grads" and "settings", the words that were sent last, on the host and on the device.
    """

    table: Tensor
    launches: list[Launch]
    rest: list[int]
    sent: dict[str, tuple[Sequence[int], Tensor]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of tensors."""
        return self.table.shape[1]


def _kinds(rows: Rows, index: int) -> Kinds | None:
    """The types for which the kernel is compiled; None if it does not support the row."""
    row = rows.row(index)
    param, grad, exp_avg, exp_avg_sq, master, z = row
    lies_flat = all(t.is_contiguous() for t in row) or can_flatten(row)
    if not (PLAIN.issuperset(map(type, row)) and lies_flat and len({t.device for t in row}) == 1):
        return None
    if any(t.dtype not in _TYPES or t.is_complex() != param.is_complex() for t in row):
        return None
    if any(t.is_conj() or t.is_neg() for t in row):
        return None
    has_master = master is not param
    if exp_avg_sq.element_size() < 4 or (has_master and master.dtype != exp_avg_sq.dtype):
        return None
    h = rows.hypers[rows.members[index]]
    if h.averaging and z.dtype != exp_avg_sq.dtype:
        return None
    kept_low = exp_avg.dtype == torch.bfloat16 or (param.dtype == torch.bfloat16 and not has_master)
    types = [_TYPES[t.dtype] for t in (param, grad, exp_avg, exp_avg_sq)]
    return types[0], types[1], types[2], types[3], has_master, h.stochastic_rounding and kept_low, h.averaging


def plan(rows: Rows) -> Plan:
    """Sort rows into launches, and send their table to the device."""
    params = rows.tensors.params
    device = params[0].device
    columns = rows.host_columns()
    found: dict[Kinds, list[int]] = defaultdict(list)
    rest = []
    for index in range(len(params)):
        kinds = _kinds(rows, index)
        if kinds is None:
            rest.append(index)
        elif params[index].numel():
            found[kinds].append(index)
    size = AVERAGING_COLUMNS if rows.averages else COLUMNS
    table = torch.empty((size, len(params)), dtype=torch.int64, device=device)
    table[:HOST_COLUMNS] = upload([word for column in columns for word in column], device).view(HOST_COLUMNS, -1)
    if rows.averages:
        table[Z] = upload(list(map(Tensor.data_ptr, rows.tensors.zs)), device)
    launches = [Launch(kinds, _chunks(rows, members, device)) for kinds, members in found.items()]
    return Plan(table, launches, rest)


def _chunks(rows: Rows, members: Sequence[int], device: torch.device) -> Tensor:
    return chunk_table([rows.numel(index) for index in members], members, device, rows.chunk_length())
