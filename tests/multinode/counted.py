"""`launch/train.py` that notes every optimizer step, for tests: `-m tests.multinode.counted SCRIPT ARGS...`.

Each rank appends "pid steps monotonic-seconds" to $COUNT_TO.RANK. So that a fault comes in the middle of a short run,
it rests $PACE seconds after each step, and while the file $REST_WHILE is there. With PRETEND_FSDP set, Accelerate's
FSDP runs on CPUs.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus


def count(path, pace, rest_while):
    """Note the steps of this process's optimizer from now on, and rest after each."""
    steps = 0

    def note(*_):
        nonlocal steps
        steps += 1
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {steps} {time.monotonic()}\n")
        time.sleep(pace)
        while rest_while.is_file():
            time.sleep(0.05)

    register_optimizer_step_post_hook(note)


def main():
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    if os.environ.get("PRETEND_FSDP"):
        pretend_fsdp_runs_on_cpus()
    path = f"{os.environ['COUNT_TO']}.{os.environ.get('RANK', '0')}"
    count(path, float(os.environ.get("PACE", "0")), Path(os.environ.get("REST_WHILE", "")))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
