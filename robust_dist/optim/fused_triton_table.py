"""The Triton kernels' table in device memory: addresses of the tensors and settings of the groups.

The table is int64 [COLUMNS, rows], one row per tensor; its last columns hold the bits of float64 values written by
`advance`. The chunks are int64 [chunks, 2]: the row, and the chunk's number within its tensor.
"""

import math
import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from robust_dist.optim.averaging import weights_on
from robust_dist.optim.reference import PAPER_THRESHOLD, rho_inf
from robust_dist.optim.settings import INSIDE, OUTSIDE, OUTSIDE_UNCORRECTED, Hyper
from robust_dist.splitmix import GOLDEN, mix_int, signed

CHUNK, LONGEST_CHUNK = 4096, 16384  # elements, for the smallest and the largest models
PROGRAMS = 4096  # enough for every multiprocessor of any GPU; beyond this number, chunks get longer
# Columns of the table: first those of the host, then those of `advance`; fused_triton_kernel.py names them.
HOST_COLUMNS = 10
COLUMNS = 21
# Additional columns with averaging: the addresses of the fast weights, from the host, and three scalars.
Z, AVERAGING_COLUMNS = 21, 25
# Columns of the settings; lr and weight_decay are the first two.
LR, WEIGHT_DECAY = 0, 1
SETTINGS = 19
# Up to so many groups, rates and decays are arguments of the launch, so that a schedule uploads nothing.
RATE_GROUPS = 4
# XORed with their bits, which then never fit into 32: Triton recompiles when an argument's width changes.
RATE_MASK = 0x5555555555555555

# Stands for log(0): it is finite, and exp(t * _NO_MEMORY) is 0 for every t >= 1.
_NO_MEMORY = -1e3


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(words: Sequence[int], device: torch.device) -> Tensor:
    """int64 words on the device, without synchronising; a captured graph writes them at every replay."""
    if is_capturing(device):
        return written(words, device)
    host = torch.frombuffer(array("q", words), dtype=torch.int64) if words else torch.empty(0, dtype=torch.int64)
    return host.clone() if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def written(words: Sequence[int], device: torch.device) -> Tensor:
    """`upload` with the words as kernel arguments, so that no host memory has to outlive the call."""
    found = torch.zeros(len(words), dtype=torch.int64, device=device)
    if words:
        torch._foreach_add_(list(found.unbind()), list(words))
    return found


def chunk_length(numel: int) -> int:
    """Elements per chunk for `numel` elements in total; short chunks balance small models better."""
    length = CHUNK
    while length < LONGEST_CHUNK and numel > length * PROGRAMS:
        length *= 2
    return length


def chunk_table(numels: Sequence[int], rows: Sequence[int], device: torch.device, length: int = CHUNK) -> Tensor:
    """Cut tensors into chunks.

    Args:
        numels: Number of elements of each tensor.
        rows: The tensors' rows in the table.
        device: Device of the result.
        length: Elements per chunk.

    Returns:
        int64 [chunks, 2]: the row, and the chunk's number within its tensor, from 0.
    """
    counts = [-(-numel // length) for numel in numels]
    total = sum(counts)
    columns = upload([*counts, *accumulate(counts, initial=0)][:-1] + list(rows), device).view(3, -1)
    tensors = torch.arange(len(counts), device=device)
    tensor = torch.repeat_interleave(tensors, columns[0], output_size=total)
    number = torch.arange(total, device=device) - columns[1][tensor]
    return torch.stack([columns[2][tensor], number], 1)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else _NO_MEMORY


def _rectification(h: Hyper) -> tuple[float, float, float]:
    """The threshold of rectification, rho_inf, and the constant factor of eq. 13."""
    longest = rho_inf(h.beta2)
    if longest <= max(h.rectify_threshold, PAPER_THRESHOLD):
        return math.inf, longest, 0.0
    return h.rectify_threshold, longest, longest / ((longest - 4.0) * (longest - 2.0))


def lives_on(value: float | Tensor, device: torch.device) -> bool:
    """Whether a setting is a tensor on this device, whose value the host does not read."""
    return isinstance(value, Tensor) and value.device.type == device.type


def words_of(numbers: Sequence[float]) -> list[int]:
    """The bits of float64 numbers, as int64."""
    return list(struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)))


def rates_words(hypers: Sequence[Hyper]) -> list[int] | None:
    """The groups' learning rates and decays as arguments of `advance`, `2 * RATE_GROUPS` int64.

    Returns:
        None if there are more groups, or if one of these is a tensor: then `advance` reads them from the settings.
    """
    given = [value for h in hypers for value in (h.lr, h.weight_decay)]
    numbers = [value for value in given if not isinstance(value, Tensor)]
    if len(hypers) > RATE_GROUPS or len(numbers) < len(given):
        return None
    return [word ^ RATE_MASK for word in words_of(numbers + [0.0] * (2 * RATE_GROUPS - len(numbers)))]


def settings_words(h: Hyper, device: torch.device, *, with_rates: bool = True) -> list[int]:
    """A group's row of the settings, `SETTINGS` int64; 0 for values that are on the device (`lives_on`).

    Args:
        h: The group's settings.
        device: The device that steps.
        with_rates: Whether to include the learning rate and the decay; else 0 replaces them, too.
    """
    numbers = (
        *(float(value) if with_rates and not lives_on(value, device) else 0.0 for value in (h.lr, h.weight_decay)),
        h.beta1,
        _log(h.beta1),
        h.beta2,
        _log(h.beta2),
        h.added_eps,
        *(h.eps if h.eps_placement == place else 0.0 for place in (INSIDE, OUTSIDE, OUTSIDE_UNCORRECTED)),
        *_rectification(h),
        -1.0 if h.maximize else 1.0,
    )
    averages = average_words(h, device) if h.averaging else [0, 0, 0]
    return [*words_of(numbers), signed(mix_int(h.seed + GOLDEN)), *words_of([float(h.decay_by_rate)]), *averages]


def average_words(h: Hyper, device: torch.device) -> list[int]:
    """The device addresses of the averaging weights and their sums, and their number."""
    weights, sums = weights_on(device, h.beta2, h.rectify_threshold)
    return [weights.data_ptr(), sums.data_ptr(), len(sums)]
