"""The image sets that `robust-dist bench data` makes: pictures of usual sizes, in each format."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from robust_dist.extras import require

QUALITY = 92
CLASSES = 10
ROW_GROUP = 100


@dataclass(frozen=True)
class Kind:
    """The properties of the pictures.

    Attributes:
        width: Pixels.
        height: Pixels.
        images: How many are made by default.
        batch: Images in a contender's batch.
        scenes: Number of scenes from which they are cut.
        sharpness: The share left of the highest frequency's amplitude: a downscaled picture is sharp, one with
            a camera's own pixels is softened by lens and demosaicing, and has fewer bytes per pixel.
    """

    width: int
    height: int
    images: int
    batch: int
    scenes: int
    sharpness: float


KINDS = {
    "500x375": Kind(500, 375, images=512, batch=64, scenes=24, sharpness=1.0),
    "1600x1200": Kind(1600, 1200, images=96, batch=8, scenes=3, sharpness=0.25),
    "4000x3000": Kind(4000, 3000, images=16, batch=2, scenes=1, sharpness=0.1),
}
USUAL = KINDS["500x375"]


@dataclass(frozen=True)
class Files:
    """The same images in each format.

    Attributes:
        folder: Holds a folder for each class.
        parquet: A folder of parquet files; None if they were not wanted.
        shards: Paths of tar shards; empty if they were not wanted.
        images: Number of images.
        mean_bytes: Mean bytes of an encoded image.
    """

    folder: Path
    parquet: Path | None
    shards: list[str]
    images: int
    mean_bytes: float
    kind: Kind = USUAL


def write_files(root: Path, images: int, shards: int, kind: Kind = USUAL, format: str = "jpeg") -> Files:
    """The same pictures as an image folder and, for JPEGs of the usual size, as parquet files and tar shards.

    Args:
        root: The folder to write below.
        images: How many.
        shards: Number of tar files.
        kind: The properties of the pictures.
        format: jpeg or png.
    """
    encoded = list(islice(pictures(kind=kind, format=format), images))
    all_formats = kind is USUAL and format == "jpeg"
    return Files(
        _write_folder(root / "folder", encoded, ".jpg" if format == "jpeg" else ".png"),
        _write_parquet(root / "parquet", encoded) if all_formats else None,
        _write_shards(root / "shards", encoded, shards) if all_formats else [],
        images,
        sum(map(len, encoded)) / images,
        kind,
    )


def pictures(seed: int = 0, kind: Kind = USUAL, format: str = "jpeg") -> Iterator[bytes]:
    """An endless sequence of encoded images: noise with a photograph's spectrum, so decoding is as much work."""
    image = require("PIL.Image", extra="data", purpose="the data benchmark")
    rng = np.random.default_rng(seed)
    scenes = [_scene(rng, kind) for _ in range(kind.scenes)]
    while True:
        pixels = np.roll(scenes[rng.integers(kind.scenes)], rng.integers(kind.width, size=2), axis=(0, 1))
        file = io.BytesIO()
        options = {"quality": QUALITY} if format == "jpeg" else {}
        image.fromarray(pixels).save(file, format, **options)
        yield file.getvalue()


def _scene(rng: np.random.Generator, kind: Kind) -> np.ndarray:
    """uint8 [height, width, 3] whose amplitudes fall with frequency; brightness varies more than colour."""
    height, width = kind.height, kind.width
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    falling = kind.sharpness ** (4 * frequency**2) / np.maximum(frequency, 1 / width) ** 1.1
    planes = [
        np.fft.irfft2(falling * np.exp(2j * np.pi * rng.random(falling.shape)), (height, width)) for _ in range(3)
    ]
    brightness, *colour = (plane / plane.std() for plane in planes)
    mixed = np.stack([brightness + 0.3 * colour[0], brightness, brightness + 0.3 * colour[1]], axis=-1)
    scaled: np.ndarray = (128 + 45 * mixed).clip(0, 255).astype(np.uint8)
    return scaled


def _write_folder(folder: Path, encoded: list[bytes], ending: str) -> Path:
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for number, data in enumerate(encoded):
        (folder / f"class{number % CLASSES}" / f"{number:06d}{ending}").write_bytes(data)
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
