"""Runs of `launch/train.py`, started as by a user, in separate processes."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from robust_dist.train.metrics import without_measured
from tests.forked import ROOT, Forked, finish, start_python

SCRIPT = str(ROOT / "launch" / "train.py")
# Small enough for a test: 12 optimizer steps per epoch.
TINY = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
TINY += ["--batch_size", "128", "--epochs", "3", "--optimizer.lr", "0.05"]
TINY += ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]


def command(world_size: int, *words: str) -> list[str]:
    """What a user types after `python`."""
    train = [SCRIPT, *TINY, *words]
    if world_size == 1:
        return train
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(world_size)]
    return [*launch, *train]


def start(world_size: int, *words: str) -> Forked:
    """The command in its own process group."""
    return start_python(*command(world_size, *words), OMP_NUM_THREADS="1")


def train(world_size: int, *words: str) -> tuple[int, str]:
    return finish(start(world_size, *words))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_step(process: Forked, run_dir: Path, step: int, timeout: float = 120) -> None:
    """Wait until the checkpoint of `step`, or a later one, exists."""
    deadline = time.monotonic() + timeout
    while newest_step(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {timeout} s"
        time.sleep(0.005)


def ranks_of(process: Forked) -> list[int]:
    """The pids of the run's ranks: the launcher's children, or the process if it is the only rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children] or [process.pid]


def kill_after(process: Forked, run_dir: Path, step: int, timeout: float = 120) -> None:
    """SIGKILL every process of the run once the checkpoint of `step`, or a later one, exists."""
    wait_for_step(process, run_dir, step, timeout)
    # A launcher's ranks are in sessions of their own, and would continue training without it.
    ranks = ranks_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    process.communicate()


def metrics(run_dir: Path) -> list[dict]:
    """The run's rows without measured figures."""
    return [without_measured(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
