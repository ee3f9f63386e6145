"""A small set to try a recipe on: `python -m robust_dist.data.pictures FOLDER` writes digits as files of images."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from robust_dist.data.digits import load_digits

# Scans of the digit that has the fewest.
FEWEST = 174


def write_pictures(folder: Path, count: int) -> int:
    """Write PNG files of 32x32 pixels, `folder`/DIGIT/NUMBER.png: as many scans of each digit.

    Returns:
        How many were written: count, rounded down to a multiple of 10.

    Raises:
        FileExistsError: `folder` is there.
        ValueError: `count` is not between 10 and 1,740.
    """
    if not 10 <= count <= FEWEST * 10:
        raise ValueError(f"--count {count} must be between 10 and {FEWEST * 10}")
    folder.mkdir(parents=True)
    parts = [load_digits(folder, train, False) for train in (True, False)]
    for label, name in enumerate(parts[0].classes):
        (folder / name).mkdir()
        scans = torch.cat([part.images[part.labels == label] for part in parts])
        for number, scan in enumerate(scans[: count // 10]):
            Image.fromarray(scan.permute(1, 2, 0).numpy()).save(folder / name / f"{number:03d}.png")
    return count // 10 * 10


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m robust_dist.data.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--count", type=int, default=300, help="pictures (default: %(default)s)")
    words = parser.parse_args()
    try:
        print(f"wrote {write_pictures(words.folder, words.count)} pictures into {words.folder}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
