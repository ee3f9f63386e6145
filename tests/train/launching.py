"""Runs of `launch/train.py` in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from robust_dist.train.measured import without_measured

ROOT = Path(__file__).parents[2]
# Small enough for a test: 12 optimizer steps an epoch.
TINY = ["--model.name", "resnet8", "--batch_size", "128", "--epochs", "3", "--optimizer.lr", "0.05"]
TINY += ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]


def command(world_size: int, *words: str) -> list[str]:
    train = [str(ROOT / "launch" / "train.py"), *TINY, *words]
    if world_size == 1:
        return [sys.executable, *train]
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(world_size)]
    return [sys.executable, *launch, *train]


def start(world_size: int, *words: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(world_size, *words), env=env, start_new_session=True, **pipe)


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def train(world_size: int, *words: str) -> tuple[int, str]:
    return finish(start(world_size, *words))


def kill_after(process: subprocess.Popen, run_dir: Path, step: int, timeout: float = 120) -> None:
    """SIGKILL every process of the run once the checkpoint of `step`, or a later one, is there."""
    deadline = time.monotonic() + timeout
    newest = 0
    while newest < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {timeout} s"
        time.sleep(0.005)
        names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
        newest = max((int(name.removeprefix("step-")) for name in names), default=0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def metrics(run_dir: Path) -> list[dict]:
    """The run's rows without the figures that are measured."""
    return [without_measured(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
