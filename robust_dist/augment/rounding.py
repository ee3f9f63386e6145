"""float32 arithmetic with the roundings of torchvision's kernels, on any device, eager or compiled.

float64 holds the product of two float32 values, and here its sum with a third, so that a cast to float32 is the one
rounding of a fused multiply-add; and a compiler cannot fuse across a cast what must be rounded twice.
"""

from functools import lru_cache

import torch
from torch import Tensor

from robust_dist.augment.checks import readable


@lru_cache(maxsize=1)
def _addcmul_is_fused() -> bool:
    """Whether this processor's `addcmul` rounds once: it does with AVX2, AVX-512 and NEON."""
    a, c = (torch.full((37,), value, dtype=torch.float32, device="cpu") for value in (1 + 2**-12, -1 - 2**-11))
    return bool((torch.addcmul(c, a, a) == 2.0**-24).all())


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a b + c, rounded once; c has the full shape, all are float32."""
    if readable(c) and _addcmul_is_fused():
        return torch.addcmul(c, a, b)
    return (a.double() * b.double() + c.double()).float()


def divide(a: Tensor, b: Tensor) -> Tensor:
    """float32 a / b, rounded once; some compilers approximate the float32 quotient."""
    if readable(a):
        return a / b
    return (a.double() / b.double()).float()


def to_levels(x: Tensor) -> Tensor:
    """uint8: clamped and truncated, as torchvision's cast does; changes `x`."""
    return x.clamp_(0, 255).to(torch.uint8)
