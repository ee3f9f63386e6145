"""Small studies for tests: their files, their runs, results without training."""

import os
import signal
import time
from pathlib import Path

import yaml

from robust_dist.study.folder import StudyFolder
from robust_dist.study.outcome import Result
from robust_dist.study.parse import load_study
from tests.forked import Forked, start_python

ROOT = Path(__file__).parents[2]
# Two optimizer steps of 512 digits.
TINY = {
    "base": str(ROOT / "configs" / "recipes" / "quickstart.yaml"),
    "set": {
        "batch_size": 512,
        "data.drop_last": True,
        "augment.trivial": False,
        "augment.cutmix": False,
        "augment.crop": 0,
        "checkpoint.every_steps": 1,
    },
    "budget": {"epochs": 1},
    "seeds": [0],
}


def write(path: Path, **keys) -> Path:
    path.write_text(yaml.safe_dump(TINY | keys, sort_keys=False))
    return path


def start(config: Path, folder: Path, *words: str) -> Forked:
    command = ["-m", "robust_dist.cli", "study", "run", config, "--dir", folder, *words]
    return start_python(*command, OMP_NUM_THREADS="1")


def kill(process: Forked) -> None:
    """Kill the command's own process, not its training processes."""
    os.kill(process.pid, signal.SIGKILL)
    # They hold its pipe until they have noticed.
    process.communicate(timeout=120)


def wait_until(condition, process: Forked, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def with_results(folder: Path, config: Path, accuracy) -> StudyFolder:
    """A study's folder with results as if trained: `accuracy(run)` is a share, "diverged" or None for missing."""
    study = load_study(config)[0]
    found = StudyFolder(folder)
    found.claim(study)
    for run in study.runs():
        value = accuracy(run)
        if value is not None:
            found.write_result(run, result(value))
    return found


def result(value) -> Result:
    diverged = "the training loss was no longer finite" if value == "diverged" else None
    return Result(
        accuracy=None if diverged else value,
        diverged=diverged,
        chance=0.1,
        epochs=1,
        steps=2,
        train_loss=1.0,
        eval_samples=359,
        images_per_second=100.0,
        recipe={"seed": 0},
        environment={"revision": "abc", "device": "cpu", "processor": "one", "threads_per_process": 1},
    )
