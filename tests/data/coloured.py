"""An ImageSource whose images have one colour each, which encodes the sample's number and survives any crop."""

import io
import os

import torch
from PIL import Image

from robust_dist.data.batches import Cut
from robust_dist.data.decode import RandomCrop
from robust_dist.data.errors import BadImageError
from robust_dist.data.stream_set import StreamSet

CLASSES = tuple("abcdefg")


class Coloured:
    """Sample i is a PNG of the colour (i // 256, i % 256, label) with the label i % 7; those in `bad` are not PNGs."""

    def __init__(self, *group_sizes, bad=(), gone=(), log=None):
        self.name, self.classes, self.group_sizes = "coloured", CLASSES, group_sizes
        self.bad, self.gone, self.log = frozenset(bad), frozenset(gone), log

    def __len__(self):
        return sum(self.group_sizes)

    def read(self, index):
        self.note(index)
        if index in self.gone:
            raise BadImageError("No such file")
        file = io.BytesIO()
        Image.new("RGB", (5, 4), colour(index)).save(file, "PNG")
        return file.getvalue()[:30] if index in self.bad else file.getvalue(), index % 7

    def where(self, index):
        return f"sample {index}"

    def note(self, index):
        """Append the number to the log file in one write, so that workers may share it."""
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as file:
                file.write(b"%d\n" % index)


def stream_loader(source, *, workers=0, device="cpu", prefetch=2, shuffle_window=24, **cut):
    """The Loader of a set that is read during training, with images of 4 x 4."""
    crop = RandomCrop(4, (0.08, 1.0), (3 / 4, 4 / 3))
    reading = {"workers": workers, "prefetch": prefetch, "shuffle_window": shuffle_window}
    return StreamSet(source, crop, torch.device(device), **reading).loader(Cut(**cut))


class Deadly(Coloured):
    """Sample 0 kills the process that reads it, as the system does when out of memory."""

    def read(self, index):
        if index == 0:
            os.kill(os.getpid(), 9)
        return super().read(index)


class Failing(Coloured):
    """Reading any sample raises an error unrelated to samples, worded like that of a lost worker."""

    def read(self, index):
        raise RuntimeError(f"the archive of sample {index} exited unexpectedly")


class Mislabelled(Coloured):
    def read(self, index):
        return super().read(index)[0], 7


def colour(index):
    return index // 256, index % 256, index % 7


def numbers(images):
    """The sample numbers shown by images [b, 3, H, W]."""
    assert all(torch.equal(image, image[:, :1, :1].expand_as(image)) for image in images)
    red, green, _ = images[:, :, 0, 0].long().unbind(1)
    return red * 256 + green


def logged(path):
    """The numbers read, in order."""
    return [int(line) for line in path.read_text().split()]


class Telling(Coloured):
    """Records the reading process and its parent instead of the sample."""

    def note(self, index):
        with open(self.log, "ab", buffering=0) as file:
            file.write(b"%d %d\n" % (os.getpid(), os.getppid()))


def processes(path):
    """The ids of the processes that read, and of their parents."""
    pairs = {tuple(map(int, line.split())) for line in path.read_text().splitlines()}
    return {pid for pid, _ in pairs}, {parent for _, parent in pairs}
