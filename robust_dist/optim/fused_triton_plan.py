"""Which tensors the Triton kernels step, in which launches: made anew only where the tensors have changed."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robust_dist.optim.backend import Origin, Slot
from robust_dist.optim.fused_triton_table import COLUMNS, HOST_COLUMNS, chunk_table, upload
from robust_dist.optim.gather import Gathered
from robust_dist.optim.layout import can_flatten
from robust_dist.optim.settings import Hyper
from robust_dist.optim.state import PLAIN

# How the kernels call what they read and write; uint16 stands for bfloat16's bits.
_TYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "uint16",
    torch.complex64: "float32",
    torch.complex128: "float64",
}
# Types of PARAM, GRAD, EXP_AVG and the arithmetic; whether there is a master; whether it rounds by chance.
Kinds = tuple[str, str, str, str, bool, bool]


@dataclass
class Rows:
    """The local tensors of several groups that have gradients, on one device; the lists are parallel.

    Attributes:
        params: Parameters.
        grads: Their gradients.
        exp_avgs: State.
        exp_avg_sqs: State.
        masters: State, the parameter itself where it has none.
        steps: State, on the device.
        members: Index of the group in `groups`.
        groups: What is stepped, and its settings.
        starts: Index of each group's first row.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    groups: list[tuple[Gathered, Hyper]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, gathered: Gathered, h: Hyper) -> None:
        """Add the parameters of one group."""
        params, grads, exp_avgs, exp_avg_sqs, *masters = gathered.local()
        self.starts.append(len(self.params))
        self.params += params
        self.grads += grads
        self.exp_avgs += exp_avgs
        self.exp_avg_sqs += exp_avg_sqs
        self.masters += masters[0] if masters else params
        self.steps += gathered.steps
        self.members += [len(self.groups)] * len(params)
        self.groups.append((gathered, h))

    def row(self, index: int) -> tuple[Tensor, ...]:
        """The tensors that are walked together."""
        columns = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.masters)
        return tuple(column[index] for column in columns)

    def slot(self, index: int) -> Slot:
        """A row as the other backends take it."""
        param, grad, exp_avg, exp_avg_sq, master = self.row(index)
        kept = None if master is param else master
        return param, grad, exp_avg, exp_avg_sq, self.steps[index], kept, self._origin(index)

    def _origin(self, index: int) -> Origin | None:
        """Where rounding.py's bits of a row come from; None where it is not rounded by chance."""
        group = self.members[index]
        return self.groups[group][0].origin(index - self.starts[group])

    def numel(self, index: int) -> int:
        """Elements of a parameter, as the kernels count them: a complex one is two."""
        param = self.params[index]
        return param.numel() * (2 if param.is_complex() else 1)

    def host_columns(self) -> list[list[int]]:
        """What the host writes into the table, in the order of its columns."""
        places = [self._origin(index) or (0, 0) for index in range(len(self.params))]
        tensors = (self.params, self.exp_avgs, self.exp_avg_sqs, self.masters, self.steps)
        return [
            *(list(map(Tensor.data_ptr, column)) for column in tensors),
            [self.numel(index) for index in range(len(self.params))],
            self.members,
            [place for place, _ in places],
            [first for _, first in places],
        ]

    def key(self) -> Hashable:
        """Changes where a `Plan` of these rows would be another one."""
        pointed = [self.params, self.exp_avgs, self.exp_avg_sqs, self.steps]
        pointed += [self.masters] if any(gathered.masters for gathered, _ in self.groups) else []
        return (
            *[tuple(map(Tensor.data_ptr, column)) for column in pointed],
            tuple(map(Tensor.numel, self.params)),
            tuple(self.members),
            tuple(h.stochastic_rounding for _, h in self.groups),
            self._gradients_key(),
        )

    def _gradients_key(self) -> Hashable:
        """The dtypes of the gradients, and where they do not simply lie in a row, how."""
        grads = self.grads
        dtypes = tuple([grad.dtype for grad in grads])
        lazy = any(map(Tensor.is_neg, grads)) or any(map(Tensor.is_conj, grads))
        if all(map(Tensor.is_contiguous, grads)) and not lazy:
            return dtypes, PLAIN.issuperset(map(type, grads))
        return dtypes, tuple((grad.stride(), grad.is_conj(), grad.is_neg(), type(grad)) for grad in grads)


@dataclass
class Launch:
    """One launch of the kernel `step`.

    Attributes:
        kinds: The types that it is compiled for.
        chunks: int64 [programs, 2], see fused_triton_table.py.
    """

    kinds: Kinds
    chunks: Tensor


@dataclass
class Plan:
    """How rows are stepped.

    Attributes:
        table: int64 [COLUMNS, rows].
        launches: One for each combination of dtypes.
        rest: Rows that only foreach can take.
        sent: For "grads" and "settings", the words that were sent last, and where they lie.
    """

    table: Tensor
    launches: list[Launch]
    rest: list[int]
    sent: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)


def _kinds(rows: Rows, index: int) -> Kinds | None:
    """The types that the kernel is compiled for; None where it cannot take the row."""
    row = rows.row(index)
    param, grad, exp_avg, exp_avg_sq, master = row
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
    stochastic = rows.groups[rows.members[index]][1].stochastic_rounding
    kept_low = exp_avg.dtype == torch.bfloat16 or (param.dtype == torch.bfloat16 and not has_master)
    types = [_TYPES[t.dtype] for t in (param, grad, exp_avg, exp_avg_sq)]
    return types[0], types[1], types[2], types[3], has_master, stochastic and kept_low


def plan(rows: Rows) -> Plan:
    """Sort rows into launches, and send the device what it must know of them."""
    device = rows.params[0].device
    columns = rows.host_columns()
    found: dict[Kinds, list[int]] = defaultdict(list)
    rest = []
    for index in range(len(rows.params)):
        kinds = _kinds(rows, index)
        if kinds is None:
            rest.append(index)
        elif rows.params[index].numel():
            found[kinds].append(index)
    table = torch.empty((COLUMNS, len(rows.params)), dtype=torch.int64, device=device)
    table[:HOST_COLUMNS] = upload([word for column in columns for word in column], device).view(HOST_COLUMNS, -1)
    launches = [Launch(kinds, _chunks(rows, members, device)) for kinds, members in found.items()]
    return Plan(table, launches, rest)


def _chunks(rows: Rows, members: Sequence[int], device: torch.device) -> Tensor:
    return chunk_table([rows.numel(index) for index in members], members, device)
