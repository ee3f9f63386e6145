"""The optimizer step's time compared with the peers and the memory's speed: `robust-dist bench optimizer`."""

import contextlib
import gc
import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from robust_dist.bench.parameter_sets import SETS, parameters
from robust_dist.bench.timing import (
    Bar,
    Panel,
    Result,
    Timing,
    interleaved,
    machine,
    pick_device,
    reason,
    thread_count,
    write,
)
from robust_dist.measure.memory import free_memory, peak_extra_bytes
from robust_dist.measure.table import table
from robust_dist.optim import RAdaBeliefW
from robust_dist.surroundings import extension_folder, extension_source, locks_outlive_builds, stale_locks
from robust_dist.validate import whole_number

OURS = "RAdaBeliefW"
ADAMW_FUSED = "torch AdamW fused"

BYTES_PER_PARAMETER = 28  # float32: read p, g, m, v and write p, m, v
TRIAD = "a += 0.5 b (the memory's speed)"
COPY = "b = a (the memory's speed)"
# Bytes of each of the limit's two arrays: far beyond any cache; a large set's bytes are moved in several passes.
LIMIT_ELEMENTS = 50_000_000
STATE_BYTES = 8  # a parameter, float32
SHARE_OF_MEMORY = 0.8
WARMUP = 4  # with the two calls before the first round, beyond the unrectified steps

Maker = Callable[[list[Tensor]], Optimizer]


def _named(module: str, name: str, **settings: Any) -> Maker:
    """An optimizer of another package, which may print while it is imported, built or made."""

    def make(params: list[Tensor]) -> Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            found = getattr(importlib.import_module(module), name)
            return found(params, lr=1e-2, eps=1e-8, weight_decay=1e-2, **settings)

    return make


def _deepspeed(name: str, **settings: Any) -> Maker:
    """DeepSpeed builds its step at the first use, with a C++ compiler (FusedAdam: CUDA's)."""
    make = _named("deepspeed.ops.adam", name, **settings)

    def guarded(params: list[Tensor]) -> Optimizer:
        locks = stale_locks(extension_folder(os.environ)) if locks_outlive_builds(extension_source()) else ()
        for lock in locks:
            raise RuntimeError(lock.detail)
        return make(params)

    return guarded


def makers(device: torch.device) -> dict[str, Maker]:
    """Contenders by name: functions that make an optimizer of parameters on the device, or raise if they cannot."""
    on_gpu = device.type == "cuda"
    on_host = {"DeepSpeedCPUAdam": _deepspeed("DeepSpeedCPUAdam", adamw_mode=True)}
    deepspeed = {"DeepSpeed FusedAdam": _deepspeed("FusedAdam", adam_w_mode=True)} if on_gpu else on_host
    radam = partial(torch.optim.RAdam, foreach=True, weight_decay=1e-2, decoupled_weight_decay=True)
    return {
        f"{OURS} {'triton' if on_gpu else 'fused'}": partial(RAdaBeliefW, fused=True),
        f"{OURS} foreach": partial(RAdaBeliefW, foreach=True),
        f"{OURS} single": partial(RAdaBeliefW, foreach=False),
        ADAMW_FUSED: partial(torch.optim.AdamW, fused=True),
        "torch AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        "torch RAdam foreach": radam,
        **deepspeed,
        "timm AdaBelief": _named("timm.optim", "AdaBelief", rectify=False),
        "timm RAdaBelief": _named("timm.optim", "AdaBelief", rectify=True),
        "pytorch_optimizer AdaBelief": _named("pytorch_optimizer", "AdaBelief", rectify=False),
        "pytorch_optimizer RAdaBelief": _named("pytorch_optimizer", "AdaBelief", rectify=True),
        "adabelief-pytorch": _named("adabelief_pytorch", "AdaBelief", print_change_log=False),
    }


@dataclass(frozen=True)
class Row:
    """One optimizer on one set of parameters.

    Attributes:
        parameters: Name of the set.
        tensors: Number of tensors in it.
        elements: Number of parameters in it.
        optimizer: Name of the contender.
        timing: Seconds per step.
        to_adamw_fused: Its median divided by that of torch's fused AdamW.
        bandwidth: Bytes per second, if it moved `BYTES_PER_PARAMETER`.
        of_limit: The median of the limit, which moves as many bytes, divided by its own.
        extra: Peak bytes that a step allocates and frees, per parameter; None if it cannot be measured.
    """

    parameters: str
    tensors: int
    elements: int
    optimizer: str
    timing: Timing
    to_adamw_fused: float
    bandwidth: float
    of_limit: float
    extra: float | None


def _limit(elements: int, device: torch.device) -> tuple[str, Callable[[], object]]:
    """A pass over as many bytes as an ideal step: a device-to-device copy on a GPU, an in-place triad on the CPU."""
    on_gpu = device.type == "cuda"
    size = elements * BYTES_PER_PARAMETER // (8 if on_gpu else 12)
    parts = -(-size // LIMIT_ELEMENTS)
    # in place, like an optimizer: a third array's cache lines would be read before they are written
    a, b = torch.zeros(size // parts, device=device), torch.ones(size // parts, device=device)

    def move() -> None:
        for _ in range(parts):
            if on_gpu:
                a.copy_(b)
            else:
                a.add_(b, alpha=0.5)

    return (COPY if on_gpu else TRIAD), move


def _groups(names: Sequence[str], elements: int, device: torch.device) -> list[list[str]]:
    """Contenders in groups whose states fit into the memory, each with the yardstick."""
    others = [name for name in names if name != ADAMW_FUSED]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is None:
        return [list(names)]
    # Besides the states: two float32 temporaries of foreach, and the limit's arrays.
    room = free * SHARE_OF_MEMORY - 8 * (elements + LIMIT_ELEMENTS)
    size = max(1, int(room // (STATE_BYTES * elements)) - 1)
    cuts = [others[i : i + size] for i in range(0, len(others), size)]
    return [[name for name in names if name in (*cut, ADAMW_FUSED)] for cut in cuts]


def _set_rows(name: str, rounds: int, device: torch.device, left_out: dict[str, str]) -> list[Row]:
    # All step the same parameters, so that only their states fill the memory.
    params = parameters(SETS[name](), device)
    known = makers(device)
    rows: list[Row] = []
    present = [optimizer for optimizer in known if optimizer not in left_out]
    for group in _groups(present, sum(param.numel() for param in params), device):
        found = _group_rows(name, params, {optimizer: known[optimizer] for optimizer in group}, rounds, left_out)
        timed = {row.optimizer for row in rows}
        rows += [row for row in found if row.optimizer not in timed]
        gc.collect()
    order = {optimizer: place for place, optimizer in enumerate((TRIAD, COPY, *known))}
    return sorted(rows, key=lambda row: order[row.optimizer])


def _group_rows(
    name: str, params: list[Tensor], group: dict[str, Maker], rounds: int, left_out: dict[str, str]
) -> list[Row]:
    elements, device = sum(param.numel() for param in params), params[0].device
    limit, move = _limit(elements, device)
    steps: dict[str, Callable[[], object]] = {limit: move}
    for optimizer, make in group.items():
        try:
            steps[optimizer] = make(params).step
        except Exception as error:
            left_out[optimizer] = reason(error)
    failures: dict[str, str] = {}
    times = interleaved(steps, rounds=rounds, warmup=WARMUP, device=device, failures=failures)
    left_out.update({f"{optimizer} on {name}": why for optimizer, why in failures.items()})
    rows = []
    for optimizer, timing in times.items():
        speed = BYTES_PER_PARAMETER * elements / timing.median
        ratios = timing.median / times[ADAMW_FUSED].median, speed, times[limit].median / timing.median
        # The lesser of two, as glibc sometimes grows its heap.
        taken = [peak_extra_bytes(steps[optimizer], device) for _ in range(2)]
        extra = min((number for number in taken if number is not None), default=None)
        each = None if extra is None else extra / elements
        rows.append(Row(name, len(params), elements, optimizer, timing, *ratios, each))
    return rows


def run(
    *, sets: Sequence[str] = tuple(SETS), rounds: int = 7, threads: int | None = None, device: str | None = None
) -> Result[Row]:
    """Times of a step of every installed optimizer, all in turn in every round.

    If the memory does not hold the states of all, they are timed in groups, each beside the limit and torch's AdamW
    fused, to which its ratios are.

    Args:
        sets: Keys of `SETS`.
        rounds: Measurements of each optimizer.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.

    Raises:
        ValueError: An unknown set or device, or rounds or threads below 1.
    """
    if not sets or any(name not in SETS for name in sets):
        raise ValueError(f"sets must name some of {tuple(SETS)}, got {tuple(sets)}")
    whole_number("rounds", rounds, 1)
    where = pick_device(device)
    with thread_count(threads):
        result: Result[Row] = Result([], {}, f"{machine()}; medians of {rounds} rounds, contenders in turn")
        for name in sets:
            result.rows.extend(_set_rows(name, rounds, where, result.left_out))
    return result


def _cells(row: Row) -> Iterator[str]:
    time = row.timing
    yield from (row.parameters, row.optimizer, f"{time.median * 1e3:.3f}")
    yield f"{time.low * 1e3:.3f} to {time.high * 1e3:.3f}"
    yield from (f"{row.bandwidth / 1e9:.1f}", f"{row.of_limit:.0%}", f"{row.to_adamw_fused:.2f}")
    if time.host is not None:
        yield f"{time.host * 1e6:.0f}"
    yield "" if row.extra is None else f"{row.extra:.1f}"


def report(result: Result[Row]) -> str:
    """The rows as Markdown, with the machine and what was left out."""
    rows = result.rows
    on_gpu = any(row.timing.host is not None for row in rows)
    sizes = {row.parameters: f"{row.tensors} tensors, {row.elements:,} parameters" for row in rows}
    lines = [result.about, "", *(f"- {name}: {size}" for name, size in sizes.items())]
    lines += [f"- left out: {name}: {why}" for name, why in result.left_out.items()]
    head = ["parameters", "optimizer", "ms", "lowest to highest", "GB/s", "of the memory's speed", "/ AdamW fused"]
    head += (["host us"] if on_gpu else []) + ["extra bytes a parameter"]
    lines += ["", f"GB/s are of {BYTES_PER_PARAMETER} bytes a parameter and step, which an ideal step moves.", ""]
    return "\n".join([*lines, table(head, map(_cells, rows))])


def _panels(result: Result[Row]) -> Iterator[Panel]:
    """Each row's bytes per second, a panel for each set."""
    for name in dict.fromkeys(row.parameters for row in result.rows):
        rows = [row for row in result.rows if row.parameters == name]
        bars = [_bar(row) for row in rows if row.optimizer not in (TRIAD, COPY)]
        yield Panel(name, bars, next(row.bandwidth for row in rows if row.optimizer in (TRIAD, COPY)) / 1e9)


def _bar(row: Row) -> Bar:
    rates = row.timing.rates(BYTES_PER_PARAMETER * row.elements / 1e9)
    return Bar(row.optimizer, *rates, row.optimizer.startswith(OURS))


def bench_optimizer(*, out: str | Path | None = None, **settings: Any) -> str:
    """The times of `run` as a Markdown table.

    Args:
        out: A folder for `optimizer.md` and `optimizer.png`; None writes nothing.
        **settings: As of `run`, whose errors are raised.
    """
    result = run(**settings)
    text = report(result)
    if out is not None:
        label = f"GB/s at {BYTES_PER_PARAMETER} bytes a parameter; line: the memory's speed"
        note = f"A step of the optimizer. {result.about}"
        write(out, "optimizer", text, [*_panels(result)], label=label, note=note)
    return text
