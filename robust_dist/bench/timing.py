"""Fair timing: every contender takes its turn in every round; medians are compared, written and drawn."""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from robust_dist.surroundings import processor
from robust_dist.validate import whole_number

_BURST = 8  # calls, few enough for a GPU's queue to hold them all

Call = Callable[[], object]
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one contender.

    Attributes:
        median: Median over the rounds, in seconds; on a GPU between two events on its stream.
        low: Fastest round, in seconds.
        high: Slowest round, in seconds.
        cpu: Median of the CPU seconds of all threads of the process; None if not measured.
        host: On a GPU, the median of the seconds until a call returns while the queue is empty; otherwise None.
    """

    median: float
    low: float
    high: float
    cpu: float | None = None
    host: float | None = None

    def rates(self, amount: float) -> tuple[float, float, float]:
        """`amount` per call as a rate per second: in the median, the slowest and the fastest round."""
        return amount / self.median, amount / self.high, amount / self.low


@dataclass(frozen=True)
class _Sample:
    seconds: float
    cpu: float
    host: float | None = None


@dataclass(frozen=True)
class Result(Generic[RowT]):
    """The result of a benchmark.

    Attributes:
        rows: The timed contenders.
        left_out: For each missing contender, the reason.
        about: The machine and the settings, in one line.
    """

    rows: list[RowT]
    left_out: dict[str, str]
    about: str


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None takes the GPU if there is one.

    Raises:
        ValueError: No such device, or no CUDA device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device of torch; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch finds no GPU here; use cpu")
    return device


@contextlib.contextmanager
def thread_count(number: int | None) -> Iterator[None]:
    """Set the threads of torch, and of libraries that load their own OpenMP in the block; None leaves them.

    Raises:
        ValueError: A number below 1.
    """
    if number is not None:
        whole_number("threads", number, 1)
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(number or before)
    os.environ["OMP_NUM_THREADS"] = str(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable


def reason(error: Exception) -> str:
    """The reason why a contender is missing, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    if isinstance(error, ImportError):
        return f"cannot be imported: {_first(error)}"
    return _first(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {_first(error)}"


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    return text if len(text) <= 160 else text[:157] + "..."


def interleaved(
    contenders: Mapping[str, Call],
    *,
    rounds: int = 7,
    min_seconds: float = 0.05,
    warmup: int = 1,
    device: torch.device | None = None,
    failures: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Time the contenders in turn, `rounds` times, so that a busy moment hits all of them.

    Args:
        contenders: Name to a call without arguments.
        rounds: How often each one is measured.
        min_seconds: A measurement repeats a call until it lasts about this long.
        warmup: Calls of each before the first round, besides one that says how often to repeat.
        device: Where the calls work; None is the GPU if there is one, timed by the host's clock.
        failures: Receives the names of contenders that raise, and why; None lets the exception through.

    Returns:
        Name to its timing, in seconds per call, of those that did not fail.
    """
    on_gpu = device is not None and device.type == "cuda"
    measure = _sample_on_gpu if on_gpu else _sample
    samples: dict[str, list[_Sample]] = {name: [] for name in contenders}
    repeats: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name in list(samples):
            try:
                if turn:
                    samples[name].append(measure(contenders[name], repeats[name]))
                else:
                    repeats[name] = _repeats(contenders[name], measure, min_seconds, warmup)
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = reason(error)
                del samples[name]
    return {name: _timing(found) for name, found in samples.items()}


def _repeats(call: Call, measure: Callable[[Call, int], _Sample], min_seconds: float, warmup: int) -> int:
    for _ in range(warmup):
        call()
    return max(1, int(min_seconds / max(measure(call, 1).seconds, 1e-9)))


def _timing(found: list[_Sample]) -> Timing:
    seconds = [sample.seconds for sample in found]
    host = [sample.host for sample in found if sample.host is not None]
    cpu = statistics.median(sample.cpu for sample in found)
    return Timing(
        statistics.median(seconds), min(seconds), max(seconds), cpu, statistics.median(host) if host else None
    )


def _sample(call: Call, repeats: int) -> _Sample:
    _synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    _synchronize()
    return _Sample((time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats)


def _sample_on_gpu(call: Call, repeats: int) -> _Sample:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize()
    cpu = time.process_time()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    _synchronize()
    cpu = (time.process_time() - cpu) / repeats
    return _Sample(first.elapsed_time(last) / 1e3 / repeats, cpu, _until_return(call, min(repeats, _BURST)))


def _until_return(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - start) / repeats
    _synchronize()
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """One line that names the processor, the accelerator, the threads and torch's version."""
    cpu = processor() or platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"


@dataclass(frozen=True)
class Bar:
    """One contender.

    Attributes:
        name: Text beside the bar.
        value: Its length.
        low: Start of its spread.
        high: End of its spread.
        ours: Whether it is drawn in our colour.
    """

    name: str
    value: float
    low: float
    high: float
    ours: bool


@dataclass(frozen=True)
class Panel:
    """Bars that share a scale.

    Attributes:
        title: Text above the bars.
        bars: From top to bottom.
        limit: Where a line marks what is possible; None for no line.
        log: Whether the scale is logarithmic.
    """

    title: str
    bars: Sequence[Bar]
    limit: float | None = None
    log: bool = False


def write(out: str | Path, name: str, text: str, panels: Sequence[Panel], *, label: str, note: str) -> None:
    """Write a table to `out/name.md` and its picture, the panels one above the other, to `out/name.png`.

    Args:
        out: The folder, made if missing.
        name: Name of both files.
        text: Markdown.
        panels: At least one.
        label: Label of the bars' values, with their unit.
        note: Text above all panels: what was measured, and where.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, f"{name}.md").write_text(text + "\n", encoding="utf-8")
    counts = [len(panel.bars) for panel in panels]
    figure = Figure(figsize=(10, 1.0 + sum(0.26 * count + 0.9 for count in counts)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(note, fontsize=9)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 3 for count in counts])
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw(axes, panel)
    grid[-1, 0].set_xlabel(label)
    figure.savefig(Path(out, f"{name}.png"), dpi=120)


def _draw(axes: Any, panel: Panel) -> None:
    places = range(len(panel.bars))
    values = [bar.value for bar in panel.bars]
    # Rounding may turn an empty spread negative, which matplotlib refuses.
    below = [max(0.0, bar.value - bar.low) for bar in panel.bars]
    above = [max(0.0, bar.high - bar.value) for bar in panel.bars]
    colours = ["tab:blue" if bar.ours else "tab:gray" for bar in panel.bars]
    axes.barh(places, values, xerr=[below, above], color=colours, ecolor="black", error_kw={"linewidth": 0.8})
    axes.set_yticks(places, [bar.name for bar in panel.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.grid(axis="x", alpha=0.3)
    if panel.limit is not None:
        axes.axvline(panel.limit, color="tab:red", linewidth=1)
    if panel.log:
        axes.set_xscale("log")
