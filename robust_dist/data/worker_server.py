"""Imported by multiprocessing's fork server alone, before it forks: what workers need is loaded once for all of them.

A scheduler may signal every process of a job, this one too, and its end would be the end of the workers.
"""

import os
import signal

from robust_dist.data import reading


def _ignore() -> dict[signal.Signals, object]:
    # Of SIGINT the server itself takes care.
    shielded = [number for number in reading.SHIELDED if number is not signal.SIGINT]
    return {number: signal.signal(number, signal.SIG_IGN) for number in shielded}


def _restore() -> None:
    """Processes that are forked for others than us get the signals as they were."""
    for number, handler in _before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


_before = _ignore()
os.register_at_fork(after_in_child=_restore)
