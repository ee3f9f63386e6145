"""Unreadable images: counted and listed, and an error if there are too many."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from robust_dist.data.batches import even_cuts
from robust_dist.data.decode import check_header
from robust_dist.data.errors import BadImage, BadImageError, DataError
from robust_dist.data.identity import spread
from robust_dist.data.parquet import is_remote
from robust_dist.data.sets import LabelledSet
from robust_dist.data.source import ImageSource, as_line, printable
from robust_dist.ranks.talk import gather, on_rank_0, raise_together, rank, world_size

SHOWN = 5
# The check of evaluation images before the first step: threads, seconds, and maximum number of images.
READERS, SECONDS, LOOKED_AT = 8, 5.0, 100_000


class TooManyBadImagesError(DataError):
    """More images are unreadable than data.max_bad_share allows."""


class BadImages:
    """Counts an epoch's bad images over all ranks, and stops the run on every rank if there are too many.

    Ranks exchange counts after steps 1, 2, 4, 8, ... of an epoch, at checkpoints and at its end. The limit is a
    fraction of the whole epoch's images, so the order in which an epoch meets its bad ones does not matter.

    Args:
        path: The list of bad images, one per line: where it is, a tab, what is wrong. Names keep their own bytes, UTF-8
            or not, with line feeds, tabs and backslashes escaped as in C.
        max_share: The largest fraction of bad images allowed.
    """

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self._unsaid: list[BadImage] = []

    def note(self, found: Sequence[BadImage]) -> None:
        """Keep this rank's bad images until the ranks next exchange counts."""
        self._unsaid += found

    def count(self, count: int) -> int:
        """This rank's bad images of the epoch or evaluation so far, summed over ranks; a collective."""
        ranks = gather((count, self._unsaid))
        self._unsaid = []
        unsaid = [image for _, images in ranks for image in images]
        on_rank_0(lambda: self._tell(unsaid))
        return sum(count for count, _ in ranks)

    def judge(self, total: int, of: int, name: str, *, forgiven: int = 0) -> None:
        """Stop the run on every rank if there are too many; a collective.

        Args:
            total: Bad images on all ranks.
            of: Images of the whole epoch or evaluation.
            name: The set's name.
            forgiven: Number of them that stopped the run before; they do not stop it again.

        Raises:
            TooManyBadImagesError: There are more than allowed.
        """
        if total - forgiven > self.max_share * of:
            error = TooManyBadImagesError(
                f"{name}: {total} of {of} images could not be read, more than data.max_bad_share={self.max_share} "
                f"allows; they are listed in {self.path}. Replace them, or raise data.max_bad_share, and start again: "
                f"the run resumes from here"
            )
            raise_together(error)

    def count_evaluation(self, test_set: LabelledSet) -> int:
        """Count and judge the bad images of a finished evaluation; a collective."""
        found = test_set.take_bad()
        self.note(found)
        total = self.count(len(found))
        self.judge(total, len(test_set), test_set.name)
        return total

    def check_headers(self, test_set: LabelledSet) -> None:
        """Check evaluation images' headers, before an epoch is trained that could not be evaluated; a collective.

        The ranks share the images, and stop after a few seconds; evaluation finds the rest.
        """
        source = getattr(test_set, "source", None)
        if source is None or any(is_remote(stretch.name) for stretch in getattr(source, "stretches", list)()):
            return
        start, stop = even_cuts(len(source), world_size())[rank()]
        found = unreadable(source, start, stop)
        self.note(found)
        self.judge(self.count(len(found)), len(source), test_set.name)

    def _tell(self, found: Sequence[BadImage]) -> None:
        new = self._keep(found)
        if new:
            print(f"{len(new)} images could not be read (see {self.path}): {_some(new)}")

    def _keep(self, found: Sequence[BadImage]) -> list[BadImage]:
        """Write those that are not yet in the file; returns them."""
        if not found:
            return []
        known = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        named = {line.partition(b"\t")[0] for line in known}
        new = {where: image for image in found if (where := as_line(image.where)) not in named}
        with self.path.open("ab") as file:
            for where, image in new.items():
                file.write(b"%s\t%s\n" % (where, printable(" ".join(image.reason.split())).encode()))
        return list(new.values())


def is_time_to_count(step: int) -> bool:
    """Whether `step`, counted from 1 in its epoch, is a power of two."""
    return step & (step - 1) == 0


def unreadable(source: ImageSource, start: int, stop: int, seconds: float = SECONDS) -> list[BadImage]:
    """The images from start to stop whose headers show that they are bad, as far as `seconds` allow."""
    end = time.monotonic() + seconds

    def check(index: int) -> BadImage | None:
        if time.monotonic() > end:
            return None
        try:
            check_header(source.read(index)[0])
        except BadImageError as error:
            return BadImage(source.where(index), str(error))
        return None

    # In random order, so that an unfinished check has covered every part.
    indices = [start + index for index in spread(stop - start, LOOKED_AT)]
    random.Random(0).shuffle(indices)
    with ThreadPoolExecutor(READERS) as pool:
        return [bad for bad in pool.map(check, indices) if bad is not None]


def _some(images: Sequence[BadImage]) -> str:
    shown = "; ".join(printable(f"{image.where} ({image.reason})") for image in images[:SHOWN])
    return shown + (f"; and {len(images) - SHOWN} more" if len(images) > SHOWN else "")
