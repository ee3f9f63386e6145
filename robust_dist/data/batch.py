"""Samples on their way from a set to a step: asked for, read, and given out as a Batch."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from robust_dist.data.errors import BadImage

Pipeline = Callable[..., tuple[Tensor, Tensor]]


class Request(NamedTuple):
    """One micro-batch to read.

    Attributes:
        indices: int64 [b], the samples' numbers in the set.
        keys: int64 [b], `sample_keys(seed, epoch, indices)`, which the crops are drawn from.
    """

    indices: Tensor
    keys: Tensor


class Pack(NamedTuple):
    """One micro-batch as it was read.

    Attributes:
        images: uint8 [b, C, H, W]; of a whole set [N, C, H, W].
        labels: int64 [b]; of a whole set [N].
        weights: float32 [b], 0 where an image was bad; None where none was.
        bad: the bad images.
        whole: images and labels are the whole set's, from which a pipeline gathers the samples.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor | None = None
    bad: tuple[BadImage, ...] = ()
    whole: bool = False


class Batch:
    """A micro-batch of b samples on the device; its length is b.

    Where the set lies on the device, the batch holds it whole: `images` and `labels` are gathered when they are first
    asked for, and `augmented` does not ask.

    Args:
        images: uint8 [b, C, H, W]; of a whole set [N, C, H, W].
        labels: int64 [b]; of a whole set [N].
        indices: int64 [b], the samples' numbers in the set.
        keys: int64 [b], `sample_keys(seed, epoch, indices)`.
        global_size: samples in the whole global batch: the sum over its ranks and micro-batches, by which the
            summed loss is divided; bad images count in it, so that it does not depend on who read them.
        weights: float32 [b], 1 for a sample and 0 for one that could not be read, whose place a copy of another
            one holds; None where all count.
        whole: images and labels are the whole set's.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        keys: Tensor,
        global_size: int,
        weights: Tensor | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.source, self.whole = (images, labels), whole
        self.indices, self.keys, self.global_size, self.weights = indices, keys, global_size, weights

    @cached_property
    def images(self) -> Tensor:
        """The samples' images, uint8 [b, C, H, W]."""
        return self._own(self.source[0])

    @cached_property
    def labels(self) -> Tensor:
        """The samples' labels, int64 [b]."""
        return self._own(self.source[1])

    def augmented(self, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
        """`pipeline(images, labels, keys)`; of a set on the device, the pipeline gathers what it reads.

        Args:
            pipeline: A RobustAugment, compiled or not.

        Returns:
            Images and targets, as the pipeline gives them.
        """
        images, labels = self.source
        if self.whole:
            return pipeline(images, labels, self.keys, index=self.indices)
        return pipeline(images, labels, self.keys)

    def __len__(self) -> int:
        return len(self.indices)

    def _own(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.indices) if self.whole else values
