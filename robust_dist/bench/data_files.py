"""The image set that `robust-dist bench data` makes for itself: JPEGs of a usual size, in each format."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from robust_dist.extras import require

WIDTH, HEIGHT = 500, 375
QUALITY = 92
CLASSES = 10
SCENES = 24
ROW_GROUP = 100


@dataclass(frozen=True)
class Files:
    """The same images in each format.

    Attributes:
        folder: of class folders.
        parquet: a folder of parquet files.
        shards: paths of tar shards.
        images: how many there are.
        mean_bytes: of an encoded image.
    """

    folder: Path
    parquet: Path
    shards: list[str]
    images: int
    mean_bytes: float


def write_files(root: Path, images: int, shards: int) -> Files:
    """The same JPEGs as an image folder, as parquet files and as tar shards.

    Args:
        root: The folder to write below.
        images: How many.
        shards: Tar files.
    """
    encoded = list(islice(jpegs(), images))
    return Files(
        _write_folder(root / "folder", encoded),
        _write_parquet(root / "parquet", encoded),
        _write_shards(root / "shards", encoded, shards),
        images,
        sum(map(len, encoded)) / images,
    )


def jpegs(seed: int = 0) -> Iterator[bytes]:
    """Encoded images without end: noise with a photograph's spectrum, so that a decoder has a photograph's work."""
    image = require("PIL.Image", extra="data", purpose="the data benchmark")
    rng = np.random.default_rng(seed)
    scenes = [_scene(rng) for _ in range(SCENES)]
    while True:
        pixels = np.roll(scenes[rng.integers(SCENES)], rng.integers(WIDTH, size=2), axis=(0, 1))
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def _scene(rng: np.random.Generator) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3] whose amplitudes fall with frequency; brightness varies more than colour."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :])
    falling = 1 / np.maximum(frequency, 1 / WIDTH) ** 1.1
    planes = [
        np.fft.irfft2(falling * np.exp(2j * np.pi * rng.random(falling.shape)), (HEIGHT, WIDTH)) for _ in range(3)
    ]
    brightness, *colour = (plane / plane.std() for plane in planes)
    mixed = np.stack([brightness + 0.3 * colour[0], brightness, brightness + 0.3 * colour[1]], axis=-1)
    scaled: np.ndarray = (128 + 45 * mixed).clip(0, 255).astype(np.uint8)
    return scaled


def _write_folder(folder: Path, encoded: list[bytes]) -> Path:
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for number, data in enumerate(encoded):
        (folder / f"class{number % CLASSES}" / f"{number:06d}.jpg").write_bytes(data)
    return folder


def _write_parquet(folder: Path, encoded: list[bytes]) -> Path:
    datasets = require("datasets", extra="data", purpose="the data benchmark")
    names = [f"class{label}" for label in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (folder / "data").mkdir(parents=True)
    columns = {
        "image": [{"bytes": data, "path": None} for data in encoded],
        "label": [number % CLASSES for number in range(len(encoded))],
    }
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"), batch_size=ROW_GROUP)
    return folder


def _write_shards(folder: Path, encoded: list[bytes], shards: int) -> list[str]:
    folder.mkdir(parents=True)
    paths = [str(folder / f"train-{number:04d}.tar") for number in range(shards)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for number in range(shard, len(encoded), shards):
                for name, data in (
                    (f"{number:06d}.jpg", encoded[number]),
                    (f"{number:06d}.cls", b"%d" % (number % CLASSES)),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths
