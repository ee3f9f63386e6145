"""Triton functions of the draws: `robust_dist.augment.keys` on unsigned 64-bit integers, which wrap as it does.

Keys are a block, one sample a thread, or a scalar of the program.
"""

import triton
import triton.language as tl

from robust_dist.augment.keys import Stream
from robust_dist.triton_launch import Kernel

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


def _offset(stream: Stream) -> tl.constexpr:
    return tl.constexpr((int(stream) + 1) * _GOLDEN % 2**64)


OPERATION, MAGNITUDE, SIGN = (_offset(s) for s in (Stream.OPERATION, Stream.MAGNITUDE, Stream.SIGN))
CROP_TOP, CROP_LEFT, FLIP = (_offset(s) for s in (Stream.CROP_TOP, Stream.CROP_LEFT, Stream.FLIP))
CUTMIX_APPLY, CUTMIX_SHARE = _offset(Stream.CUTMIX_APPLY), _offset(Stream.CUTMIX_SHARE)
CUTMIX_X, CUTMIX_Y = _offset(Stream.CUTMIX_X), _offset(Stream.CUTMIX_Y)
CUTMIX_PARTNER = _offset(Stream.CUTMIX_PARTNER)


@triton.jit
def bits(key: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """64 random bits, uint64, for a key, uint64, and one of the offsets above."""
    x = key + stream
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def uniform(key: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """float64 in [0, 1)."""
    return (bits(key, stream) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def chance(key: tl.tensor, stream: tl.constexpr, BELOW: tl.constexpr) -> tl.tensor:
    """Whether `uniform` is below p, for BELOW = ceil(p 2**53): scalars that a launch takes are float32."""
    return (bits(key, stream) >> 11) < BELOW


@triton.jit
def randint(key: tl.tensor, stream: tl.constexpr, high: tl.tensor) -> tl.tensor:
    """int32 in [0, high)."""
    return (((bits(key, stream) >> 32) * high) >> 32).to(tl.int32)


@triton.jit
def beta_share(u: tl.tensor, table: tl.tensor, KNOTS: tl.constexpr) -> tl.tensor:
    """`robust_dist.augment.cutmix.beta_share` of draws: the knot before each by halves, then linear to the next."""
    tl.static_assert(KNOTS == 2**13 + 1)
    left = u.to(tl.int32)  # 0
    for halving in tl.static_range(1, 14):
        half = (KNOTS - 1) >> halving
        left += tl.where(tl.load(table + left + half) <= u, half, 0)
    p_left, p_right = tl.load(table + left), tl.load(table + left + 1)
    s_left, s_right = tl.load(table + KNOTS + left), tl.load(table + KNOTS + left + 1)
    return s_left + (s_right - s_left) * ((u - p_left) / (p_right - p_left))


@Kernel
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["keys"])
def partners_kernel(
    keys: tl.tensor, partners: tl.tensor, batch: tl.tensor, SAMPLES: tl.constexpr, OTHERS: tl.constexpr
) -> None:
    """Mode "batch": each sample finds its rank among all by their bits, and becomes the partner of that place."""
    own = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    drawn = bits(tl.load(keys + own, own < batch, other=0).to(tl.uint64), CUTMIX_PARTNER).to(tl.int64, bitcast=True)
    rank = tl.zeros([SAMPLES], tl.int32)
    for start in range(0, batch, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(keys + other, other < batch, other=0).to(tl.uint64)
        theirs = bits(theirs, CUTMIX_PARTNER).to(tl.int64, bitcast=True)
        ties = (theirs[None, :] == drawn[:, None]) & (other[None, :] < own[:, None])
        before = ((theirs[None, :] < drawn[:, None]) | ties) & (other[None, :] < batch)
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(partners + rank, own.to(tl.int64), own < batch)
