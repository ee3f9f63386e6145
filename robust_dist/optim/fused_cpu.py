"""One pass over all tensors of a batch on the CPU, in C (native/fused.c): 28 bytes a float32 parameter, no temporary.

The library is built with the package where there is a C compiler with OpenMP. It is called through ctypes, so it
depends neither on Python's nor on torch's binary interface, and it releases the interpreter's lock.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from robust_dist.optim.backend import Batch
from robust_dist.optim.coefficients import host_coefficients
from robust_dist.optim.foreach import can_flatten, foreach
from robust_dist.optim.settings import Hyper

INSTRUCTION_SETS = ("portable C", "AVX2", "AVX-512")
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_KEEP, _UNRECTIFIED, _RECTIFIED = range(3)
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class _Scalars(ctypes.Structure):
    """`scalars` of native/fused.c."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("rate", "beta2", "share", "added_eps", "grad_scale")),
        *((name, ctypes.c_double) for name in ("decay", "step_size", "inner", "outer")),
        *((name, ctypes.c_int32) for name in ("kind", "threads")),
    ]


class _Tensors(ctypes.Structure):
    """`tensors` of native/fused.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "numels")),
        ("count", ctypes.c_int64),
        ("param_kind", ctypes.c_int32),
        ("grad_kind", ctypes.c_int32),
    ]


@functools.cache
def library() -> Any:
    """The compiled library, or None where it was not built; `why_not` says why."""
    found = _load()
    return None if isinstance(found, str) else found


def why_not() -> str | None:
    """Why there is no compiled backend, or None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None


@functools.cache
def _load() -> Any:
    files = sorted(Path(__file__).parent.glob("_fused*.so"))
    if not files:
        return (
            "it was not built: the installation found no C compiler with OpenMP; install gcc and then the package again"
        )
    try:
        found = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return f"{files[0].name} cannot be loaded: {error}"
    found.robust_dist_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    found.robust_dist_step.restype = None
    return found


def instruction_set() -> str:
    """The widest instruction set that this processor has and the library uses."""
    return INSTRUCTION_SETS[library().robust_dist_widest()]


def is_flat(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether the C pass can take the four as arrays: plain tensors, element beside element in the same order."""
    row = (param, grad, exp_avg, exp_avg_sq)
    return all(type(t) in _PLAIN for t in row) and (all(t.is_contiguous() for t in row) or can_flatten(row))


def _all_contiguous(batch: Batch) -> bool:
    """`is_flat` of the usual batch, a column at a time: a fifth of the price of asking row by row."""
    columns = batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs
    return all(_PLAIN.issuperset(map(type, column)) and all(map(Tensor.is_contiguous, column)) for column in columns)


def _kinds(batch: Batch) -> tuple[int, int] | None:
    """The dtypes of parameters and gradients as the C code numbers them; None where the pass has no such case."""
    param, grad, state = batch.params[0].dtype, batch.grads[0].dtype, batch.exp_avgs[0].dtype
    wanted = torch.float64 if param is torch.float64 else torch.float32
    if state is not wanted or batch.exp_avg_sqs[0].dtype is not wanted or param not in _KINDS or grad not in _KINDS:
        return None
    if (param is torch.float64) != (grad is torch.float64):
        return None
    return _KINDS[param], _KINDS[grad]


def _scalars(batch: Batch, h: Hyper, step: float) -> _Scalars:
    lr = float(h.lr)
    c = host_coefficients(step, h, lr, float(h.weight_decay))
    scale = 1.0 if batch.inverse_scale is None else float(batch.inverse_scale)
    kind = _KEEP if lr == 0.0 else _RECTIFIED if c.rectified else _UNRECTIFIED
    share = (1.0 - h.beta2) * h.beta1 * h.beta1
    moments = (1.0 - h.beta1, h.beta2, share, h.added_eps, -scale if h.maximize else scale)
    return _Scalars(*moments, float(c.decay), float(c.step_size), c.inner, c.outer, kind, torch.get_num_threads())


def fused_cpu(batch: Batch, h: Hyper) -> None:
    """Step the batch in one pass; what the pass cannot take goes through foreach."""
    kinds = None if batch.step is None or batch.params[0].device.type != "cpu" else _kinds(batch)
    if kinds is None or batch.step is None:
        foreach(batch, h)
        return
    flat, rest = (batch, None) if _all_contiguous(batch) else _parted(batch)
    if flat.params:
        call(flat, kinds, _scalars(batch, h, batch.step))
        # Autograd must notice what was written behind its back.
        increment_version(flat.params)
    if rest is not None:
        foreach(rest, h)


def _parted(batch: Batch) -> tuple[Batch, Batch | None]:
    """The rows that the pass can take, and those that it cannot."""
    rows = list(zip(batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, strict=True))
    flat, rest = ([row for row in rows if is_flat(*row) == wanted] for wanted in (True, False))
    return _of_rows(batch, flat), _of_rows(batch, rest) if rest else None


def _of_rows(batch: Batch, rows: Sequence[tuple[Tensor, ...]]) -> Batch:
    return batch.like(*map(list, zip(*rows, strict=True))) if rows else batch.like([], [], [], [])


def call(batch: Batch, kinds: tuple[int, int], scalars: _Scalars, widest: int | None = None) -> None:
    """Run the C pass over tensors that lie flat in memory.

    Args:
        batch: The tensors.
        kinds: From `_kinds`.
        scalars: The step's numbers.
        widest: Index into `INSTRUCTION_SETS`, at most this processor's; None takes that.
    """
    native = library()
    columns = [
        array("q", map(Tensor.data_ptr, column))
        for column in (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs)
    ]
    columns.append(array("q", map(Tensor.numel, batch.params)))
    table = _Tensors(*(column.buffer_info()[0] for column in columns), len(batch.params), *kinds)
    isa = native.robust_dist_widest() if widest is None else widest
    native.robust_dist_step(ctypes.byref(table), ctypes.byref(scalars), isa)
