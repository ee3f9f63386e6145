"""torchvision's public functionals, one image and one forced operation at a time; and images that try them."""

import math

import torch
from torch import Tensor

from robust_dist.augment import TrivialAugmentPlan, tables

CELLS = [(op, b, negative) for op in range(14) for b in range(31) for negative in (0, 1)]


def torchvision_op(image: Tensor, op: int, magnitude_bin: int, negative: int, **options: float) -> Tensor:
    """TrivialAugmentWide's operation on one uint8 image [C, H, W]; options are those of its warps."""
    f = __import__("torchvision.transforms.v2.functional", fromlist=["functional"])
    name, sign = tables.OPS[op], -1 if negative else 1
    wide = sign * tables.wide_magnitudes(31)[magnitude_bin]
    pixels = sign * tables.translations(31)[magnitude_bin]
    plain = {"angle": 0.0, "scale": 1.0, **options}
    if name == "ShearX":
        slope = [math.degrees(math.atan(wide)), 0.0]
        return f.affine(image, translate=[0, 0], shear=slope, center=[0, 0], **plain)
    if name == "ShearY":
        slope = [0.0, math.degrees(math.atan(wide))]
        return f.affine(image, translate=[0, 0], shear=slope, center=[0, 0], **plain)
    threshold = 255.0 * float(torch.linspace(1.0, 0.0, 31)[magnitude_bin])
    return {
        "Identity": lambda: image,
        "TranslateX": lambda: f.affine(image, translate=[pixels, 0], shear=[0.0, 0.0], **plain),
        "TranslateY": lambda: f.affine(image, translate=[0, pixels], shear=[0.0, 0.0], **plain),
        "Rotate": lambda: f.rotate(image, angle=sign * tables.rotations(31)[magnitude_bin], **options),
        "Brightness": lambda: f.adjust_brightness(image, 1.0 + wide),
        "Color": lambda: f.adjust_saturation(image, 1.0 + wide),
        "Contrast": lambda: f.adjust_contrast(image, 1.0 + wide),
        "Sharpness": lambda: f.adjust_sharpness(image, 1.0 + wide),
        "Posterize": lambda: f.posterize(image, tables.posterize_bits(31)[magnitude_bin]),
        "Solarize": lambda: f.solarize(image, threshold),
        "AutoContrast": lambda: f.autocontrast(image),
        "Equalize": lambda: f.equalize(image),
    }[name]()


def plan_of(cells: list[tuple[int, int, int]]) -> TrivialAugmentPlan:
    """The plan that gives sample i the operation, bin and sign of cells[i]."""
    op, magnitude_bin, negative = torch.tensor(cells).unbind(1)
    return TrivialAugmentPlan(op=op, magnitude_bin=magnitude_bin, negative=negative.bool())


def pictures(kind: str, shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """uint8 [B, C, H, W] images of one kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    slope = torch.arange(shape[2]).view(-1, 1) * 5 + torch.arange(shape[3]) * 3
    return {
        "noise": lambda: noise,
        "smooth": lambda: ((slope + noise[..., :1, :1].long()) % 256).to(torch.uint8),
        "grey": lambda: noise[:, :1].expand(shape).clone(),
        "low contrast": lambda: noise // 6 + 90,
        "constant": lambda: noise[..., :1, :1].expand(shape).clone(),
        "two levels": lambda: (noise > 127).to(torch.uint8) * 255,
    }[kind]()
