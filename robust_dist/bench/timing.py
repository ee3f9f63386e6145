"""Fair timing: every contender takes its turn in every round, and medians are compared."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one contender.

    Attributes:
        median: Median over the rounds, in seconds.
        low: Fastest round, in seconds.
        high: Slowest round, in seconds.
    """

    median: float
    low: float
    high: float


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(call: Callable[[], object], repeats: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 7, min_seconds: float = 0.05
) -> dict[str, Timing]:
    """Time the contenders in turn, `rounds` times, so that a busy moment hits all of them.

    Args:
        contenders: Name to a call without arguments; each is warmed up once.
        rounds: How often each one is measured.
        min_seconds: A measurement repeats a call until it lasts about this long.

    Returns:
        Name to its timing, in seconds per call.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        repeats[name] = max(1, int(min_seconds / max(_seconds(call, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_seconds(call, repeats[name]))
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def machine() -> str:
    """One line that names the processor, the accelerator, the threads and torch's version."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"
