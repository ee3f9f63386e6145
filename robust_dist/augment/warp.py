"""Shear, translation and rotation: torchvision's sampling coordinates, bit for bit, without its matrix product.

torchvision computes in float32, from left to right, without fused multiply-add. A product of two float32 values is
exact in float64, so casting it to float32 rounds exactly once, on any device, compiled or not.

Suffixes: B samples, C channels, H and W pixels. A pair holds the values for x and for y.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from robust_dist.augment.checks import readable


class Terms(NamedTuple):
    """The terms of the sampling grid: across + down + offset, float32.

    Attributes:
        across: The term of each column, [B, 2, W].
        down: The term of each row, [B, 2, H].
        offset: The constant term, [B, 2].
    """

    across: Tensor
    down: Tensor
    offset: Tensor


def _halved(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Pixels converted to half image sizes, float32 [B, 2]."""
    in_x, in_y = x.float().double() / (width / 2), y.float().double() / (height / 2)
    return torch.stack([in_x, in_y], 1).float()


def _scaled(slopes: Tensor, size: int) -> Tensor:
    """Slopes [B, 2] times the distances of the pixels from the centre, float32 [B, 2, size]."""
    ramp = torch.arange(size, dtype=torch.float64, device=slopes.device) - (size - 1) / 2
    return (slopes.double().unsqueeze(2) * ramp).float()


def grid_slopes(matrix: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid's increment per column, its increment per row and its offset, each for x and y, float32 [B, 2]."""
    a, b, c, d, p, q, u, v = matrix.unbind(1)
    across, down = _halved(a, c, height, width), _halved(b, d, height, width)
    return across, down, _halved(p * (height / 2) - u, q * (width / 2) - v, height, width)


def grid_terms(matrix: Tensor, height: int, width: int) -> Terms:
    """The terms of torchvision's sampling grid for rows of `matrix_table`, float64 [B, 8]."""
    across, down, offset = grid_slopes(matrix, height, width)
    return Terms(_scaled(across, width), _scaled(down, height), offset)


def _to_pixels(grid: Tensor, size: int) -> Tensor:
    if readable(grid):
        return grid.mul_(size / 2).sub_(0.5)
    return (grid.double() * (size / 2)).float() - 0.5  # a compiler must not fuse product and difference


def coordinates(terms: Terms) -> tuple[Tensor, Tensor]:
    """The source position of each output pixel: x and y, in pixels, float32 [B, H, W]."""
    grid = terms.across.unsqueeze(2) + terms.down.unsqueeze(3)
    x, y = grid.add_(terms.offset.unsqueeze(2).unsqueeze(3)).add_(1).unbind(1)
    return _to_pixels(x, terms.across.shape[2]), _to_pixels(y, terms.down.shape[2])


def _index(x: Tensor, y: Tensor) -> Tensor:
    """Convert whole coordinates to indices into flat images with a border of one pixel, int64 [B, H W], in place."""
    height, width = x.shape[1:]
    flat = x.clamp_(-1, width).add_(y.clamp_(-1, height), alpha=width + 2).add_(width + 3)
    return flat.flatten(1).long()


def nearest_index(across: Tensor, down: Tensor, offset: Tensor) -> Tensor:
    """Index of each pixel's nearest source in flat images with a border of one pixel, int64 [B, H W]."""
    x, y = coordinates(Terms(across, down, offset))
    return _index(x.round_(), y.round_())


def _bordered(images: Tensor, fill: Tensor) -> Tensor:
    """Flat images with a border of one pixel of fill: [B, C, (H + 2)(W + 2)]."""
    inside = torch.ones_like(images[:1, :1])
    border = pad(inside, (1, 1, 1, 1)).eq(0).to(images.dtype) * fill.view(1, -1, 1, 1)
    return (pad(images, (1, 1, 1, 1)) + border).flatten(2)


def _read(bordered: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    return bordered.gather(2, index.unsqueeze(1).expand(-1, bordered.shape[1], -1)).view(shape)


def read_nearest(images: Tensor, index: Tensor, fill: Tensor) -> Tensor:
    """uint8 [B, C, H, W] sampled at `nearest_index`; outside the image is fill, uint8 [C] or [1]."""
    return _read(_bordered(images, fill), index, images.shape)


def read_bilinear(images: Tensor, across: Tensor, down: Tensor, offset: Tensor, fill: Tensor) -> Tensor:
    """uint8 [B, C, H, W] sampled bilinearly on a background of `fill`, rounded half to even.

    torchvision applies its mask twice, which makes borders too dark with a light fill; here, a constant image with a
    fill of the same level is unchanged.
    """
    bordered = _bordered(images, fill)
    x, y = coordinates(Terms(across, down, offset))
    left, top = x.floor(), y.floor()
    right, low = (x - left).double().unsqueeze(1), (y - top).double().unsqueeze(1)

    def level(dx: int, dy: int) -> Tensor:
        return _read(bordered, _index(left + dx, top + dy), images.shape).double()

    upper = level(0, 0) + (level(1, 0) - level(0, 0)) * right
    lower = level(0, 1) + (level(1, 1) - level(0, 1)) * right
    return (upper + (lower - upper) * low).round().to(images.dtype)
