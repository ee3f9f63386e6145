"""The host's cost of a steady optimizer step, without launches: `robust-dist bench host`.

The file also runs by itself, so that it can time an older version of the package beside this one.
"""

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robust_dist.optim import RAdaBeliefW, fused_triton, state

TENSORS, TENSORS_IN_C = 161, 62  # of ResNet-50 and ResNet-18
LARGE_ELEMENTS = 1 << 24  # of a tensor whose step waits for the memory
GATHERING, STEP, IN_C = "torch's foreach gathering", "GPU step, launches left out", "CPU step in C"
GUARDED, LARGE, LARGE_GUARDED = f"{IN_C}, rate_guard=1", f"{IN_C}, large", f"{IN_C}, large, rate_guard=1"
COUNTS = {GATHERING: TENSORS, STEP: TENSORS, IN_C: TENSORS_IN_C, GUARDED: TENSORS_IN_C, LARGE: 1, LARGE_GUARDED: 1}
GUARDS = ((GUARDED, IN_C), (LARGE_GUARDED, LARGE))


def _parameters(count: int, size: int = 8) -> list[torch.Tensor]:
    """Parameters, by default so small that their arithmetic costs nothing."""
    params = [torch.zeros(size).requires_grad_() for _ in range(count)]
    for param in params:
        param.grad = torch.full((size,), 1e-3)  # without any, a measured rate is 0, and nothing is moved
    return params


def _microseconds(call: Callable[[], object], repeats: int = 200, rounds: int = 9) -> float:
    """Microseconds of this thread's own time per call, in the fastest round."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        found.append((time.thread_time() - start) / repeats)
    return min(found) * 1e6


def _stepping(count: int, size: int = 8, **settings: Any) -> Callable[[], object]:
    """A step with a changing rate, after the unrectified ones."""
    optimizer = RAdaBeliefW(_parameters(count, size), **settings)

    def step() -> None:
        optimizer.param_groups[0]["lr"] *= 0.9999
        if settings:
            optimizer.observe(1.0)
        optimizer.step()

    for _ in range(6):
        step()
    return step


def _gathering() -> Callable[[], object]:
    """The work of torch's foreach optimizers before their first kernel: sorting all tensors by device and dtype."""
    params = _parameters(TENSORS)
    columns = [params, [param.grad for param in params], *([torch.zeros_like(p) for p in params] for _ in range(2))]
    return lambda: torch.optim.Optimizer._group_tensors_by_device_and_dtype(columns)  # type: ignore[arg-type]


def _leave_out_launches() -> None:
    """Make the Triton backend take CPU tensors and launch nothing, for the rest of this process."""
    fused_triton.DEVICE_TYPES = frozenset({"cpu"})
    fused_triton.why_not = lambda device: None
    fused_triton._advance = fused_triton._step = lambda *arguments: None  # type: ignore[assignment]
    if hasattr(state, "_is_cpu"):  # of version 0.4, which looks for counts that lie on the CPU
        state._is_cpu = lambda tensor: False


def measure() -> dict[str, float]:
    """Microseconds of host time per step; the process cannot be used for anything else afterwards."""
    torch.set_num_threads(1)
    found = {GATHERING: _microseconds(_gathering()), IN_C: _microseconds(_stepping(TENSORS_IN_C))}
    if "rate_guard" in inspect.signature(RAdaBeliefW).parameters:  # from version 0.9 on
        found[GUARDED] = _microseconds(_stepping(TENSORS_IN_C, rate_guard=1.0))
        found[LARGE] = _microseconds(_stepping(1, LARGE_ELEMENTS), repeats=1)
        found[LARGE_GUARDED] = _microseconds(_stepping(1, LARGE_ELEMENTS, rate_guard=1.0), repeats=1)
    _leave_out_launches()
    return {**found, STEP: _microseconds(_stepping(TENSORS))}


def _measured_by(root: Path) -> dict[str, float]:
    """`measure` with the package in a folder, in a separate process."""
    code = Path(__file__).read_text(encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--beside {root}: its step cannot be timed: {done.stderr.strip().rpartition(chr(10))[2]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bench_host(*, rounds: int = 3, beside: str | None = None) -> str:
    """The host's time of a steady step as a Markdown table.

    Args:
        rounds: Turns of each version; the fastest counts.
        beside: A folder with another version's source, e.g. a checkout of an older one.

    Raises:
        ValueError: No version lies in `beside`, or its step cannot be timed.
    """
    roots = {"this version": Path(__file__).parents[2]}
    if beside is not None:
        if not Path(beside, "robust_dist", "optim").is_dir():
            raise ValueError(f"--beside must be a folder that holds robust_dist/optim, got {beside}")
        roots["beside"] = Path(beside).resolve()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for _ in range(rounds):
        for name, root in roots.items():
            runs[name].append(_measured_by(root))
    best = {name: {what: min(run[what] for run in of_it) for what in of_it[0]} for name, of_it in runs.items()}
    return _table(best)


def _table(best: dict[str, dict[str, float]]) -> str:
    from robust_dist.measure.table import table  # not in every version that this file may time

    ours, other = best["this version"], best.get("beside")
    rows = [
        [what, str(count), *(f"{found[what]:.1f}" if what in found else "-" for found in best.values())]
        for what, count in COUNTS.items()
    ]
    lines = [table(["microseconds of the host", "tensors", *best], rows), ""]
    lines += [f"{STEP}: {ours[STEP] / ours[GATHERING]:.2f} times {GATHERING}"]
    lines += [f"{one}: {ours[one] / ours[plain]:.2f} times {plain}" for one, plain in GUARDS if one in ours]
    if other is not None:
        ratios = ", ".join(f"{what} {ours[what] / other[what]:.2f}" for what in (STEP, IN_C))
        lines.append(f"this version's time over that of the one beside it: {ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure()))
