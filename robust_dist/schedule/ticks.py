"""Which calls of a scheduler's step() are copies of one optimizer step."""

import sys


def accelerate_processes() -> int:
    """Accelerate's number of processes; 1 where this program does not use it.

    Its AcceleratedScheduler calls `step()` that many times for one optimizer step, unless split_batches is set.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return 1
    return int(state.AcceleratorState().num_processes)
