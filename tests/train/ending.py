"""Ranks of `launch/train.py`'s main that come to grief at a chosen step, several runs at once.

They are forked from a server that has imported everything, each with a terminal (files) and an environment of its own.
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.ranks import free_port

WORDS = ["--model.name", "resnet8", "--batch_size", "32", "--epochs", "1", "--tracking.trackers", "[]"]
WORDS += ["--tracking.progress", "false", "--augment.trivial", "false"]
STEP = 3


def sleep_for_ever():
    while True:
        time.sleep(0.1)


def fail_alone():
    raise RuntimeError("a transistor is loose")


def full_disk(self):
    from robust_dist.train.agree import attempt

    def write():
        raise OSError(28, "No space left on device")

    attempt(self.accelerator, write, here=self.accelerator.process_index == 1)


FAULTS = {
    "sleeps": sleep_for_ever,
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": fail_alone,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def _break(fault):
    """Let the first rank but one come to grief when it has done STEP steps; a full disk is told to all."""
    from robust_dist.train.loop import Trainer

    step = Trainer._train_step

    def broken(self, parts):
        if self.progress.step == STEP:
            if fault == "full disk":
                full_disk(self)
            elif self.accelerator.process_index == 1:
                FAULTS[fault]()
        step(self, parts)

    Trainer._train_step = broken


def _rank(rank, world_size, port, folder, fault, words):
    output = os.open(f"{folder}/out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in env.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.update(ACCELERATE_USE_CPU="true", TORCHELASTIC_ERROR_FILE=f"{folder}/elastic-{rank}.json")
    import torch

    from robust_dist.train.main import main

    torch.set_num_threads(1)
    _break(fault)
    main([*WORDS, *words, "--run_dir", f"{folder}/run"])


@dataclass
class Ending:
    """How a run ended.

    Attributes:
        folder: Where its files are.
        codes: Exit statuses in rank order; minus a signal's number; None where a rank lived on.
        outputs: What each rank printed.
        seconds: From the first fault to the last end.
    """

    folder: Path
    codes: list[int | None] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"


def run_faults(folder: Path, faults: dict[str, list[str]], world_size: int = 2, patience: float = 120.0):
    """Run one training a fault, all at once: name -> Ending."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["robust_dist.train.main", "sklearn.datasets", "torchvision"])
    running = {}
    for fault, words in faults.items():
        place = folder / fault.replace(" ", "-")
        place.mkdir()
        port = free_port()
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, str(place), fault, words))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        running[fault] = Ending(place), ranks
    deadline = time.monotonic() + patience
    for fault, (ending, ranks) in running.items():
        waited_for = ranks[:1] + ranks[2:] if fault == "stops" else ranks
        for process in waited_for:
            process.join(max(0.0, deadline - time.monotonic()))
        ending.codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        ending.outputs = [(ending.folder / f"out-{rank}").read_text() for rank in range(world_size)]
    return {fault: ending for fault, (ending, _) in running.items()}
