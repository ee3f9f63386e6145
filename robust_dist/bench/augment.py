"""TrivialAugment, CutMix and the whole pipeline beside the peers: `robust-dist bench augment`."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from robust_dist.bench import augment_look as looking
from robust_dist.bench.augment_look import Look
from robust_dist.bench.augment_peers import (
    CLASSES,
    COPY,
    LOOP,
    ONE_BOX,
    Maker,
    Stages,
    is_ours,
    mix_makers,
    pipeline_makers,
    trivial_makers,
)
from robust_dist.bench.figure import Bar, Panel, draw_bars
from robust_dist.bench.timing import Result, Timing, interleaved, machine, pick_device, reason, thread_count
from robust_dist.measure.dispatch import Counts, count
from robust_dist.measure.table import table
from robust_dist.validate import whole_number

LOOK_SIDE, PIPELINE_LOOK_SIDE = 32, 16
TASKS = ("TrivialAugment", "CutMix", "pipeline")


@dataclass(frozen=True)
class Task:
    """One kind of work.

    Attributes:
        name: Among `TASKS`.
        yardstick: The contender that others are compared with.
        floor: Bytes a pixel and channel that must be read and written.
        makers: The contenders for images of a side.
        look: Finds out what the contender of a name does.
    """

    name: str
    yardstick: str
    floor: int
    makers: Callable[[int], dict[str, Maker]]
    look: Callable[[str], Look]


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        task: What is timed.
        side: Height and width of the images in pixels.
        batch: Images per call.
        name: Of the contender.
        timing: Seconds per call.
        times: The yardstick's median over its own.
        to_copy: Its median over that of a bare copy of the images to the dtype that comes out.
        counts: Of a call.
        over_floor: Bytes counted over those that must be read and written; None where the work is not seen.
        look: What it does.
    """

    task: str
    side: int
    batch: int
    name: str
    timing: Timing
    times: float
    to_copy: float
    counts: Counts
    over_floor: float | None
    look: Look


def _labels(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) % CLASSES


def _images(batch: int, side: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


def trivial_task(device: torch.device, compiled: bool) -> Task:
    """TrivialAugment alone, uint8 [B, 3, H, W] to uint8.

    Args:
        device: Where a contender works.
        compiled: Whether `torch.compile`d ones are among them.
    """
    image = looking.picture(LOOK_SIDE)
    outcomes, makers = looking.torchvision_outcomes(image.unsqueeze(0)), trivial_makers(compiled)

    def look(name: str) -> Look:
        here = image.to(device)
        return looking.look_at_operations(makers[name](here.unsqueeze(0)).call, here, outcomes)

    return Task("TrivialAugment", LOOP, 2, lambda side: makers, look)


def mix_task(device: torch.device, compiled: bool) -> Task:
    """CutMix alone, uint8 [B, 3, H, W] to uint8, or floating to floating where a peer takes no uint8.

    Args:
        device: Where a contender works.
        compiled: Whether `torch.compile`d ones are among them.
    """
    makers = mix_makers(compiled)

    def look(name: str) -> Look:
        images = _images(CLASSES, LOOK_SIDE, device)
        return looking.look_at_mixing(makers[name](images).call, LOOK_SIDE, device)

    return Task("CutMix", ONE_BOX, 2, lambda side: makers, look)


def pipeline_task(device: torch.device, compiled: bool) -> Task:
    """The whole pipeline, uint8 [B, 3, H, W] to float32, on a GPU to bfloat16; its parts are looked at in turn.

    Args:
        device: Where a contender works.
        compiled: Whether `torch.compile`d ones are among them.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    image, side = looking.picture(PIPELINE_LOOK_SIDE), PIPELINE_LOOK_SIDE
    outcomes = looking.torchvision_outcomes(looking.shifted(image))
    operations = pipeline_makers(side, torch.float32, compiled, Stages(cutmix=False))
    mixing = pipeline_makers(side, torch.float32, compiled, Stages(crop_and_flip=False, trivial=False))

    def look(name: str) -> Look:
        here, images = image.to(device), _images(CLASSES, side, device)
        found = looking.look_at_operations(operations[name](here.unsqueeze(0)).call, here, outcomes)
        return found | looking.look_at_mixing(mixing[name](images).call, side, device, normalised=True)

    floor = 1 + dtype.itemsize
    return Task("pipeline", LOOP, floor, lambda side: pipeline_makers(side, dtype, compiled), look)


def _rows(
    task: Task, batch: int, side: int, rounds: int, device: torch.device, looks: dict[str, Look], result: Result
) -> list[Row]:
    images, labels = _images(batch, side, device), _labels(batch, device)
    calls, seen = {}, {}
    for name, make in task.makers(side).items():
        if name in looks:
            contender = make(images)
            calls[name], seen[name] = partial(contender.call, images, labels), contender.seen
    failures: dict[str, str] = {}
    times = interleaved(calls, rounds=rounds, device=device, failures=failures)
    result.left_out.update({f"{task.name}, {name}, {side}x{side}": why for name, why in failures.items()})
    rows = []
    for name, timing in times.items():
        counts = count(calls[name], device)
        share = counts.bytes / (task.floor * images.numel())
        # Less than the floor is no miracle, but work that torch's operators do not do.
        over = share if seen[name] and share >= 1 else None
        ratios = times[task.yardstick].median / timing.median, timing.median / times[COPY].median
        rows.append(Row(task.name, side, batch, name, timing, *ratios, counts, over, looks[name]))
    return rows


def _looks(task: Task, result: Result[Row]) -> dict[str, Look]:
    found = {}
    for name in task.makers(LOOK_SIDE):
        try:
            found[name] = Look() if name == COPY else task.look(name)
        except Exception as error:
            result.left_out[f"{task.name}, {name}"] = reason(error)
    return found


def run(
    *,
    batch_32: int = 512,
    batch_224: int = 64,
    rounds: int = 7,
    threads: int | None = None,
    device: str | None = None,
    compiled: bool = False,
    tasks: Sequence[str] = TASKS,
) -> Result[Row]:
    """Times of our augmentations and the peers'; arguments and errors as in `bench_augment`, `tasks` among `TASKS`."""
    for name, value, low in (("batch_32", batch_32, 0), ("batch_224", batch_224, 0), ("rounds", rounds, 1)):
        whole_number(name, value, low)
    where = pick_device(device)
    result: Result[Row] = Result([], {})
    builders = {"TrivialAugment": trivial_task, "CutMix": mix_task, "pipeline": pipeline_task}
    with thread_count(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' deprecations
        for name in tasks:
            task = builders[name](where, compiled)
            looks = _looks(task, result)
            for batch, side in ((batch_32, 32), (batch_224, 224)):
                result.rows.extend(_rows(task, batch, side, rounds, where, looks, result) if batch else [])
    return result


def _share(value: float | None) -> str:
    return "-" if value is None else "yes" if value == 1 else f"no ({value:.0%})"


def _draws(row: Row) -> str:
    wanted = {"TrivialAugment": {"operation"}, "CutMix": {"box"}, "pipeline": {"operation", "box"}}[row.task]
    if row.look.draws >= wanted:
        return "yes"
    return f"{', '.join(sorted(row.look.draws))} only" if row.look.draws else "no"


def _cells(row: Row) -> Iterator[str]:
    speed, low, high = (row.batch / seconds for seconds in (row.timing.median, row.timing.high, row.timing.low))
    yield from (row.name, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}")
    yield f"{row.batch / row.timing.cpu:,.0f}" if row.timing.cpu else "-"
    yield from (f"{row.times:.2f}", f"{row.to_copy:.1f}")
    yield "-" if row.over_floor is None else f"{row.over_floor:.1f}"
    yield from (f"{row.counts.operations:,.0f}", f"{row.counts.waits:,.0f}")
    yield from ("-" if row.name == COPY else _draws(row), _share(row.look.equals), _share(row.look.exact))


def _table(rows: Sequence[Row], yardstick: str, on_gpu: bool) -> list[str]:
    first = rows[0]
    head = ["contender", "images/s", "slowest to fastest", "images per CPU-second", f"times {yardstick}", "time / copy"]
    head += ["bytes over the floor", "kernels" if on_gpu else "ATen operations", "host reads"]
    head += ["per sample", "equals torchvision", "targets exact"]
    return [f"### {first.task}, {first.batch} images of {first.side}x{first.side}", "", table(head, map(_cells, rows))]


def _tables(result: Result[Row]) -> Iterator[list[Row]]:
    for key in dict.fromkeys((row.task, row.side) for row in result.rows):
        yield [row for row in result.rows if (row.task, row.side) == key]


def report(result: Result[Row], rounds: int, device: torch.device) -> str:
    """The rows as Markdown: a table for each task and size, with the machine and what was left out.

    Args:
        result: What `run` gave.
        rounds: As `run` was told.
        device: As `run` took it: on a GPU operations are kernels.
    """
    lines = [f"{machine()}; medians of {rounds} rounds, contenders in turn", ""]
    lines += [f"- left out: {name}: {why}" for name, why in result.left_out.items()]
    for rows in _tables(result):
        yardstick = ONE_BOX if rows[0].task == "CutMix" else LOOP
        lines += ["", *_table(rows, yardstick, device.type == "cuda")]
    notes = [
        "Floating images for kornia and timm, and PIL images for the PIL loops, are made before the clock starts.",
        '"-" for bytes: work that does not pass through torch\'s operators, where it is not seen.',
    ]
    return "\n".join([*lines, "", *notes])


def draw(result: Result[Row], path: Path) -> None:
    """A picture of every row's images per second, a panel for each task and size.

    Args:
        result: What `run` gave.
        path: The PNG to write.
    """
    panels = [
        Panel(f"{rows[0].task}, {rows[0].batch} images of {rows[0].side}x{rows[0].side}", [_bar(row) for row in rows])
        for rows in _tables(result)
    ]
    draw_bars(panels, path, label="images/s", note=f"Augmentation. {machine()}", log=True)


def _bar(row: Row) -> Bar:
    speed, low, high = (row.batch / seconds for seconds in (row.timing.median, row.timing.high, row.timing.low))
    return Bar(row.name, speed, low, high, is_ours(row.name))


def bench_augment(
    *,
    batch_32: int = 512,
    batch_224: int = 64,
    rounds: int = 7,
    threads: int | None = None,
    device: str | None = None,
    compiled: bool = False,
    out: str | Path | None = None,
) -> str:
    """Times of our augmentations and the peers', in turn: TrivialAugment alone, CutMix alone, the whole pipeline.

    What a contender does is looked at, not asserted: which draws the samples of a batch have of their own, whether each
    comes out as one of torchvision's own outcomes (all of which are made), and whether targets are the shares of the
    pixels. Operations, their bytes, and reads by the host are counted while one call runs.

    Args:
        batch_32: Images of 32 x 32 pixels per call; 0 leaves that size out.
        batch_224: Images of 224 x 224 pixels per call; 0 leaves that size out.
        rounds: Turns of every contender, at least 1.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.
        compiled: Whether `torch.compile`d ones run, too; compiling takes a minute.
        out: A folder for `augment.md` and `augment.png`; None writes nothing.

    Returns:
        Markdown tables; images per second are medians over the rounds.

    Raises:
        ValueError: For a batch, rounds, threads or a device out of range.
    """
    result = run(
        batch_32=batch_32, batch_224=batch_224, rounds=rounds, threads=threads, device=device, compiled=compiled
    )
    with thread_count(threads):
        text = report(result, rounds, pick_device(device))
        if out is not None:
            draw(result, Path(out, "augment.png"))
            Path(out, "augment.md").write_text(text + "\n", encoding="utf-8")
    return text
