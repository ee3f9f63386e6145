"""A process in which Triton's interpreter runs the GPU's kernels on CPU tensors.

Triton decides at its first import whether it interprets, so this takes a process of its own.
"""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch


def _fused_multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding: float64 holds the product, and here the sum, of float32 values. The interpreter's own has two."""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return type(z)(exact.astype(z.data.dtype), z.dtype.scalar)


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_fma = _fused_multiply_add
    prepare_and_call = interpreter.InterpretedFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # The kernel has prepared the language for its own functions; doing it again for each call is half the time.
        ours = function.fn.__module__.startswith("robust_dist.")
        return function.rewrite()(*args, **kwargs) if ours else prepare_and_call(function, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _call(pickled: bytes) -> bytes:
    from robust_dist.augment import fused_triton

    function, arguments = pickle.loads(pickled)
    return pickle.dumps((getattr(fused_triton, function) if isinstance(function, str) else function)(*arguments))


class Interpreter:
    """Calls functions of `robust_dist.augment.fused_triton`, by name, and what can be pickled, there."""

    def __enter__(self) -> "Interpreter":
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self, function: Any, *arguments: Any) -> Any:
        return pickle.loads(self._pool.submit(_call, pickle.dumps((function, arguments))).result())
