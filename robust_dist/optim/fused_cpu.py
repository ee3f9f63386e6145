"""One pass over all tensors of a batch on the CPU, in C (native/fused.c): 28 bytes per float32 parameter, no temporary.

The library is built with the package if there is a C compiler with OpenMP. It is called through ctypes, so it
depends on neither Python's nor torch's ABI, and it releases the GIL.
"""

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from robust_dist import extras
from robust_dist.optim.addresses import addresses
from robust_dist.optim.coefficients import host_coefficients
from robust_dist.optim.counting import count_of
from robust_dist.optim.foreach import foreach
from robust_dist.optim.rounding import host_keys
from robust_dist.optim.settings import Hyper
from robust_dist.optim.state import PLAIN
from robust_dist.optim.tensors import TensorLists, can_flatten, inverse
from robust_dist.surroundings import usable_cores

INSTRUCTION_SETS = ("portable C", "AVX2", "AVX-512")
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_KEEP, _UNRECTIFIED, _RECTIFIED = range(3)
_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_dtype = attrgetter("dtype")
_KIND_NAMES = ("param_kind", "grad_kind", "exp_avg_kind")


class _Scalars(ctypes.Structure):
    """`scalars` of native/fused.c."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("rate", "beta2", "share", "added_eps", "grad_scale")),
        *((name, ctypes.c_double) for name in ("decay", "step_size", "inner", "outer", "fade", "mix", "push")),
        *((name, ctypes.c_int32) for name in ("kind", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """`tensors` of native/fused.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "zs")),
        *((name, ctypes.c_void_p) for name in ("numels", "keys", "firsts")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _KIND_NAMES),
    ]


@functools.cache
def library() -> Any:
    """The compiled library, or None if there is none; `why_not` gives the reason."""
    found = _load()
    return None if isinstance(found, str) else found


def why_not() -> str | None:
    """The reason why there is no compiled library, or None if there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def threads() -> int:
    """The number of threads of a step: torch's, or in a launched rank its share of the cores if torch's does not fit.

    Launchers leave each rank one thread (Accelerate and torchrun without OMP_NUM_THREADS) or all of the host's;
    neither suits the step of ZeRO-Offload.
    """
    found = torch.get_num_threads()
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # launchers differ
    if ranks is None:
        return found
    share = _share(ranks)
    return found if 1 < found <= share else share


@functools.cache
def _share(ranks: str) -> int:
    return max(1, int(usable_cores()) // max(1, int(ranks) if ranks.isdecimal() else 1))


def _declare(found: Any) -> None:
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    found.robust_dist_step.argtypes = [pointer, pointer, ctypes.c_int]
    found.robust_dist_step.restype = None
    found.robust_dist_chunks.argtypes = [pointer, whole, ctypes.c_int]
    found.robust_dist_chunks.restype = whole
    found.robust_dist_chunk.argtypes = [pointer, whole, ctypes.c_int, whole, pointer]
    found.robust_dist_chunk.restype = None
    found.robust_dist_step_chunk.argtypes = [pointer, pointer, ctypes.c_int, whole, pointer]
    found.robust_dist_step_chunk.restype = None
    found.robust_dist_sum_abs.argtypes = [pointer, pointer, whole, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    found.robust_dist_sum_abs.restype = ctypes.c_double


@functools.cache
def _load() -> Any:
    return extras.load_library(Path(__file__).parent, _declare)


@functools.cache
def _widest() -> int:
    found: int = library().robust_dist_widest()
    return found


def instruction_set() -> str:
    """The widest instruction set that both this processor and the library support."""
    return INSTRUCTION_SETS[_widest()]


def is_flat(*row: Tensor) -> bool:
    """Whether the C pass can process a row as arrays: plain tensors without gaps or lazy negation, in one order."""
    if not all(type(t) in PLAIN for t in row) or any(t.is_neg() for t in row):
        return False
    return all(t.is_contiguous() for t in row) or can_flatten(row)


def _are_contiguous(column: Sequence[Tensor]) -> bool:
    """Whether `is_flat` holds for the common kind of column, except for lazy signs; five times as fast."""
    return PLAIN.issuperset(map(type, column)) and all(map(Tensor.is_contiguous, column))


def _all_contiguous(batch: TensorLists) -> bool:
    """Whether `is_flat` holds for all rows of the common kind of batch, checked a column at a time."""
    if not all(map(_are_contiguous, batch.columns)):
        return False
    return not (any(map(Tensor.is_neg, batch.grads)) or any(map(Tensor.is_neg, batch.params)))


def _kinds(batch: TensorLists) -> tuple[int, int, int] | None:
    """The C code's numbers for the dtypes of parameters, gradients and exp_avgs; None if it does not support them."""
    param, grad, m, v = (column[0].dtype for column in batch.columns[:4])
    if param is torch.float64:
        return (1, 1, 1) if grad is m is v is torch.float64 else None
    if param not in _KINDS or grad not in _HALVES or m not in (torch.float32, torch.bfloat16):
        return None
    if v is not torch.float32 or (batch.masters and batch.masters[0].dtype is not torch.float32):
        return None
    return _KINDS[param], _KINDS[grad], _KINDS[m]


def _scalars(batch: TensorLists, h: Hyper, step: float) -> _Scalars:
    lr = float(h.lr)
    c = host_coefficients(step, h, lr, float(h.weight_decay))
    scale = 1.0 if batch.inverse_scale is None else float(batch.inverse_scale)
    kind = _KEEP if lr == 0.0 else _RECTIFIED if c.rectified else _UNRECTIFIED
    share = (1.0 - h.beta2) * h.beta1 * h.beta1
    moments = (1.0 - h.beta1, h.beta2, share, h.added_eps, -scale if h.maximize else scale)
    moves = (float(c.decay), float(c.step_size), c.inner, c.outer, float(c.fade), c.mix, c.push)
    return _Scalars(*moments, *moves, kind, threads())


def fused_cpu(batch: TensorLists, h: Hyper) -> None:
    """Step the batch in one pass; rows that the pass does not support are stepped by foreach."""
    kinds = None if batch.step is None or batch.params[0].device.type != "cpu" else _kinds(batch)
    if kinds is None or batch.step is None:
        foreach(batch, h)
        return
    flat, rest = (batch, None) if _all_contiguous(batch) else _parted(batch)
    if flat.params:
        keys = host_keys(flat.origins, batch.step, h) if flat.origins else None
        call(flat, kinds, _scalars(batch, h, batch.step), keys=keys)
        # Tell autograd about the write.
        increment_version(flat.params)
    if rest is not None:
        foreach(rest, h)


def _parted(batch: TensorLists) -> tuple[TensorLists, TensorLists | None]:
    """The rows that the pass supports, and the others."""
    flat = [is_flat(*row) for row in zip(*batch.columns, strict=True)]
    rest = [not taken for taken in flat]
    return _chosen(batch, flat), _chosen(batch, rest) if any(rest) else None


def _chosen(batch: TensorLists, which: Sequence[bool]) -> TensorLists:
    return batch.like([list(compress(column, which)) for column in batch.columns], list(compress(batch.origins, which)))


def _table(
    batch: TensorLists, kinds: tuple[int, int, int], keys: Sequence[int] | None
) -> tuple[_Tensors, dict[str, "array[int]"]]:
    """The C code's table of a batch, and the arrays it points to, which must outlive it."""
    optional = [name for name, column in (("masters", batch.masters), ("zs", batch.zs)) if column]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", *optional)
    # From lists, whose length is known: an array grown from an iterator takes a third longer.
    arrays = {
        name: array("q", list(map(Tensor.data_ptr, column))) for name, column in zip(names, batch.columns, strict=True)
    }
    arrays["numels"] = array("q", list(map(Tensor.numel, batch.params)))
    if keys is not None:
        arrays |= {"keys": array("q", keys), "firsts": array("q", [first for _, first in batch.origins])}
    pointers = {name: values.buffer_info()[0] for name, values in arrays.items()}
    return _Tensors(**pointers, **dict(zip(_KIND_NAMES, kinds, strict=True)), count=len(batch.params)), arrays


def sum_abs(tensors: Sequence[Tensor]) -> float:
    """The sum of the absolute values of CPU tensors, in double precision; independent of the number of threads."""
    dtypes = dict.fromkeys(map(_dtype, tensors))
    if len(dtypes) == 1:
        return _sum_abs_of(next(iter(dtypes)), list(tensors))
    return sum(_sum_abs_of(dtype, [t for t in tensors if t.dtype == dtype]) for dtype in dtypes)


def _sum_abs_of(dtype: torch.dtype, tensors: list[Tensor]) -> float:
    in_c, rest = tensors, list[Tensor]()
    if library() is None or dtype not in _KINDS:
        in_c, rest = [], tensors
    elif not _are_contiguous(tensors) or any(map(Tensor.is_neg, tensors)):
        taken = list(map(is_flat, tensors))
        in_c, rest = list(compress(tensors, taken)), [t for t, flat in zip(tensors, taken, strict=True) if not flat]
    total = sum(tensor.abs().sum(dtype=torch.float64).item() for tensor in rest)
    if in_c:
        where, numels = addresses(in_c), array("q", list(map(Tensor.numel, in_c)))
        total += _call_sum_abs(where.buffer_info()[0], numels.buffer_info()[0], len(in_c), _KINDS[dtype])
    return total


def _call_sum_abs(where: int, numels: int, count: int, kind: int) -> float:
    found: float = library().robust_dist_sum_abs(where, numels, count, kind, threads(), _widest())
    return found


class _Part:
    """A group that is stepped by one call of the pass, with the table for the C code."""

    def __init__(self, batch: TensorLists, kinds: tuple[int, int, int], first: int) -> None:
        self.batch, self.rows = batch, slice(first, first + len(batch.params))
        self.table, self.arrays = _table(batch, kinds, [0] * len(batch.origins) if batch.origins else None)
        batch.grads = []  # do not keep them alive; each step gets new ones

    def point_to(self, grads: list[Tensor]) -> None:
        self.arrays["grads"][:] = addresses(grads[self.rows])

    def sum_abs(self) -> float:
        """The sum of the absolute values of the current gradients."""
        return _call_sum_abs(self.table.grads, self.table.numels, self.table.count, self.table.grad_kind)

    def step(self, h: Hyper, count: float) -> None:
        if self.batch.origins:
            self.arrays["keys"][:] = array("q", host_keys(self.batch.origins, count, h))
        scalars = _scalars(self.batch, h, count)
        library().robust_dist_step(ctypes.byref(self.table), ctypes.byref(scalars), _widest())
        increment_version(self.batch.params)


class _Prepared:
    """A step with one call per group."""

    def __init__(self, parts: list[_Part | None]) -> None:
        self.parts = parts
        self._pointed_to: list[Tensor] | None = None

    def _point_to(self, grads: list[Tensor]) -> None:
        if self._pointed_to is not grads:
            for part in filter(None, self.parts):
                part.point_to(grads)
        self._pointed_to = grads

    def sum_abs(self, grads: list[Tensor]) -> float:
        """The sum of the gradients' absolute values; see backends.py."""
        self._point_to(grads)
        return sum(part.sum_abs() for part in filter(None, self.parts))

    def run(
        self,
        grads: list[Tensor],
        hypers: list[Hyper],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        counts: list[float],
    ) -> bool:
        """Step all groups; see backends.py."""
        scale = inverse(grad_scale)
        self._point_to(grads)
        self._pointed_to = None  # do not keep them alive
        for part, h, count in zip(self.parts, hypers, counts, strict=True):
            if part is not None:
                part.batch.inverse_scale = scale
                part.step(h, count)
        return True


def prepare(memory: dict[Any, Any], groups: list[tuple[TensorLists, Hyper]]) -> _Prepared | None:
    """The step that has just been taken, if one call per group covers it; else None."""
    parts: list[_Part | None] = []
    first = 0
    for lists, _ in groups:
        found = lists.local().batches([count_of(step.item()) for step in lists.steps])
        kinds = _kinds(found[0]) if len(found) == 1 and found[0].params[0].is_cpu else None
        if found and (kinds is None or not _all_contiguous(found[0]) or lists.params[0].is_complex()):
            return None
        if not found or kinds is None:
            parts.append(None)
            continue
        parts.append(_Part(found[0], kinds, first))
        first += len(lists.params)
    return _Prepared(parts)


def call(
    batch: TensorLists,
    kinds: tuple[int, int, int],
    scalars: _Scalars,
    *,
    keys: Sequence[int] | None = None,
    widest: int | None = None,
) -> None:
    """Run the C pass over tensors that are flat in memory.

    Args:
        batch: The tensors.
        kinds: From `_kinds`.
        scalars: The step's scalars.
        keys: From `host_keys`, for stochastic rounding; None rounds to nearest.
        widest: Index into `INSTRUCTION_SETS`, at most the processor's; None uses the processor's.
    """
    native = library()
    table, arrays = _table(batch, kinds, keys)
    isa = native.robust_dist_widest() if widest is None else widest
    native.robust_dist_step(ctypes.byref(table), ctypes.byref(scalars), isa)
    del arrays
