"""TrivialAugment, CutMix and the whole pipeline compared with the peers: `robust-dist bench augment`."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from robust_dist.bench.augment_peers import (
    CLASSES,
    COPY,
    LOOP,
    MEAN,
    ONE_BOX,
    OURS,
    PADDING,
    STD,
    Maker,
    Stages,
    mix_makers,
    pipeline_makers,
    trivial_makers,
)
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
from robust_dist.measure.dispatch import Counts, count
from robust_dist.measure.table import table
from robust_dist.validate import whole_number

LOOK_SIDE, PIPELINE_LOOK_SIDE = 32, 16
TASKS = ("TrivialAugment", "CutMix", "pipeline")
_CALLS, _COPIES = 16, 64  # calls of a contender that is observed, and copies of a picture in each call

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Look:
    """Observations of a contender.

    Attributes:
        draws: Which of "operation" and "box" are drawn for each sample rather than for the batch.
        equals: Share of the samples that came out as one of torchvision's outcomes, all of which were made; None where
            there is nothing to compare.
        exact: Share of the samples whose targets are the shares of their pixels; None where there is no mixing.
    """

    draws: frozenset[str] = frozenset()
    equals: float | None = None
    exact: float | None = None

    def __or__(self, other: "Look") -> "Look":
        """Both."""
        equals = self.equals if other.equals is None else other.equals
        exact = self.exact if other.exact is None else other.exact
        return Look(self.draws | other.draws, equals, exact)


def picture(side: int) -> Tensor:
    """uint8 [3, side, side] that every operation changes: a coloured slope with some noise."""
    slope = torch.arange(side).view(-1, 1) * 3 + torch.arange(side) * 2 + torch.tensor([0, 30, 60]).view(3, 1, 1)
    noise = torch.randint(0, 40, (3, side, side), generator=torch.Generator().manual_seed(1))
    return (slope + noise).clamp(0, 250).to(torch.uint8)


def shifted(image: Tensor) -> Tensor:
    """Every crop of the image padded by `PADDING` zeros, and each crop's mirror image, uint8 [N, 3, H, W]."""
    height, width = image.shape[1:]
    padded = pad(image, [PADDING] * 4)
    places = range(2 * PADDING + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in places for left in places]
    return torch.stack([image for crop in crops for image in (crop, crop.flip(2))])


def fingerprints(images: Tensor) -> list[int]:
    """A 64-bit number for each of uint8 images [B, C, H, W], different for different images of one size."""
    flat = images.cpu().flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator)
    found: list[int] = (flat * weights).sum(1).tolist()
    return found


def torchvision_outcomes(pictures: Tensor) -> frozenset[int] | None:
    """Fingerprints of every possible outcome of TrivialAugmentWide on uint8 pictures [N, 3, H, W].

    None if this version of torchvision does not allow its operations to be called one by one.
    """
    transform = importlib.import_module("torchvision.transforms.v2").TrivialAugmentWide()
    try:
        made = [fingerprints(image) for image in _every_operation(transform, pictures)]
    except AttributeError:
        return None
    return frozenset(number for numbers in made for number in numbers)


def _every_operation(transform: Any, pictures: Tensor) -> Iterator[Tensor]:
    height, width = pictures.shape[-2:]
    for name, (magnitudes_of, signed) in transform._AUGMENTATION_SPACE.items():
        bins = magnitudes_of(transform.num_magnitude_bins, height, width)
        magnitudes = [0.0] if bins is None else [float(magnitude) for magnitude in bins]
        for magnitude in dict.fromkeys(magnitudes + [-m for m in magnitudes if signed]):
            yield transform._apply_image_or_video_transform(
                pictures, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
            )


def _levels(images: Tensor) -> Tensor:
    """Normalised images converted back to their 256 levels; uint8 images unchanged."""
    if images.dtype == torch.uint8:
        return images
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
    return (images.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def look_at_operations(call: Call, image: Tensor, outcomes: frozenset[int] | None) -> Look:
    """Call it on copies of one image.

    Args:
        call: Takes uint8 images, returns uint8 or normalised ones.
        image: uint8 [3, H, W], on the device where it works.
        outcomes: Fingerprints of the possible outcomes.
    """
    batch = image.expand(_COPIES, -1, -1, -1).contiguous()
    labels = torch.arange(_COPIES, device=image.device) % CLASSES
    # Cloned, as it may return the same memory again.
    made = [fingerprints(_levels(call(batch, labels)[0].clone())) for _ in range(_CALLS)]
    draws = frozenset({"operation"} if any(len(set(numbers)) > 1 for numbers in made) else ())
    if outcomes is None:
        return Look(draws)
    hits = [number in outcomes for numbers in made for number in numbers]
    return Look(draws, equals=sum(hits) / len(hits))


def look_at_mixing(call: Call, side: int, device: torch.device, *, normalised: bool = False) -> Look:
    """Call it on images whose pixels hold the image's number, so that each pixel tells its source.

    Args:
        call: Takes uint8 images and labels, returns images and soft targets.
        side: Height and width of the images, pixels.
        device: Where it works.
        normalised: Whether it returns normalised images.
    """
    labels = torch.arange(CLASSES, device=device)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()
    exact, own_boxes = [], False
    for _ in range(_CALLS):
        mixed, targets = call(images, labels)
        source = (_levels(mixed) if normalised else mixed)[:, 0].long().cpu()
        shares = one_hot(source.flatten(1), CLASSES).double().mean(1)
        exact.append((shares - targets.cpu()).abs().amax(1) < 1e-6)
        pasted = [(source[i] != i).numpy().tobytes() for i in range(CLASSES)]
        # Two of them, as a sample that is its own partner shows no box.
        own_boxes |= len(set(pasted)) > 2
    draws = frozenset({"box"} if own_boxes else ())
    return Look(draws, exact=float(torch.cat(exact).double().mean()))


@dataclass(frozen=True)
class Task:
    """One kind of work.

    Attributes:
        name: One of `TASKS`.
        yardstick: The contender with which others are compared.
        floor: Bytes per pixel and channel that must be read and written.
        makers: Makes the contenders for images of a side.
        look: Observes the contender with a name.
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
        task: The timed work.
        side: Height and width of the images in pixels.
        batch: Images per call.
        name: The contender's name.
        timing: Seconds per call.
        times: The yardstick's median divided by its own.
        to_copy: Its median divided by that of a bare copy of the images to the output's dtype.
        counts: The work of a call.
        over_floor: Counted bytes divided by those that must be read and written; None if the work is not seen.
        look: Observations of it.
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
    image = picture(LOOK_SIDE)
    outcomes, makers = torchvision_outcomes(image.unsqueeze(0)), trivial_makers(compiled)

    def look(name: str) -> Look:
        here = image.to(device)
        return look_at_operations(makers[name](here.unsqueeze(0)).call, here, outcomes)

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
        return look_at_mixing(makers[name](images).call, LOOK_SIDE, device)

    return Task("CutMix", ONE_BOX, 2, lambda side: makers, look)


def pipeline_task(device: torch.device, compiled: bool) -> Task:
    """The whole pipeline, uint8 [B, 3, H, W] to float32, on a GPU to bfloat16; its parts are observed in turn.

    Args:
        device: Where a contender works.
        compiled: Whether `torch.compile`d ones are among them.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    image, side = picture(PIPELINE_LOOK_SIDE), PIPELINE_LOOK_SIDE
    outcomes = torchvision_outcomes(shifted(image))
    operations = pipeline_makers(side, torch.float32, compiled, Stages(cutmix=False))
    mixing = pipeline_makers(side, torch.float32, compiled, Stages(crop_and_flip=False, trivial=False))

    def look(name: str) -> Look:
        here, images = image.to(device), _images(CLASSES, side, device)
        found = look_at_operations(operations[name](here.unsqueeze(0)).call, here, outcomes)
        return found | look_at_mixing(mixing[name](images).call, side, device, normalised=True)

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
        # Below the floor, torch's operators do not do all of the work.
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
) -> Result[Row]:
    """Times of our augmentations and the peers', in turn: TrivialAugment alone, CutMix alone, the whole pipeline.

    What a contender does is observed, not asserted: which draws differ between the samples of a batch, whether each
    comes out as one of torchvision's own outcomes (all of which are made), and whether targets are the shares of the
    pixels. Operations, their bytes, and reads by the host are counted while one call runs.

    Args:
        batch_32: Images of 32 x 32 pixels per call; 0 leaves that size out.
        batch_224: Images of 224 x 224 pixels per call; 0 leaves that size out.
        rounds: Turns of every contender, at least 1.
        threads: Threads on the CPU; None leaves torch's.
        device: A torch device; None takes the GPU if there is one.
        compiled: Also time `torch.compile`d ones; compiling takes a minute.

    Raises:
        ValueError: A batch, rounds, threads or a device out of range.
    """
    for name, value, low in (("batch_32", batch_32, 0), ("batch_224", batch_224, 0), ("rounds", rounds, 1)):
        whole_number(name, value, low)
    where = pick_device(device)
    with thread_count(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for the peers' deprecations
        result: Result[Row] = Result([], {}, f"{machine()}; medians of {rounds} rounds, contenders in turn")
        for make in (trivial_task, mix_task, pipeline_task):
            task = make(where, compiled)
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
    speed, low, high = row.timing.rates(row.batch)
    yield from (row.name, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}")
    yield f"{row.batch / row.timing.cpu:,.0f}" if row.timing.cpu else "-"
    yield from (f"{row.times:.2f}", f"{row.to_copy:.1f}")
    yield "-" if row.over_floor is None else f"{row.over_floor:.1f}"
    yield from (f"{row.counts.operations:,.0f}", f"{row.counts.waits:,.0f}")
    yield from ("-" if row.name == COPY else _draws(row), _share(row.look.equals), _share(row.look.exact))


def _tables(result: Result[Row]) -> Iterator[list[Row]]:
    for key in dict.fromkeys((row.task, row.side) for row in result.rows):
        yield [row for row in result.rows if (row.task, row.side) == key]


def report(result: Result[Row]) -> str:
    """The rows as Markdown: a table for each task and size, with the machine and the contenders left out."""
    kernels = any(row.timing.host is not None for row in result.rows)
    lines = [result.about, "", *(f"- left out: {name}: {why}" for name, why in result.left_out.items())]
    for rows in _tables(result):
        yardstick = ONE_BOX if rows[0].task == "CutMix" else LOOP
        head = ["contender", "images/s", "slowest to fastest", "images per CPU-second", f"times {yardstick}"]
        head += ["time / copy", "bytes over the floor", "kernels" if kernels else "ATen operations", "host reads"]
        head += ["per sample", "equals torchvision", "targets exact"]
        lines += ["", f"### {_title(rows[0])}", "", table(head, map(_cells, rows))]
    notes = [
        "Floating images for kornia and timm, and PIL images for the PIL loops, are made before the clock starts.",
        '"-" for bytes: work that does not pass through torch\'s operators, where it is not seen.',
    ]
    return "\n".join([*lines, "", *notes])


def _title(row: Row) -> str:
    return f"{row.task}, {row.batch} images of {row.side}x{row.side}"


def bench_augment(*, out: str | Path | None = None, **settings: Any) -> str:
    """The times of `run` as Markdown tables.

    Args:
        out: A folder for `augment.md` and `augment.png`, images per second; None writes nothing.
        **settings: As of `run`, whose errors are raised.
    """
    result = run(**settings)
    text = report(result)
    if out is not None:
        panels = []
        for rows in _tables(result):
            bars = [Bar(row.name, *row.timing.rates(row.batch), row.name.startswith(OURS)) for row in rows]
            panels.append(Panel(_title(rows[0]), bars, log=True))
        write(out, "augment", text, panels, label="images/s", note=f"Augmentation. {result.about}")
    return text
