"""How a global batch is cut between ranks and micro-batches: whole blocks, contiguous, as even as possible."""

from itertools import pairwise

Run = tuple[int, int]


def even_cuts(count: int, parts: int) -> list[Run]:
    """Cut range(count) into `parts` contiguous runs (start, stop) whose lengths differ by one at most."""
    bounds = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def cut_batch(size: int, *, block: int, rank: int, world_size: int, accumulation: int) -> list[Run]:
    """A rank's micro-batches as runs (start, stop) of positions in a global batch of `size` samples.

    The batch is cut into blocks of `block` samples (the last one may be shorter), the blocks into one run a rank, each
    rank's run into `accumulation` runs. So a block is never torn, and the ranks' runs in order are the batch.
    """
    first, last = even_cuts(-(-size // block), world_size)[rank]
    runs = even_cuts(last - first, accumulation)
    return [((first + start) * block, min((first + stop) * block, size)) for start, stop in runs]


def can_cut(size: int, *, block: int, world_size: int, accumulation: int) -> bool:
    """Whether every micro-batch of every rank gets at least one block."""
    return -(-size // block) // world_size >= accumulation
