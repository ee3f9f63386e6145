"""Stages of your own in the augmentation: before the crop on bytes, and after CutMix on normalised images.

robust-dist train --config quickstart --augment.before '[own_stage:invert]' --augment.after '[own_stage:Noise]' \
  --run_dir runs/own_stage
"""

import torch
from torch import Tensor, nn


def invert(images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """One image in four as its negative; which one follows from its key, and so not from ranks, batches or restarts."""
    chosen = (keys.remainder(4) == 0).view(-1, 1, 1, 1)
    return torch.where(chosen, 255 - images, images), labels


class Noise(nn.Module):
    """Gaussian noise of a fixed size."""

    std = 0.1

    def forward(self, images: Tensor, targets: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Images float [B, 3, H, W], targets float32 [B, classes], keys int64 [B]."""
        return images + self.std * torch.randn_like(images), targets
