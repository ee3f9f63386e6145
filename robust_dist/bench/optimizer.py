"""The optimizer step's time beside the peers and the memory's speed: `robust-dist bench optimizer`."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robust_dist.bench.figure import Bar, Panel, draw_bars
from robust_dist.bench.optimizer_peers import ADAMW_FUSED, OURS, Maker, makers
from robust_dist.bench.parameter_sets import SETS, numel, parameters
from robust_dist.bench.timing import Result, Timing, interleaved, machine, pick_device, reason, thread_count
from robust_dist.measure.memory import free_memory, peak_extra_bytes
from robust_dist.measure.table import table
from robust_dist.validate import whole_number

BYTES_PER_PARAMETER = 28  # float32: read p, g, m, v and write p, m, v
TRIAD = "a += 0.5 b (the memory's speed)"
COPY = "b = a (the memory's speed)"
# Of each of the limit's two arrays: far beyond any cache; a large set's bytes are moved in several passes.
LIMIT_ELEMENTS = 50_000_000
STATE_BYTES = 8  # a parameter, float32
SHARE_OF_MEMORY = 0.8
WARMUP = 4  # with the two further calls before the first round, past the unrectified steps


@dataclass(frozen=True)
class Row:
    """One optimizer on one set of parameters.

    Attributes:
        parameters: Name of the set.
        tensors: Number of tensors in it.
        elements: Number of parameters in it.
        optimizer: Name of the contender.
        timing: Seconds per step.
        to_adamw_fused: Its median over that of torch's AdamW fused.
        bandwidth: Bytes per second, if it moved `BYTES_PER_PARAMETER`.
        of_limit: The median of the limit, which moves as many bytes, over its own.
        extra: Most bytes that a step takes meanwhile and gives back, per parameter; None where nothing tells.
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
    # in place as an optimizer is: a third array's lines would be read before they are written
    a, b = torch.zeros(size // parts, device=device), torch.ones(size // parts, device=device)

    def move() -> None:
        for _ in range(parts):
            if on_gpu:
                a.copy_(b)
            else:
                a.add_(b, alpha=0.5)

    return (COPY if on_gpu else TRIAD), move


def _groups(names: Sequence[str], elements: int, device: torch.device) -> list[list[str]]:
    """Cut the contenders so that the states of a group fit into the memory; the yardstick is in every group."""
    others = [name for name in names if name != ADAMW_FUSED]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is None:
        return [list(names)]
    # Beside the states: two float32 temporaries of foreach, and the limit's arrays.
    room = free * SHARE_OF_MEMORY - 8 * (elements + LIMIT_ELEMENTS)
    size = max(1, int(room // (STATE_BYTES * elements)) - 1)
    cuts = [others[i : i + size] for i in range(0, len(others), size)]
    return [[name for name in names if name in (*cut, ADAMW_FUSED)] for cut in cuts]


def _set_rows(name: str, rounds: int, device: torch.device, left_out: dict[str, str]) -> list[Row]:
    # All step the same parameters: only their states would fill the memory.
    shapes = SETS[name]()
    params = parameters(shapes, device)
    known = makers(device)
    rows: list[Row] = []
    for group in _groups([one for one in known if one not in left_out], numel(shapes), device):
        found = _group_rows(name, params, {one: known[one] for one in group}, rounds, left_out)
        present = {row.optimizer for row in rows}
        rows += [row for row in found if row.optimizer not in present]
        gc.collect()
    order = {optimizer: place for place, optimizer in enumerate((TRIAD, COPY, *known))}
    return sorted(rows, key=lambda row: order[row.optimizer])


def _group_rows(
    name: str, params: list[Tensor], group: dict[str, Maker], rounds: int, left_out: dict[str, str]
) -> list[Row]:
    elements, device = sum(param.numel() for param in params), params[0].device
    limit, move = _limit(elements, device)
    steps: dict[str, Callable[[], object]] = {limit: move}
    for one, make in group.items():
        try:
            steps[one] = make(params).step
        except Exception as error:
            left_out[one] = reason(error)
    failures: dict[str, str] = {}
    times = interleaved(steps, rounds=rounds, warmup=WARMUP, device=device, failures=failures)
    left_out.update({f"{one} on {name}": why for one, why in failures.items()})
    rows = []
    for one, timing in times.items():
        speed = BYTES_PER_PARAMETER * elements / timing.median
        ratios = timing.median / times[ADAMW_FUSED].median, speed, times[limit].median / timing.median
        # The lesser of two: now and then glibc grows its heap meanwhile.
        taken = [peak_extra_bytes(steps[one], device) for _ in range(2)]
        extra = min((number for number in taken if number is not None), default=None)
        each = None if extra is None else extra / elements
        rows.append(Row(name, len(params), elements, one, timing, *ratios, each))
    return rows


def _check(sets: Sequence[str], rounds: int) -> None:
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise ValueError(f"sets must name some of {tuple(SETS)}, got {tuple(sets)}")
    whole_number("rounds", rounds, 1)


def run(
    *, sets: Sequence[str] = tuple(SETS), rounds: int = 7, threads: int | None = None, device: str | None = None
) -> Result[Row]:
    """Times of a step of every optimizer that is installed, all in turn in every round.

    Where the memory does not hold the states of all, they are timed in groups, each beside the limit and torch's AdamW
    fused, to which its ratios are.

    Args:
        sets: Names among `SETS`.
        rounds: Measurements of each.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.

    Raises:
        ValueError: An unknown set or device, or rounds or threads below 1.
    """
    _check(sets, rounds)
    where = pick_device(device)
    result: Result[Row] = Result([], {})
    with thread_count(threads):
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


def report(result: Result[Row], rounds: int) -> str:
    """The rows as Markdown, with the machine and what was left out.

    Args:
        result: What `run` gave.
        rounds: As `run` was told.
    """
    rows = result.rows
    on_gpu = any(row.timing.host is not None for row in rows)
    lines = [f"{machine()}; medians of {rounds} rounds, contenders in turn", ""]
    sizes = {row.parameters: f"{row.tensors} tensors, {row.elements:,} parameters" for row in rows}
    lines += [f"- {name}: {size}" for name, size in sizes.items()]
    lines += [f"- left out: {name}: {why}" for name, why in result.left_out.items()]
    head = ["parameters", "optimizer", "ms", "lowest to highest", "GB/s", "of the memory's speed", "/ AdamW fused"]
    head += (["host us"] if on_gpu else []) + ["extra bytes a parameter"]
    lines += ["", f"GB/s are of {BYTES_PER_PARAMETER} bytes a parameter and step, which an ideal step moves.", ""]
    return "\n".join([*lines, table(head, map(_cells, rows))])


def draw(result: Result[Row], path: Path) -> None:
    """A picture of every row's bytes per second, a panel for each set.

    Args:
        result: What `run` gave.
        path: The PNG to write.
    """
    panels = []
    for name in dict.fromkeys(row.parameters for row in result.rows):
        rows = [row for row in result.rows if row.parameters == name]
        bars = [_bar(row) for row in rows if row.optimizer not in (TRIAD, COPY)]
        panels.append(Panel(name, bars, next(r.bandwidth for r in rows if r.optimizer in (TRIAD, COPY)) / 1e9))
    label = f"GB/s at {BYTES_PER_PARAMETER} bytes a parameter; line: the memory's speed"
    draw_bars(panels, path, label=label, note=f"A step of the optimizer. {machine()}")


def _bar(row: Row) -> Bar:
    moved = row.bandwidth * row.timing.median / 1e9
    spread = moved / row.timing.high, moved / row.timing.low
    return Bar(row.optimizer, row.bandwidth / 1e9, *spread, row.optimizer.startswith(OURS))


def bench_optimizer(
    *,
    sets: Sequence[str] = tuple(SETS),
    rounds: int = 7,
    threads: int | None = None,
    device: str | None = None,
    out: str | Path | None = None,
) -> str:
    """The times of `run` as a Markdown table; arguments and errors as there.

    Args:
        sets: Names among `SETS`.
        rounds: Measurements of each.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.
        out: A folder for `optimizer.md` and `optimizer.png`; None writes nothing.
    """
    result = run(sets=sets, rounds=rounds, threads=threads, device=device)
    with thread_count(threads):
        text = report(result, rounds)
        if out is not None:
            draw(result, Path(out, "optimizer.png"))
            Path(out, "optimizer.md").write_text(text + "\n", encoding="utf-8")
    return text
