"""Whether cells are hit equally often."""

import torch
from torch import Tensor


def assert_flat(cells: Tensor, number: int) -> None:
    """A chi-square test at five standard deviations, in either direction: too even is wrong, too."""
    counts = torch.bincount(cells, minlength=number).double()
    assert counts.numel() == number
    expected, dof = counts.sum() / number, number - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - dof) < 5 * (2 * dof) ** 0.5
