"""One pass over all tensors of a batch on the CPU, in C (native/fused.c): 28 bytes a float32 parameter, no temporary.

The library is built with the package where there is a C compiler with OpenMP. It is called through ctypes, so it
depends neither on Python's nor on torch's binary interface, and it releases the interpreter's lock.
"""

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from itertools import compress
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
    """The compiled library, or None where it was not built; `why_not` says why."""
    found = _load()
    return None if isinstance(found, str) else found


def why_not() -> str | None:
    """The reason why there is no compiled backend, or None if there is one."""
    found = _load()
    return found if isinstance(found, str) else None


def threads() -> int:
    """Threads of a step: torch's; of a launched rank its share of the cores where those are more, or a single one.

    Launchers leave each rank one thread, as Accelerate and torchrun do where OMP_NUM_THREADS is not set, or all of the
    host's: neither is right for ZeRO-Offload's step.
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


def instruction_set() -> str:
    """The widest instruction set that this processor has and the library uses."""
    return INSTRUCTION_SETS[library().robust_dist_widest()]


def is_flat(*row: Tensor) -> bool:
    """Whether the C pass can take a row as arrays: plain, element beside element in one order, not lazily negated."""
    if not all(type(t) in PLAIN for t in row) or any(t.is_neg() for t in row):
        return False
    return all(t.is_contiguous() for t in row) or can_flatten(row)


def _all_contiguous(batch: TensorLists) -> bool:
    """`is_flat` of the usual batch, a column at a time: a fifth of the price of asking row by row."""
    for column in batch.columns:
        if not (PLAIN.issuperset(map(type, column)) and all(map(Tensor.is_contiguous, column))):
            return False
    return not (any(map(Tensor.is_neg, batch.grads)) or any(map(Tensor.is_neg, batch.params)))


def _kinds(batch: TensorLists) -> tuple[int, int, int] | None:
    """Dtypes of parameters, gradients and exp_avgs as the C code numbers them; None where the pass has no such case."""
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
    """Step the batch in one pass; what the pass cannot take goes through foreach."""
    kinds = None if batch.step is None or batch.params[0].device.type != "cpu" else _kinds(batch)
    if kinds is None or batch.step is None:
        foreach(batch, h)
        return
    flat, rest = (batch, None) if _all_contiguous(batch) else _parted(batch)
    if flat.params:
        keys = host_keys(flat.origins, batch.step, h) if flat.origins else None
        call(flat, kinds, _scalars(batch, h, batch.step), keys=keys)
        # Autograd must notice what was written behind its back.
        increment_version(flat.params)
    if rest is not None:
        foreach(rest, h)


def _parted(batch: TensorLists) -> tuple[TensorLists, TensorLists | None]:
    """The rows that the pass can take, and those that it cannot."""
    flat = [is_flat(*row) for row in zip(*batch.columns, strict=True)]
    rest = [not taken for taken in flat]
    return _chosen(batch, flat), _chosen(batch, rest) if any(rest) else None


def _chosen(batch: TensorLists, which: Sequence[bool]) -> TensorLists:
    return batch.like([list(compress(column, which)) for column in batch.columns], list(compress(batch.origins, which)))


def _table(
    batch: TensorLists, kinds: tuple[int, int, int], keys: Sequence[int] | None
) -> tuple[_Tensors, dict[str, "array[int]"]]:
    """The C code's table of a batch, and the arrays that it points into, which must outlive it."""
    optional = [name for name, column in (("masters", batch.masters), ("zs", batch.zs)) if column]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", *optional)
    # Of lists, which have a length: an array that grows with an iterator takes a third longer.
    arrays = {
        name: array("q", list(map(Tensor.data_ptr, column))) for name, column in zip(names, batch.columns, strict=True)
    }
    arrays["numels"] = array("q", list(map(Tensor.numel, batch.params)))
    if keys is not None:
        arrays |= {"keys": array("q", keys), "firsts": array("q", [first for _, first in batch.origins])}
    pointers = {name: values.buffer_info()[0] for name, values in arrays.items()}
    return _Tensors(**pointers, **dict(zip(_KIND_NAMES, kinds, strict=True)), count=len(batch.params)), arrays


def sum_abs(tensors: Sequence[Tensor]) -> float:
    """The sum of the absolute values of tensors on the CPU, in double precision; the same at each number of threads."""
    native = library()
    in_c = [native is not None and t.dtype in _KINDS and is_flat(t) for t in tensors]
    total = sum(t.abs().sum(dtype=torch.float64).item() for t, taken in zip(tensors, in_c, strict=True) if not taken)
    by_kind: dict[int, list[Tensor]] = {}
    for tensor in compress(tensors, in_c):
        by_kind.setdefault(_KINDS[tensor.dtype], []).append(tensor)
    for kind, same in by_kind.items():
        where, numels = addresses(same), array("q", map(Tensor.numel, same))
        pointers = (values.buffer_info()[0] for values in (where, numels))
        total += native.robust_dist_sum_abs(*pointers, len(same), kind, threads(), native.robust_dist_widest())
    return total


class _Part:
    """A group that one call of the pass steps, with the table that the C code reads."""

    def __init__(self, batch: TensorLists, kinds: tuple[int, int, int], first: int) -> None:
        self.batch, self.rows = batch, slice(first, first + len(batch.params))
        self.table, self.arrays = _table(batch, kinds, [0] * len(batch.origins) if batch.origins else None)
        batch.grads = []  # they come anew at each step, and are not kept alive until then

    def step(self, grads: list[Tensor], h: Hyper, count: float) -> None:
        self.arrays["grads"][:] = addresses(grads[self.rows])
        if self.batch.origins:
            self.arrays["keys"][:] = array("q", host_keys(self.batch.origins, count, h))
        native = library()
        scalars = _scalars(self.batch, h, count)
        native.robust_dist_step(ctypes.byref(self.table), ctypes.byref(scalars), native.robust_dist_widest())
        increment_version(self.batch.params)


class _Prepared:
    """A step of groups that one call each steps."""

    def __init__(self, parts: list[_Part | None]) -> None:
        self.parts = parts

    def run(
        self,
        grads: list[Tensor],
        hypers: list[Hyper],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        counts: list[float],
    ) -> bool:
        """Step a batch; see backends.py."""
        scale = inverse(grad_scale)
        for part, h, count in zip(self.parts, hypers, counts, strict=True):
            if part is not None:
                part.batch.inverse_scale = scale
                part.step(grads, h, count)
        return True


def prepare(memory: dict[Any, Any], groups: list[tuple[TensorLists, Hyper]]) -> _Prepared | None:
    """The step that has just been done, where one call a group does it."""
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
    """Run the C pass over tensors that lie flat in memory.

    Args:
        batch: The tensors.
        kinds: From `_kinds`.
        scalars: The step's numbers.
        keys: From `host_keys`, to round stochastically; None rounds to the nearest.
        widest: Index into `INSTRUCTION_SETS`, at most this processor's; None takes that.
    """
    native = library()
    table, arrays = _table(batch, kinds, keys)
    isa = native.robust_dist_widest() if widest is None else widest
    native.robust_dist_step(ctypes.byref(table), ctypes.byref(scalars), isa)
    del arrays
