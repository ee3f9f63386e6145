"""A perceptron without normalisation, to expose a training method's own scale."""

from torch import Tensor, nn

from robust_dist.validate import whole_number


class MLP(nn.Module):
    """Two hidden ReLU layers over all pixels, and a linear layer; torch's own initialisation.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        side: Height and width of the images.
        width: Units of a hidden layer.

    Raises:
        TypeError: side or width is not a whole number.
        ValueError: side or width is below 1; in `forward`, images have another size.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, *, side: int = 32, width: int = 256) -> None:
        super().__init__()
        whole_number("side", side, 1)
        whole_number("width", width, 1)
        self.side = side
        self.hidden = nn.Sequential(
            nn.Linear(in_channels * side * side, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, side, side] to logits [B, num_classes]."""
        if images.shape[-2:] != (self.side, self.side):
            raise ValueError(f"mlp takes images of side={self.side}, got {tuple(images.shape)}")
        return self.fc(self.hidden(images.flatten(1)))
