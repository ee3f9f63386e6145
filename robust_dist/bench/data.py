"""Reading images that do not fit a device, compared with the peers and the limit: `robust-dist bench data`."""

import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from robust_dist.bench.data_files import CLASSES, KINDS, USUAL, Files, write_files
from robust_dist.bench.timing import Timing, interleaved, machine
from robust_dist.extras import require
from robust_dist.measure.table import table
from robust_dist.validate import whole_number

SIZE = 224
LOAD = 0.8
YARDSTICK = "torchvision ImageFolder, DataLoader"
EXACT, FAST, CACHED = (f"Loader (ours), image folder{how}" for how in ("", ", fast", ", fast, cache"))
TORCHVISION_IO = "torchvision ImageFolder, its own decoder, DataLoader"
PURPOSE = "the data benchmark"
# Number of pictures whose levels are compared.
COMPARED = 20

# The limits of contenders that decode exactly, and fast.
LIMITS = {False: "decode and crop", True: "fast decode and crop"}
Epoch = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: What reads.
        timing: Seconds per epoch.
        images: Counted images of an epoch.
        differ: Whether a second epoch was seen to give other batches than the first.
        wait: Share of the time in which a consumer waited for batches (median over the rounds).
        cpu: CPU seconds per epoch of this process and its workers (median over the rounds).
    """

    name: str
    timing: Timing
    images: int
    differ: bool
    wait: float
    cpu: float


def ours(files: Files, root: Path, workers: int) -> dict[str, Epoch]:
    """Epochs of our Loader over each format, and with each decoder over the image folder, by name.

    Args:
        files: The images.
        root: A folder for caches.
        workers: Processes that read.
    """
    from robust_dist.data.folder import open_image_folder
    from robust_dist.data.hub import open_hub
    from robust_dist.data.image_cache import cache_for
    from robust_dist.data.shards import open_webdataset

    folder, batch = open_image_folder(files.folder), files.kind.batch
    kept = cache_for(folder, "bench", _crop(), fast=True, folder=root / "decoded", most_bytes=2**40)
    kept.begin()
    found = {
        EXACT: _stream(folder, workers, batch),
        FAST: _stream(folder, workers, batch, fast=True),
        CACHED: _stream(folder, workers, batch, fast=True, cache=kept),
    }
    if files.parquet is None:
        return found
    cache, spool = str(root / "cache"), str(root / "spool")
    sources = {
        "Loader (ours), Hugging Face Arrow": open_hub(str(files.parquet), "train", cache_dir=cache),
        "Loader (ours), parquet streamed": open_hub(str(files.parquet), "train", streaming=True, spool_dir=spool),
        "Loader (ours), WebDataset shards": open_webdataset(files.shards),
    }
    return found | {name: _stream(source, workers, batch) for name, source in sources.items()}


def _crop() -> Any:
    from robust_dist.data.decode import RandomCrop

    return RandomCrop(SIZE, (0.08, 1.0), (3 / 4, 4 / 3))


def _stream(source: Any, workers: int, batch: int, **how: Any) -> Epoch:
    from robust_dist.data.batches import Cut
    from robust_dist.data.stream_set import StreamSet

    loader = StreamSet(source, _crop(), torch.device("cpu"), workers=workers, **how).loader(Cut(batch, seed=0, block=1))
    numbers = count()

    def epoch() -> Iterator[Tensor]:
        for parts in loader.epoch(next(numbers)):
            yield from (part.images for part in parts)

    return epoch


def peers(files: Files, root: Path, workers: int) -> dict[str, Epoch]:
    """Epochs of the peers by name: each reads, decodes, crops at random and stacks in as many workers as ours.

    Args:
        files: The images.
        root: A folder for caches.
        workers: Processes that read.
    """
    found = {
        YARDSTICK: _torchvision(files, workers),
        TORCHVISION_IO: _torchvision_io(files, workers),
    }
    if files.parquet is not None:
        found['datasets, format "torch", DataLoader'] = _datasets(files, root, workers)
        found["webdataset, WebLoader"] = _webdataset(files, workers)
    return found


def _torchvision(files: Files, workers: int) -> Epoch:
    image_folder = require("torchvision.datasets", extra="bench", purpose=PURPOSE).ImageFolder
    return _first_of_pairs(_loader(image_folder(files.folder, _pil_crop()), workers, files.kind.batch))


def _torchvision_io(files: Files, workers: int) -> Epoch:
    image_folder = require("torchvision.datasets", extra="bench", purpose=PURPOSE).ImageFolder
    v2 = require("torchvision.transforms.v2", extra="bench", purpose=PURPOSE)
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    return _first_of_pairs(_loader(image_folder(files.folder, crop, loader=_read_tensor), workers, files.kind.batch))


def _read_tensor(path: str) -> Tensor:
    """By torchvision's own decoder, uint8 [3, H, W]."""
    return _decoded(require("torchvision.io", extra="bench", purpose=PURPOSE).read_file(path))


def _decoded(encoded: Tensor) -> Tensor:
    tv = require("torchvision.io", extra="bench", purpose=PURPOSE)
    with warnings.catch_warnings():
        # torchvision 0.29 announces that TorchCodec will take over its decoders.
        warnings.simplefilter("ignore", DeprecationWarning)
        image: Tensor = tv.decode_image(encoded, tv.ImageReadMode.RGB)
    return image


def _datasets(files: Files, root: Path, workers: int) -> Epoch:
    datasets = require("datasets", extra="bench", purpose=PURPOSE)
    table = datasets.load_dataset(str(files.parquet), split="train", cache_dir=str(root / "cache"))
    batch = files.kind.batch
    return _first_of_pairs(_loader(table.with_format("torch"), workers, batch, collate_fn=_crop_and_stack))


def _webdataset(files: Files, workers: int) -> Epoch:
    wds = require("webdataset", extra="bench", purpose=PURPOSE)
    shards = wds.WebDataset(files.shards, shardshuffle=len(files.shards)).shuffle(1000).decode("pil")
    pairs = shards.to_tuple("jpg", "cls").map_tuple(_pil_crop(), _same).batched(files.kind.batch)
    options = {"persistent_workers": True} if workers else {}
    return _first_of_pairs(wds.WebLoader(pairs, batch_size=None, num_workers=workers, **options))


def _loader(dataset: Any, workers: int, batch: int, **options: Any) -> Any:
    if workers:
        options["persistent_workers"] = True
    return torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers, **options)


def _first_of_pairs(loader: Any) -> Epoch:
    return lambda: (images for images, _ in loader)


def _pil_crop() -> Any:
    v1 = require("torchvision.transforms", extra="bench", purpose=PURPOSE)
    return v1.Compose([v1.RandomResizedCrop(SIZE), v1.PILToTensor()])


def _crop_and_stack(samples: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    v2 = require("torchvision.transforms.v2", extra="bench", purpose=PURPOSE)
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    return torch.stack([crop(one["image"]) for one in samples]), torch.stack([one["label"] for one in samples])


def _same(value: Any) -> Any:
    return value


def limit(files: Files, rounds: int) -> dict[str, tuple[float, float]]:
    """Images per second, and per CPU second, of a process that only decodes (and crops) what is in its memory.

    Args:
        files: The images.
        rounds: Number of measurements, of which the median counts.
    """
    from PIL import Image

    from robust_dist.data.decode import decode_rgb
    from robust_dist.data.fast_decode import fast_crop

    pixels = files.kind.width * files.kind.height
    encoded, crop = _first(files, max(4, 100 * USUAL.width * USUAL.height // pixels)), _crop()
    calls = {
        "bare PIL decode": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded],
        LIMITS[False]: lambda: [crop(decode_rgb(data), key) for key, data in enumerate(encoded)],
        LIMITS[True]: lambda: [fast_crop(data, crop, key) for key, data in enumerate(encoded)],
    }
    times = interleaved(calls, rounds=rounds)
    return {
        name: (len(encoded) / timing.median, len(encoded) / (timing.cpu or timing.median))
        for name, timing in times.items()
    }


def _first(files: Files, most: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(files.folder.rglob("0*.*"))[:most]]


def levels(files: Files) -> dict[str, tuple[float, float]]:
    """Differences from the exact pixels of the same boxes, out of 255: mean and largest, by contender.

    Args:
        files: The images, of which the first ones are used.
    """
    from robust_dist.data.decode import decode_rgb
    from robust_dist.data.fast_decode import fast_crop, resized
    from robust_dist.data.image_cache import shrunk

    crop = _crop()

    def cached(data: bytes, key: int) -> Tensor:
        found = shrunk(data, crop.pixels_needed, fast=True)
        return resized(found.rows, crop.window(*found.size, key), *found.scales)

    ways: dict[str, Callable[[bytes, int], Tensor]] = {
        EXACT: lambda data, key: crop(decode_rgb(data), key),
        FAST: lambda data, key: fast_crop(data, crop, key),
        CACHED: cached,
        TORCHVISION_IO: _torchvision_box,
    }
    encoded = list(enumerate(_first(files, COMPARED)))
    exact = [ways[EXACT](data, key).short() for key, data in encoded]
    found = {}
    for name, way in ways.items():
        apart = [(way(data, key).short() - one).abs() for (key, data), one in zip(encoded, exact, strict=True)]
        found[name] = torch.stack(apart).float().mean().item(), float(max(one.max() for one in apart))
    return found


def _torchvision_box(data: bytes, key: int) -> Tensor:
    v2 = require("torchvision.transforms.v2.functional", extra="bench", purpose=PURPOSE)
    image = _decoded(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    left, top, right, bottom = map(int, _crop().window(image.shape[2], image.shape[1], key).box)
    made: Tensor = v2.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE], antialias=True)
    return made


def consume(epoch: Epoch) -> tuple[int, Tensor]:
    """Iterate over an epoch; returns its number of images and its first batch.

    Raises:
        ValueError: A batch is not uint8 [B, 3, 224, 224].
    """
    images, first = 0, None
    for batch in epoch():
        if batch.dtype != torch.uint8 or batch.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"a batch must be uint8 [B, 3, {SIZE}, {SIZE}], got {batch.dtype} {list(batch.shape)}")
        first = batch if first is None else first
        images += len(batch)
    if first is None:
        raise ValueError("an epoch gave no batch")
    return images, first


def wait_share(epoch: Epoch, seconds: float) -> float:
    """The share of its time in which a consumer waits for batches, 0 to 1, from the second batch on.

    Args:
        epoch: Gives the batches of an epoch.
        seconds: Time that the consumer spends on a batch.
    """
    batches = epoch()
    next(batches)
    start, waited = time.perf_counter(), 0.0
    while True:
        time.sleep(seconds)
        asked = time.perf_counter()
        if next(batches, None) is None:
            return waited / (asked - start)
        waited += time.perf_counter() - asked


def _look(epoch: Epoch) -> tuple[int, bool]:
    """The number of images of an epoch, and whether the next epoch's first batch differs."""
    images, first = consume(epoch)
    return images, not torch.equal(first, next(epoch()))


def _rows(contenders: Mapping[str, Epoch], rounds: int, step_ms: float | None, batch: int) -> tuple[list[Row], float]:
    looks = {name: _look(epoch) for name, epoch in contenders.items()}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}

    def run(name: str) -> None:
        before = _cpu_seconds()
        consume(contenders[name])
        cpu[name].append(_cpu_seconds() - before)

    times = interleaved({name: partial(run, name) for name in contenders}, rounds=rounds)
    fastest = min(times[name].median / looks[name][0] for name in contenders if name != CACHED)
    seconds = step_ms / 1e3 if step_ms is not None else batch * fastest / LOAD
    shares: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, epoch in contenders.items():
            shares[name].append(wait_share(epoch, seconds))
    middle = statistics.median
    return [
        Row(name, times[name], *looks[name], middle(shares[name]), middle(cpu[name])) for name in contenders
    ], seconds


def _cpu_seconds() -> float:
    """CPU seconds that this process and its workers have used so far."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _table(
    rows: Sequence[Row],
    bare: Mapping[str, tuple[float, float]],
    cores: int,
    seconds: float,
    apart: Mapping[str, tuple[float, float]],
) -> str:
    yardstick = next(row for row in rows if row.name == YARDSTICK)
    best = {fast: bare[name][0] * cores for fast, name in LIMITS.items()}
    head = ["reader", "images/s", "slowest to fastest", "times torchvision", "of the limit"]
    head += [f"data wait at {seconds * 1e3:.0f} ms a batch", "images an epoch", "epochs differ"]
    head += ["levels from exact: mean, most", "CPU ms an image"]
    lines = []
    for row in rows:
        speed, low, high = (row.images / t for t in (row.timing.median, row.timing.high, row.timing.low))
        ratio = speed * yardstick.timing.median / yardstick.images
        share = "" if row.name == CACHED else f"{speed / best[row.name == FAST]:.0%}"
        cells = [row.name, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{ratio:.2f}", share]
        cells += [f"{row.wait:.1%}", f"{row.images:,}", "yes" if row.differ else "no"]
        cells.append("{:.2f}, {:.0f}".format(*apart[row.name]) if row.name in apart else "")
        cells.append(f"{1e3 * row.cpu / row.images:.2f}")
        lines.append(cells)
    for name, (speed, of_cpu) in bare.items():
        cells = [f"limit: {name}, one process x {cores} cores", f"{speed * cores:,.0f}", "", ""]
        lines.append([*cells, f"{speed * cores / best[False]:.0%}", "", "", "", "", f"{1e3 / of_cpu:.2f}"])
    return table(head, lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    bars = require("datasets", extra="bench", purpose=PURPOSE)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()


def bench_data(
    *,
    images: int | None = None,
    workers: int | None = None,
    rounds: int = 5,
    step_ms: float | None = None,
    size: str = "500x375",
    format: str = "jpeg",
) -> str:
    """Times of our loader over each format and of the peers, in turn, on generated pictures, on the CPU.

    Every contender reads, decodes, crops at random to 224 x 224 and stacks batches in as many workers, which live
    through all rounds. What an epoch gives is counted, not asserted: its number of images, and whether the next epoch
    is another one.

    Args:
        images: How many, at least one per worker and class; None: depends on the size.
        workers: Processes of each contender; None: the processor's cores.
        rounds: Turns of every contender, at least 1.
        size: The pictures' size, a key of `KINDS`.
        format: jpeg or png.
        step_ms: What the consumer takes for a batch, in ms, where data wait is measured; where not given, so long that
            the fastest contender is busy for 80 % of it.

    Returns:
        A Markdown table; images per second are medians over the rounds.

    Raises:
        ValueError: A number out of range.
    """
    from robust_dist.data.fast_decode import decoder_name

    cores = len(os.sched_getaffinity(0))
    workers = cores if workers is None else workers
    kind = KINDS[size]
    images = max(kind.images, workers) if images is None else images
    for name, value, low in (("images", images, max(workers, CLASSES)), ("workers", workers, 0), ("rounds", rounds, 1)):
        whole_number(name, value, low)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        root = Path(folder)
        files = write_files(root, images, max(8, 2 * workers), kind, format)
        contenders = ours(files, root, workers) | peers(files, root, workers)
        rows, seconds = _rows(contenders, rounds, step_ms, kind.batch)
        text = _table(rows, limit(files, rounds), cores, seconds, levels(files))
        contenders.clear()
    notes = [
        f"{images:,} {format.upper()}s of {size} pixels and {files.mean_bytes / 1e3:,.0f} kB from the system's cache, "
        f"to batches of {kind.batch} at {SIZE}x{SIZE}, {workers} workers each; fast by {decoder_name()}.",
        "Of the limit: of a process that does nothing but decode and crop in the same way, times the cores. With a "
        "cache the epochs are those after the first.",
        f"Medians of {rounds} rounds, every contender in turn. {machine()}.",
        "CPU time is that of the reading process and its workers; other work on the machine hardly changes it.",
        "Data wait: what a consumer that sleeps so long over each batch waits, in its time from the second batch on.",
    ]
    return "\n".join([text, "", *notes])
