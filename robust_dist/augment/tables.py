"""TrivialAugment's "wide" space as tables: one row per (operation, bin, sign).

The magnitudes of 31 bins are literals: torchvision computes them with `torch.linspace` in float32, whose
last bits depend on the processor (TranslateX of bin 15 is 15 pixels with AVX2, 16 without).
"""

import math
import struct
from fractions import Fraction

import torch
from torch import Tensor

OPS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
OP = {name: index for index, name in enumerate(OPS)}

# fmt: off
_WIDE_31 = (
    0.0, 0.033, 0.066, 0.099, 0.132, 0.16499999, 0.198, 0.231, 0.264, 0.297,
    0.32999998, 0.363, 0.396, 0.429, 0.462, 0.495, 0.528, 0.561, 0.594, 0.62700003,
    0.66, 0.693, 0.726, 0.759, 0.792, 0.825, 0.85800004, 0.89100003, 0.924, 0.957,
    0.99,
)
_SOLARIZE_31 = (
    255, 247, 238, 230, 221, 213, 204, 196, 187, 179, 170, 162, 153, 145, 136, 128,
    120, 111, 103, 94, 85, 77, 68, 60, 52, 43, 34, 26, 17, 9, 0,
)
# fmt: on
_TRANSLATE_31 = (*range(16), *range(17, 31), 32)


def _float32(value: Fraction | float) -> float:
    return float(struct.unpack("f", struct.pack("f", float(value)))[0])


def wide_magnitudes(num_bins: int) -> list[float]:
    """Shear, and the enhancers' distances from 1: float32 values from 0 to 0.99, [num_bins]."""
    if num_bins == 31:
        return [_float32(m) for m in _WIDE_31]
    return [_float32(Fraction(99 * b, 100 * (num_bins - 1))) for b in range(num_bins)]


def translations(num_bins: int) -> list[int]:
    """Translations in pixels, for any image size: 0 to 32, [num_bins]."""
    return list(_TRANSLATE_31) if num_bins == 31 else [32 * b // (num_bins - 1) for b in range(num_bins)]


def rotations(num_bins: int) -> list[float]:
    """Counter-clockwise rotations in degrees: 0 to 135, [num_bins]."""
    return [_float32(Fraction(135 * b, num_bins - 1)) for b in range(num_bins)]


def posterize_bits(num_bins: int) -> list[int]:
    """Number of high bits kept: 8 to 2, rounded half to even, [num_bins]."""
    return [round(8 - Fraction(6 * b, num_bins - 1)) for b in range(num_bins)]


def solarize_thresholds(num_bins: int) -> list[int]:
    """Levels from which on pixels are inverted: 255 to 0, [num_bins]."""
    if num_bins == 31:
        return list(_SOLARIZE_31)
    return [math.ceil(Fraction(255 * (num_bins - 1 - b), num_bins - 1)) for b in range(num_bins)]


def signed_rows(table: Tensor, op: int) -> Tensor:
    """A view of one operation's rows, [num_bins, 2 (positive, negative), ...]."""
    return table.unflatten(0, (len(OPS), -1, 2))[op]


def matrix_table(num_bins: int) -> Tensor:
    """Inverse affine maps in pixels about the centre, float64 [rows, 8].

    The columns are a, b, c, d, p, q, u, v of x_in = a x + b y + p H/2 - u and y_in = c x + d y + q W/2 - v. Shears
    keep the upper left corner fixed, as in AutoAugment. Rows of other operations are the identity.
    """
    table = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64).repeat(len(OPS) * num_bins * 2, 1)
    wide, shifts, angles = wide_magnitudes(num_bins), translations(num_bins), rotations(num_bins)
    for b in range(num_bins):
        for s, sign in enumerate((1, -1)):
            slope = math.tan(math.radians(math.degrees(math.atan(sign * wide[b]))))
            signed_rows(table, OP["ShearX"])[b, s, [1, 4]] = slope
            signed_rows(table, OP["ShearY"])[b, s, [2, 5]] = slope
            signed_rows(table, OP["TranslateX"])[b, s, 6] = sign * shifts[b]
            signed_rows(table, OP["TranslateY"])[b, s, 7] = sign * shifts[b]
            turn = math.radians(-((sign * angles[b]) % 360))
            cos, sin = math.cos(turn), math.sin(turn)
            signed_rows(table, OP["Rotate"])[b, s, :4] = torch.tensor([cos, sin, -sin, cos], dtype=torch.float64)
    return table


def factor_table(num_bins: int) -> Tensor:
    """The enhancers' blend factors f and 1 - f, float32 [rows, 2]; (1, 0) for other operations."""
    table = torch.tensor([1.0, 0.0], dtype=torch.float32).repeat(len(OPS) * num_bins * 2, 1)
    pairs = [[1 + m, 1 - (1 + m), 1 - m, 1 - (1 - m)] for m in wide_magnitudes(num_bins)]
    rounded = torch.tensor(pairs, dtype=torch.float64).float().view(num_bins, 2, 2)
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        signed_rows(table, OP[name]).copy_(rounded)
    return table


def lut_table(num_bins: int) -> Tensor:
    """The new value of each level for operations that need no statistics of the image: uint8 [rows, 256]."""
    levels = torch.arange(256)
    table = levels.repeat(len(OPS) * num_bins * 2, 1)
    factors = signed_rows(factor_table(num_bins), OP["Brightness"])[..., :1]
    signed_rows(table, OP["Brightness"]).copy_((levels * factors).clamp(0, 255).long())
    kept = torch.tensor([256 - 2 ** (8 - n) for n in posterize_bits(num_bins)]).view(-1, 1, 1)
    signed_rows(table, OP["Posterize"]).copy_((levels & kept).expand(-1, 2, -1))
    threshold = torch.tensor(solarize_thresholds(num_bins)).view(-1, 1, 1)
    solarized = torch.where(levels >= threshold, 255 - levels, levels)
    signed_rows(table, OP["Solarize"]).copy_(solarized.expand(-1, 2, -1))
    return table.to(torch.uint8)
