"""A data set of your own: (image, label) pairs, of uint8 [3, H, H] or PIL images of one size.

robust-dist train --config quickstart --data.name own_data:Stripes --data.options.side 16 --run_dir runs/own_data
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Stripes(Dataset[tuple[Tensor, int]]):
    """Stripes that stand or lie, of a random colour; `train` says which part of the set is wanted."""

    classes = ("standing", "lying")

    def __init__(self, train: bool, side: int = 32) -> None:
        self.side, self.seeds = side, range(512) if train else range(512, 640)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seeds[index])
        colour = torch.randint(100, 256, (3, 1, 1), generator=generator)
        stripes = (torch.arange(self.side) % 4 < 2).expand(3, self.side, self.side)
        label = int(torch.randint(2, (), generator=generator))
        return (colour * (stripes if label == 0 else stripes.mT)).byte(), label
