"""A model of your own.

robust-dist train --config quickstart --model.name own_model:SmallNet --model.options.width 32 --run_dir runs/own_model
"""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three convolutions and a linear layer, from images [B, 3, H, W] to logits [B, num_classes]."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            self._block(3, width), self._block(width, 2 * width), self._block(2 * width, width)
        )
        self.classifier = nn.Linear(width, num_classes)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits
