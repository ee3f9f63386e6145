"""Runs whose second rank fails at a chosen step, several at once, with separate output for each rank."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked import CONTEXT, ensure_server, set_environment
from tests.ranks import rank_environment
from tests.train.under_engines import environment

WORDS = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
WORDS += ["--batch_size", "32", "--epochs", "1", "--tracking.trackers", "[]"]
WORDS += ["--tracking.progress", "false", "--augment.trivial", "false"]
STEP = 3


def sleep_for_ever():
    while True:
        time.sleep(0.1)


def fail_alone():
    raise RuntimeError("a transistor is loose")


def full_disk(self):
    from robust_dist.ranks.talk import attempt

    def write():
        raise OSError(28, "No space left on device")

    attempt(write, here=self.accelerator.process_index == 1)


FAULTS = {
    "sleeps": sleep_for_ever,
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": fail_alone,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def _break(fault):
    """Make the second rank fail once it has done STEP steps; a full disk affects all ranks."""
    from robust_dist.train.loop import Trainer

    step = Trainer.train_step

    def broken(self, parts):
        if self.progress.step == STEP:
            if fault == "full disk":
                full_disk(self)
            elif self.accelerator.process_index == 1:
                FAULTS[fault]()
        step(self, parts)

    Trainer.train_step = broken


def print_into(path):
    """Redirect everything this process prints, also from C, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)


def _rank(rank, folder, fault, words, env):
    print_into(f"{folder}/out-{rank}")
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"{folder}/elastic-{rank}.json"}
    set_environment(env | own)
    # Accelerate imports DeepSpeed wherever it is installed, which takes longer than these runs.
    sys.modules["deepspeed"] = None
    from robust_dist.train.main import main

    _break(fault)
    main([*WORDS, *words, "--run_dir", f"{folder}/run"])


@dataclass
class Ending:
    """The end of a run.

    Attributes:
        folder: Where its files are.
        codes: Exit statuses in rank order, negative for signals; None if a rank stayed alive.
        outputs: What each rank printed.
    """

    folder: Path
    codes: list[int | None] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"


def run_faults(folder: Path, faults: dict[str, list[str]], world_size: int = 2, patience: float = 120.0):
    """Run one training per fault, all at once: name -> Ending."""
    ensure_server()
    running = {}
    for fault, words in faults.items():
        ending = Ending(folder / fault.replace(" ", "-"))
        ending.folder.mkdir()
        env = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | environment("cpu") | rank_environment(world_size)
        given = [(rank, str(ending.folder), fault, words, env) for rank in range(world_size)]
        ranks = [CONTEXT.Process(target=_rank, args=args, daemon=True) for args in given]
        for process in ranks:
            process.start()
        running[fault] = ending, ranks
    deadline = time.monotonic() + patience
    for fault, (ending, ranks) in running.items():
        for rank, process in enumerate(ranks):
            if fault != "stops" or rank != 1:
                process.join(max(0.0, deadline - time.monotonic()))
        ending.codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        ending.outputs = [(ending.folder / f"out-{rank}").read_text() for rank in range(world_size)]
    return {fault: ending for fault, (ending, _) in running.items()}
