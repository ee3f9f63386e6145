"""Processes that are forked from a server that has done the imports: a start takes milliseconds, not seconds.

The server is `multiprocessing`'s. It is started by the first process that is asked for, imports `tests.preload`, and
ends when nothing holds it any more. Each process gets the environment and the working directory of its caller.
"""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# No thread may be there when a process is forked, so no pool of OpenMP, OpenBLAS or, in torch 2.6, Inductor, and no
# helper of pyarrow's jemalloc.
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TORCH_WARM_POOL": "0",
}
_lock = threading.Lock()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        set_environment(before)


def set_environment(env: Mapping[str, str]) -> None:
    """Replace the whole environment of this process."""
    os.environ.clear()
    os.environ.update(env)


def begin(env: Mapping[str, str]) -> None:
    """Be in a forked process what a fresh one with this environment would be."""
    set_environment(env)
    # Python seeds its own generator anew in a fork, NumPy does not.
    np.random.seed()  # noqa: NPY002


def ensure_server() -> None:
    """Start the server where there is none; the code it imports is this repository's, whatever is installed."""
    with _lock:
        CONTEXT.set_forkserver_preload(["tests.preload"])
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with _environment(PYTHONPATH=path, **SERVER_ENV):
            forkserver.ensure_running()
