"""What becomes of images that could not be read: counted, their names kept, and too many of them an error."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from robust_dist.data.errors import BadImage, DataError
from robust_dist.data.names import as_line, printable
from robust_dist.train.agree import attempt

SHOWN = 5


class BadImages:
    """Counts an epoch's bad images, over all ranks, and stops the run on every rank where there are too many.

    The ranks speak of it after steps 1, 2, 4, 8, ... of an epoch, at checkpoints and at its end, and not at each step.
    What is too many is a share of the whole epoch's images, so that whether a set will do does not depend on the order
    in which an epoch comes upon its bad ones.

    Args:
        accelerator: The run's ranks.
        path: The file that keeps the names, one bad image a line: where it is, a tab, what is wrong. The bytes are the
            names' own, UTF-8 or not; a line feed, a tab and a backslash in one are written as in C.
        max_share: The largest share of bad images that is let pass.
    """

    def __init__(self, accelerator: Accelerator, path: Path, max_share: float) -> None:
        self.accelerator, self.path, self.max_share = accelerator, path, max_share
        self._unsaid: list[BadImage] = []

    def note(self, found: Sequence[BadImage]) -> None:
        """Keep this rank's bad images until the ranks next speak."""
        self._unsaid += found

    def settle(self, count: int, of: int, name: str) -> int:
        """Tell the main process of this rank's bad images; all ranks must call it.

        Args:
            count: This rank's bad images of the epoch, or of the evaluation, so far.
            of: Images of the whole epoch or evaluation.
            name: Of the set.

        Returns:
            How many there are on all ranks.

        Raises:
            DataError: More than the share that is let pass; on every rank.
        """
        mine = [(count, self._unsaid)]
        ranks = mine if self.accelerator.num_processes == 1 else gather_object(mine)
        self._unsaid = []
        total: int = sum(one for one, _ in ranks)
        unsaid = [image for _, images in ranks for image in images]
        judge = self.accelerator.is_main_process
        attempt(self.accelerator, lambda: self._judge(unsaid, total, of, name), here=judge)
        return total

    def _judge(self, found: Sequence[BadImage], total: int, of: int, name: str) -> None:
        new = self._keep(found)
        if new:
            self.accelerator.print(f"{len(new)} images could not be read (see {self.path}): {_some(new)}")
        if total > self.max_share * of:
            raise DataError(
                f"{name}: {total} of {of} images could not be read, more than data.max_bad_share={self.max_share} "
                f"lets pass; they are named in {self.path}. Mend or remove them, or raise "
                "data.max_bad_share"
            )

    def _keep(self, found: Sequence[BadImage]) -> list[BadImage]:
        """Write down those that the file does not name yet; returns them."""
        if not found:
            return []
        known = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        named = {line.partition(b"\t")[0] for line in known}
        new = {where: image for image in found if (where := as_line(image.where)) not in named}
        with self.path.open("ab") as file:
            for where, image in new.items():
                file.write(b"%s\t%s\n" % (where, printable(" ".join(image.reason.split())).encode()))
        return list(new.values())


def is_time_to_settle(step: int) -> bool:
    """Whether `step`, counted from 1 in its epoch, is a power of two."""
    return step & (step - 1) == 0


def _some(images: Sequence[BadImage]) -> str:
    shown = "; ".join(printable(f"{image.where} ({image.reason})") for image in images[:SHOWN])
    return shown + (f"; and {len(images) - SHOWN} more" if len(images) > SHOWN else "")
