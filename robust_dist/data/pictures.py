"""A small set to try a recipe on: `python -m robust_dist.data.pictures FOLDER` writes digits as image files."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from robust_dist.data.registry import load_digits

# Number of scans of the rarest digit.
FEWEST = 174


def write_pictures(folder: Path, count: int, side: int | None = None) -> int:
    """Write files `folder`/DIGIT/NUMBER.png, the same number for each digit; returns the total.

    Args:
        folder: Created here.
        count: Number of files; rounded down to a multiple of 10.
        side: Makes them JPEGs with this many pixels per side, enlarged, with noise of a photograph's spectrum; if None,
            PNGs of 32x32 pixels.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: `count` is not between 10 and 1,740, or `side` not between 32 and 4096.
    """
    if not 10 <= count <= FEWEST * 10:
        raise ValueError(f"--count {count} must be between 10 and {FEWEST * 10}")
    if side is not None and not 32 <= side <= 4096:
        raise ValueError(f"--jpeg {side} must be between 32 and 4096")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = [load_digits(folder, train, False) for train in (True, False)]
    for label, name in enumerate(parts[0].classes):
        (folder / name).mkdir()
        scans = torch.cat([part.images[part.labels == label] for part in parts])
        for number, scan in enumerate(scans[: count // 10]):
            picture = Image.fromarray(scan.permute(1, 2, 0).numpy())
            if side is None:
                picture.save(folder / name / f"{number:03d}.png")
            else:
                _noisy(picture, side, rng).save(folder / name / f"{number:03d}.jpg", quality=90)
    return count // 10 * 10


def _noisy(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """The picture, enlarged, with noise whose amplitudes fall with frequency."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    noise = np.fft.irfft2(phases / np.maximum(frequency, 1 / side), (side, side)).transpose(1, 2, 0)
    levels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) + 40 * noise / noise.std()
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m robust_dist.data.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--count", type=int, default=300, help="number of pictures (default: %(default)s)")
    parser.add_argument(
        "--jpeg", type=int, metavar="SIDE", help="write noisy JPEGs of SIDE pixels (default: PNGs of 32 pixels)"
    )
    words = parser.parse_args()
    try:
        print(f"wrote {write_pictures(words.folder, words.count, words.jpeg)} pictures into {words.folder}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
