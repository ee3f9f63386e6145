"""Imported only by multiprocessing's fork server, before it forks, so that workers' imports happen once.

A scheduler may signal every process of a job, including this one, whose end would end the workers.
"""

import os
import signal

from robust_dist.data import reading


def _ignore() -> dict[signal.Signals, object]:
    # The server itself handles SIGINT.
    shielded = [number for number in reading.SHIELDED if number is not signal.SIGINT]
    return {number: signal.signal(number, signal.SIG_IGN) for number in shielded}


def _restore() -> None:
    """Restore the signals in processes forked for others."""
    for number, handler in _before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


_before = _ignore()
os.register_at_fork(after_in_child=_restore)
