"""A training process of a study, on a GPU or a share of the threads; it does not outlive its worker."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import IO, Any

from robust_dist.surroundings import usable_cores

# After this, a training process that does not end by itself is ended.
GRACE_SECONDS = 30.0
# A fork keeps none of its server's threads, so imports must not start any.
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


# A launcher's variables, which would make a run wait for ranks that never come.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class Launcher:
    """Starts training processes.

    Without GPUs they are forked from a server that has done the imports, which saves seconds a run; with GPUs each is a
    fresh process, because a fork inherits the driver's state.
    """

    def __init__(self, *, forks: bool) -> None:
        self._forks = forks
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(["robust_dist.study.preload"])

    def start(self, words: Sequence[str], env: Mapping[str, str], log: IO[bytes], claim: int) -> BaseProcess:
        """Start a training process.

        Args:
            words: The command line of `launch/train.py`.
            env: Its whole environment.
            log: Receives its output.
            claim: A descriptor that it keeps open.
        """
        before = dict(os.environ)
        passed = _Passed(log.fileno(), claim)
        process: BaseProcess = self._context.Process(target=_run, args=(list(words), dict(env), passed))
        try:
            # Libraries read these when they are loaded: in a fresh process, or in the server, which loads them for all.
            _set_environment({**env, **_NO_THREADS} if self._forks else env)
            process.start()
        finally:
            _set_environment(before)
        return process


class _Passed:
    """Descriptors for the started process, which receives them as numbers of its own."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _received, tuple(DupFd(descriptor) for descriptor in self.descriptors)


def _received(*passed: Any) -> list[int]:
    return [descriptor.detach() for descriptor in passed]


def _set_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _follow(worker: BaseProcess) -> None:
    """End this process when its worker has ended; by a signal first, so that it can save."""
    worker.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _run(words: list[str], env: Mapping[str, str], passed: list[int]) -> None:
    """The started process."""
    # Ctrl-C reaches the worker alone, which then ends its own in good order.
    os.setsid()
    _set_environment(env)
    log, _claim = passed
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    worker = multiprocessing.parent_process()
    threading.Thread(target=_follow, args=(worker,), daemon=True).start()
    from robust_dist.train.main import main

    try:
        main(words)
    finally:
        # multiprocessing skips exit handlers that others registered, such as trackers'.
        atexit._run_exitfuncs()


def gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    named = environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(index) for index in range(count)] if named is None else [n.strip() for n in named.split(",") if n]
    return found[:count]


def slot_environment(slot: int, num_slots: int, gpus: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the training process in a slot, counted from 0, of `num_slots`.

    GPUs are assigned in turn; more slots than GPUs share them. Without GPUs every slot has an equal share of the cores
    as threads, unless OMP_NUM_THREADS sets the number.
    """
    ours = {k: v for k, v in environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC_")}
    if gpus:
        return ours | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    share = str(max(1, int(usable_cores() / num_slots)))
    return ours | {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", share)}
