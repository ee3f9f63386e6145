"""Real gloo ranks for tests: `run_ranks(function, world_size, *args)`."""

import contextlib
import os
import pickle
import secrets
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forked import begin, ensure_server

# Seconds that a collective waits for the other ranks.
TIMEOUT = 60.0


def free_port() -> int:
    """A TCP port that was free a moment ago, below the ephemeral range."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", secrets.choice(range(15_000, 32_000))))
            return int(sock.getsockname()[1])


def rank_environment(world_size: int) -> dict[str, str]:
    """The environment shared by the ranks of one launch, apart from each one's rank."""
    world = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _rank_main(
    rank: int, env: dict[str, str], function: Callable[..., Any], timeout: float, out: str, args: tuple
) -> None:
    begin(env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        result: tuple[bool, Any] = (True, function(*args))
    except Exception:
        result = (False, traceback.format_exc())
    Path(out, f"{rank}.pkl").write_bytes(pickle.dumps(result))
    # torch 2.6 destroys a gloo group with the GIL held, and its worker may still need the GIL to drop a tensor.
    time.sleep(0.1)
    dist.destroy_process_group()


def _free_shared_memory(port: str) -> None:
    """Remove the buffers, 69 MB each, that DeepSpeed's CPU ranks leave behind."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Call a module-level `function(*args)` on every rank of a gloo group; returns its values in rank order.

    A rank's exception fails the caller with every failed rank's traceback. Many scenarios belong in one
    call: a launch costs seconds, a scenario inside it milliseconds.
    """
    ensure_server()
    with tempfile.TemporaryDirectory() as out:
        world = rank_environment(world_size)
        call = (dict(os.environ) | world, function, timeout, out, args)
        ranks = mp.start_processes(_rank_main, call, world_size, join=False, start_method="forkserver")
        try:
            while not ranks.join():
                pass
        finally:
            for process in ranks.processes:
                process.kill()
            _free_shared_memory(world["MASTER_PORT"])
        results = [pickle.loads(Path(out, f"{r}.pkl").read_bytes()) for r in range(world_size)]
    failed = [f"rank {r}:\n{value}" for r, (ok, value) in enumerate(results) if not ok]
    if failed:
        raise AssertionError("\n".join(failed))
    return [value for _, value in results]
