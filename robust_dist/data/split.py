"""Which of a folder's images are for evaluation: a hash of each name decides, whatever else lies beside it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robust_dist.data.names import composed

_RANGE = 2**64


@dataclass(frozen=True)
class Split:
    """A choice of evaluation images.

    Attributes:
        eval_share: Share of the images, above 0 and below 1.
        seed: Another one chooses others.
    """

    eval_share: float
    seed: int = 0

    def evaluates(self, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Bool [N]: which images are for evaluation.

        A name's hash is below the share, or not. A class of two or more images has at least one in each part: where its
        hashes alone would leave a part empty, the image of the lowest or of the highest hash goes there. The one of a
        class of one image is for training.

        Args:
            names: Of the images, each once.
            labels: Of the images, whole numbers [N].
        """
        hashes = np.array([self._hash(name) for name in names], dtype=np.uint64)
        chosen = hashes < np.uint64(int(self.eval_share * _RANGE))
        order = np.lexsort((hashes, labels))
        for places in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            if len(places) < 2:
                chosen[places] = False
            elif not chosen[places].any():
                chosen[places[0]] = True
            elif chosen[places].all():
                chosen[places[-1]] = False
        return chosen

    def _hash(self, name: str) -> int:
        key = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(composed(name).encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little")
