"""One pass over all tensors of a batch on the CPU, in C (native/fused.c): 28 bytes a float32 parameter, no temporary.

The library is built with the package where there is a C compiler with OpenMP. It is called through ctypes, so it
depends neither on Python's nor on torch's binary interface, and it releases the interpreter's lock.
"""

import ctypes
import functools
from array import array
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
_PLAIN = (Tensor, torch.nn.Parameter)


class _Scalars(ctypes.Structure):
    """`scalars` of native/fused.c."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("rate", "beta2", "share", "added_eps", "grad_scale")),
        *((name, ctypes.c_double) for name in ("decay", "step_size", "inner", "outer")),
        *((name, ctypes.c_int32) for name in ("kind", "threads")),
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
    found.robust_dist_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    found.robust_dist_step.restype = None
    return found


def instruction_set() -> str:
    """The widest instruction set that this processor has and the library uses."""
    return INSTRUCTION_SETS[library().robust_dist_widest()]


def is_flat(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether the C pass can take the four as arrays: plain tensors, element beside element in the same order."""
    row = (param, grad, exp_avg, exp_avg_sq)
    if any(type(t) not in _PLAIN for t in row):
        return False
    return all(t.is_contiguous() for t in row) or can_flatten(row)


def _kinds(batch: Batch) -> int | None:
    """The batch's dtypes as the C struct packs them, or None where the pass has no such case."""
    param, grad, state = batch.params[0].dtype, batch.grads[0].dtype, batch.exp_avgs[0].dtype
    wanted = torch.float64 if param is torch.float64 else torch.float32
    if state is not wanted or batch.exp_avg_sqs[0].dtype is not wanted or param not in _KINDS or grad not in _KINDS:
        return None
    if (param is torch.float64) != (grad is torch.float64):
        return None
    return _KINDS[param] | _KINDS[grad] << 32


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
    table, stepped, rest = array("q"), [], []
    for row in zip(batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, strict=True):
        if is_flat(*row):
            param, grad, exp_avg, exp_avg_sq = row
            pointers = param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()
            table.extend((*pointers, param.numel(), kinds))
            stepped.append(param)
        else:
            rest.append(row)
    if stepped:
        _call(table, len(stepped), _scalars(batch, h, batch.step))
        # Autograd must notice what was written behind its back.
        increment_version(stepped)
    if rest:
        foreach(batch.like(*map(list, zip(*rest, strict=True))), h)


def _call(table: "array[int]", count: int, scalars: _Scalars, widest: int | None = None) -> None:
    address, _ = table.buffer_info()
    native = library()
    native.robust_dist_step(
        address, count, ctypes.byref(scalars), native.robust_dist_widest() if widest is None else widest
    )
