"""A schedule of your own: the share of the learning rate at each optimizer step after the warm-up.

robust-dist train --config quickstart --schedule.name own_schedule:flat_then_linear --run_dir runs/own_schedule
"""


def flat_then_linear(step: int, total_steps: int) -> float:
    """1 for two thirds of the run, then a line that would meet 0 one step after the last.

    Args:
        step: Optimizer steps done, from 0.
        total_steps: Those of the whole run.
    """
    return min(1.0, 3 * (total_steps - step) / total_steps)
