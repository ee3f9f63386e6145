"""TrivialAugment and CutMix beside the peers: `robust-dist bench augment`."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robust_dist.augment import CutMix, TrivialAugment
from robust_dist.bench.timing import Timing, interleaved, machine

CLASSES = 10
LOOP = "torchvision, loop over samples, tensors"
ONE_BOX = "torchvision CutMix"

Augment = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        task: What is timed.
        side: Height and width of the images in pixels.
        batch: Images per call.
        name: Of the contender.
        timing: Seconds per call.
        ratio: The yardstick's median over its own.
        per_sample: Whether samples of a batch differ in what happens to them, as found by looking.
        agrees: TrivialAugment: the share of samples that come out as one of torchvision's outcomes. CutMix: the share
            of samples whose targets are the exact shares of the pixels.
    """

    task: str
    side: int
    batch: int
    name: str
    timing: Timing
    ratio: float
    per_sample: bool
    agrees: float


def _optional(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _pil_loop(batch: Tensor) -> Augment:
    v2 = importlib.import_module("torchvision.transforms.v2")
    transform, to_pil, to_tensor = v2.TrivialAugmentWide(), v2.functional.to_pil_image, v2.functional.pil_to_tensor
    prepared = {id(batch): [to_pil(image) for image in batch]}

    def augment(images: Tensor) -> Tensor:
        found = [transform(image) for image in prepared.get(id(images), [])]
        return images if found else torch.stack([to_tensor(transform(to_pil(image))) for image in images])

    return augment


def _kornia_trivial(images: Tensor) -> Augment:
    module = importlib.import_module("kornia.augmentation.auto")
    transform, prepared = module.TrivialAugment(), {id(images): images / 255}
    return lambda x: transform(prepared[id(x)] if id(x) in prepared else x / 255).mul(255).round().to(torch.uint8)


def trivial_contenders(images: Tensor, compiled: bool) -> dict[str, Augment]:
    """Name to a call that augments uint8 images [B, 3, H, W]; peers that take another form get `images` prepared."""
    v2 = importlib.import_module("torchvision.transforms.v2")
    theirs, ours = v2.TrivialAugmentWide(), TrivialAugment()
    found: dict[str, Augment] = {"TrivialAugment (ours)": ours}
    if compiled:
        found["TrivialAugment (ours), compiled"] = torch.compile(ours, fullgraph=True)
    found[LOOP] = lambda x: torch.stack([theirs(image) for image in x])
    found["torchvision, loop over samples, PIL"] = _pil_loop(images)
    found["torchvision, once per batch"] = theirs
    if _optional("kornia"):
        found["kornia TrivialAugment, float"] = _kornia_trivial(images)
    return found


def mix_contenders(compiled: bool) -> dict[str, Mix]:
    """Name to a call that mixes uint8 images [B, 3, H, W] with labels [B], and gives soft targets [B, 10]."""
    v2 = importlib.import_module("torchvision.transforms.v2")
    elem = CutMix(CLASSES, mode="elem")
    found: dict[str, Mix] = {'CutMix "elem" (ours)': elem, 'CutMix "batch" (ours)': CutMix(CLASSES)}
    if compiled:
        found['CutMix "elem" (ours), compiled'] = torch.compile(elem, fullgraph=True)
    found[ONE_BOX] = v2.CutMix(num_classes=CLASSES)
    return found


def _picture(seed: int) -> Tensor:
    """One 32 x 32 picture that every operation changes: a coloured slope with some noise."""
    slope = torch.arange(32).view(-1, 1) * 3 + torch.arange(32) * 2 + torch.tensor([0, 30, 60]).view(3, 1, 1)
    noise = torch.randint(0, 40, (3, 32, 32), generator=torch.Generator().manual_seed(seed))
    return (slope + noise).clamp(0, 250).to(torch.uint8)


def torchvision_outcomes(picture: Tensor, draws: int = 20_000) -> set[bytes]:
    """What TrivialAugmentWide makes of one picture; 20,000 draws miss one of its 868 cells in ten million runs."""
    transform = importlib.import_module("torchvision.transforms.v2").TrivialAugmentWide()
    return {transform(picture).numpy().tobytes() for _ in range(draws)}


def look_at_trivial(augment: Augment, picture: Tensor, outcomes: set[bytes]) -> tuple[bool, float]:
    """Whether equal samples come out different, and the share that comes out as torchvision's do."""
    out = [augment(picture.expand(64, -1, -1, -1).clone()) for _ in range(16)]
    per_sample = any(len({image.numpy().tobytes() for image in images}) > 1 for images in out)
    hits = [image.numpy().tobytes() in outcomes for image in torch.cat(out)]
    return per_sample, sum(hits) / len(hits)


def look_at_mix(mix: Mix) -> tuple[bool, float]:
    """Whether samples get boxes of their own, and the share whose targets are the exact shares of pixels."""
    labels = torch.arange(CLASSES)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    exact, own_boxes = [], False
    for _ in range(16):
        mixed, targets = mix(images, labels)
        shares = torch.nn.functional.one_hot(mixed[:, 0].flatten(1).long(), CLASSES).double().mean(1)
        exact.append((shares - targets).abs().amax(1) < 1e-6)
        pasted = [(mixed[i, 0] != i).numpy().tobytes() for i in range(CLASSES)]
        own_boxes |= len(set(pasted)) > 2
    return own_boxes, float(torch.cat(exact).double().mean())


def _images(batch: int, side: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _trivial_rows(batch: int, side: int, rounds: int, compiled: bool) -> list[Row]:
    images, picture = _images(batch, side), _picture(1)
    contenders, outcomes = trivial_contenders(images, compiled), torchvision_outcomes(picture)
    times = interleaved({name: partial(f, images) for name, f in contenders.items()}, rounds=rounds)
    rows = []
    for name, augment in contenders.items():
        ratio = times[LOOP].median / times[name].median
        rows.append(
            Row("TrivialAugment", side, batch, name, times[name], ratio, *look_at_trivial(augment, picture, outcomes))
        )
    return rows


def _mix_rows(batch: int, side: int, rounds: int, compiled: bool) -> list[Row]:
    images, labels = _images(batch, side), torch.arange(batch) % CLASSES
    contenders = mix_contenders(compiled)
    times = interleaved({name: partial(f, images, labels) for name, f in contenders.items()}, rounds=rounds)
    return [
        Row("CutMix", side, batch, n, times[n], times[ONE_BOX].median / times[n].median, *look_at_mix(contenders[n]))
        for n in contenders
    ]


def _share(value: float) -> str:
    return "yes" if value == 1 else f"no ({value:.0%})"


def _table(rows: Sequence[Row]) -> list[str]:
    task = rows[0].task
    yardstick = LOOP if task == "TrivialAugment" else ONE_BOX
    agrees = "equals torchvision" if task == "TrivialAugment" else "targets exact"
    lines = [
        f"| {task} | size | batch | images/s | slowest to fastest | times {yardstick} | samples differ | {agrees} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, low, high = (row.batch / t for t in (row.timing.median, row.timing.high, row.timing.low))
        cells = [row.name, f"{row.side}x{row.side}", row.batch, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}"]
        cells += [f"{row.ratio:.2f}", "yes" if row.per_sample else "no", _share(row.agrees)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def bench_augment(*, batch_32: int = 512, batch_224: int = 64, rounds: int = 7, compiled: bool = False) -> str:
    """Time our augmentations and the peers' on the CPU in turn.

    What a contender does is looked at, not asserted: whether the samples of a batch differ in what happens to them, and
    whether each comes out as one of torchvision's own outcomes (CutMix: with exactly the shares of its pixels).

    Args:
        batch_32: Images of 32 x 32 pixels per call, at least 1.
        batch_224: Images of 224 x 224 pixels per call; 0 leaves that size out.
        rounds: Turns of every contender, at least 1.
        compiled: Whether `torch.compile`d ones run, too; compiling takes a minute.

    Returns:
        Markdown tables; images per second are medians over the rounds.

    Raises:
        ValueError: For a batch or rounds out of range.
    """
    for name, value, low in (("batch_32", batch_32, 1), ("batch_224", batch_224, 0), ("rounds", rounds, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    sizes = [(batch_32, 32)] + ([(batch_224, 224)] if batch_224 else [])
    trivial = [row for batch, side in sizes for row in _trivial_rows(batch, side, rounds, compiled)]
    mixing = [row for batch, side in sizes for row in _mix_rows(batch, side, rounds, compiled)]
    notes = [
        f"Medians of {rounds} rounds, every contender in turn. {machine()}.",
        "kornia gets floating images, and torchvision's PIL loop gets PIL images, made before the clock starts.",
    ]
    return "\n".join([*_table(trivial), "", *_table(mixing), "", *notes])
