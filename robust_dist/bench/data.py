"""Reading images that do not fit a device, beside the peers and the limit: `robust-dist bench data`."""

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_dist.bench.data_files import Files, write_files
from robust_dist.bench.timing import Timing, interleaved, machine
from robust_dist.extras import require
from robust_dist.measure.table import table
from robust_dist.validate import whole_number

SIZE = 224
BATCH = 64
LOAD = 0.8
YARDSTICK = "torchvision ImageFolder, DataLoader"

Epoch = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        name: What reads.
        timing: Seconds an epoch.
        images: Images that an epoch gave, as counted.
        differ: Whether a second epoch gave other batches than the first one, as found by looking.
        wait: Share of the time that a consumer waited for batches (median over the rounds).
    """

    name: str
    timing: Timing
    images: int
    differ: bool
    wait: float


def ours(files: Files, root: Path, workers: int) -> dict[str, Epoch]:
    """Epochs of our Loader over each format, by name.

    Args:
        files: The images.
        root: A folder for caches.
        workers: Processes that read.
    """
    from robust_dist.data.folder import open_image_folder
    from robust_dist.data.hub import open_hub
    from robust_dist.data.shards import open_webdataset

    cache, spool = str(root / "cache"), str(root / "spool")
    sources = {
        "Loader (ours), image folder": open_image_folder(files.folder),
        "Loader (ours), Hugging Face Arrow": open_hub(str(files.parquet), "train", cache_dir=cache),
        "Loader (ours), parquet streamed": open_hub(str(files.parquet), "train", streaming=True, spool_dir=spool),
        "Loader (ours), WebDataset shards": open_webdataset(files.shards),
    }
    return {name: _stream(source, workers) for name, source in sources.items()}


def _stream(source: Any, workers: int) -> Epoch:
    from robust_dist.data.batches import Cut
    from robust_dist.data.crops import RandomCrop
    from robust_dist.data.stream_set import StreamSet

    crop = RandomCrop(SIZE, (0.08, 1.0), (3 / 4, 4 / 3))
    loader = StreamSet(source, crop, torch.device("cpu"), workers=workers).loader(Cut(BATCH, seed=0))
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
    return {
        YARDSTICK: _torchvision(files, workers),
        'datasets, format "torch", DataLoader': _datasets(files, root, workers),
        "webdataset, WebLoader": _webdataset(files, workers),
    }


def _torchvision(files: Files, workers: int) -> Epoch:
    image_folder = require("torchvision.datasets", extra="bench", purpose="the data benchmark").ImageFolder
    return _first_of_pairs(_loader(image_folder(files.folder, _pil_crop()), workers))


def _datasets(files: Files, root: Path, workers: int) -> Epoch:
    datasets = require("datasets", extra="bench", purpose="the data benchmark")
    table = datasets.load_dataset(str(files.parquet), split="train", cache_dir=str(root / "cache"))
    return _first_of_pairs(_loader(table.with_format("torch"), workers, collate_fn=_crop_and_stack))


def _webdataset(files: Files, workers: int) -> Epoch:
    wds = require("webdataset", extra="bench", purpose="the data benchmark")
    shards = wds.WebDataset(files.shards, shardshuffle=len(files.shards)).shuffle(1000).decode("pil")
    pairs = shards.to_tuple("jpg", "cls").map_tuple(_pil_crop(), _same).batched(BATCH)
    options = {"persistent_workers": True} if workers else {}
    return _first_of_pairs(wds.WebLoader(pairs, batch_size=None, num_workers=workers, **options))


def _loader(dataset: Any, workers: int, **options: Any) -> Any:
    if workers:
        options["persistent_workers"] = True
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, **options)


def _first_of_pairs(loader: Any) -> Epoch:
    return lambda: (images for images, _ in loader)


def _pil_crop() -> Any:
    v1 = require("torchvision.transforms", extra="bench", purpose="the data benchmark")
    return v1.Compose([v1.RandomResizedCrop(SIZE), v1.PILToTensor()])


def _crop_and_stack(samples: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    v2 = require("torchvision.transforms.v2", extra="bench", purpose="the data benchmark")
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    return torch.stack([crop(one["image"]) for one in samples]), torch.stack([one["label"] for one in samples])


def _same(value: Any) -> Any:
    return value


def limit(files: Files, rounds: int) -> dict[str, float]:
    """Images per second of one process that does nothing but decode (and crop) what lies in its memory.

    Args:
        files: The images.
        rounds: Measurements, of which the median counts.
    """
    from PIL import Image

    from robust_dist.data.decode import decode_rgb, random_resized_crop

    paths = sorted(files.folder.rglob("*.jpg"))[:100]
    encoded = [path.read_bytes() for path in paths]
    calls = {
        "bare PIL decode": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded],
        "decode and crop": lambda: [random_resized_crop(decode_rgb(data), SIZE, k) for k, data in enumerate(encoded)],
    }
    times = interleaved(calls, rounds=rounds)
    return {name: len(encoded) / timing.median for name, timing in times.items()}


def consume(epoch: Epoch) -> tuple[int, Tensor]:
    """Walk an epoch: how many images it gave, and its first batch.

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
    """The share of its time that a consumer waits for batches, 0 to 1, from the second batch on.

    Args:
        epoch: Gives the batches of an epoch.
        seconds: What the consumer takes for a batch.
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
    """How many images an epoch gives, and whether the next one's first batch is another."""
    images, first = consume(epoch)
    return images, not torch.equal(first, next(epoch()))


def _rows(contenders: Mapping[str, Epoch], rounds: int, step_ms: float | None) -> tuple[list[Row], float]:
    looks = {name: _look(epoch) for name, epoch in contenders.items()}
    times = interleaved({name: partial(consume, epoch) for name, epoch in contenders.items()}, rounds=rounds)
    fastest = min(times[name].median / looks[name][0] for name in contenders)
    seconds = step_ms / 1e3 if step_ms is not None else BATCH * fastest / LOAD
    shares: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, epoch in contenders.items():
            shares[name].append(wait_share(epoch, seconds))
    return [Row(name, times[name], *looks[name], statistics.median(shares[name])) for name in contenders], seconds


def _table(rows: Sequence[Row], bare: Mapping[str, float], cores: int, seconds: float) -> str:
    yardstick = next(row for row in rows if row.name == YARDSTICK)
    best = bare["decode and crop"] * cores
    head = ["reader", "images/s", "slowest to fastest", "times torchvision", "of the limit"]
    head += [f"data wait at {seconds * 1e3:.0f} ms a batch", "images an epoch", "epochs differ"]
    lines = []
    for row in rows:
        speed, low, high = (row.images / t for t in (row.timing.median, row.timing.high, row.timing.low))
        ratio = speed * yardstick.timing.median / yardstick.images
        cells = [row.name, f"{speed:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{ratio:.2f}", f"{speed / best:.0%}"]
        cells += [f"{row.wait:.1%}", f"{row.images:,}", "yes" if row.differ else "no"]
        lines.append(cells)
    for name, speed in bare.items():
        cells = [f"limit: {name}, one process x {cores} cores", f"{speed * cores:,.0f}", "", ""]
        lines.append([*cells, f"{speed * cores / best:.0%}", "", "", ""])
    return table(head, lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    bars = require("datasets", extra="bench", purpose="the data benchmark")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()


def bench_data(
    *, images: int = 2_000, workers: int | None = None, rounds: int = 5, step_ms: float | None = None
) -> str:
    """Times of our loader over each format and of the peers, in turn, on JPEGs that are made for it, on the CPU.

    Every contender reads, decodes, crops at random to 224 x 224 and stacks batches of 64 in as many workers, which live
    through all rounds. What an epoch gives is looked at, not asserted: its number of images, and whether the next epoch
    is another one.

    Args:
        images: How many, of about 500 x 375 pixels and 110 kB, at least one a worker; files are read from the system's
            cache.
        workers: Processes of each contender; the processor's cores where not given.
        rounds: Turns of every contender, at least 1.
        step_ms: What the consumer takes for a batch, in ms, where data wait is measured; where not given, so long that
            the fastest contender is busy for 80 % of it.

    Returns:
        A Markdown table; images per second are medians over the rounds.

    Raises:
        ValueError: For a number out of range.
    """
    cores = len(os.sched_getaffinity(0))
    workers = cores if workers is None else workers
    for name, value, low in (("images", images, max(workers, 1)), ("workers", workers, 0), ("rounds", rounds, 1)):
        whole_number(name, value, low)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        root = Path(folder)
        files = write_files(root, images, shards=max(8, 2 * workers))
        contenders = ours(files, root, workers) | peers(files, root, workers)
        rows, seconds = _rows(contenders, rounds, step_ms)
        text = _table(rows, limit(files, rounds), cores, seconds)
        contenders.clear()
    notes = [
        f"{images:,} JPEGs of 500x375 pixels and {files.mean_bytes / 1e3:.0f} kB from the system's cache, to batches "
        f"of {BATCH} at {SIZE}x{SIZE}, {workers} workers each.",
        f"Medians of {rounds} rounds, every contender in turn. {machine()}.",
        "Data wait: what a consumer that sleeps so long over each batch waits, in its time from the second batch on.",
    ]
    return "\n".join([text, "", *notes])
