"""A global batch is divided into contiguous runs of whole blocks, as evenly as possible."""

import itertools

import pytest

from robust_dist.data.batches import Cut, even_cuts

CASES = [
    (size, block, world_size, accumulation)
    for size, block, world_size, accumulation in itertools.product(
        (1, 7, 8, 31, 64, 128, 130), (1, 4, 8), (1, 2, 3, 4), (1, 2, 4)
    )
]


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_even_cuts_cover_the_range_with_lengths_that_differ_by_one(count, parts):
    runs = even_cuts(count, parts)
    lengths = [stop - start for start, stop in runs]
    assert [i for run in runs for i in range(*run)] == list(range(count))
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "block", "world_size", "accumulation"), CASES)
def test_the_ranks_runs_in_order_are_the_batch_and_no_block_is_torn(size, block, world_size, accumulation):
    cut = {"batch_size": size, "seed": 0, "block": block, "world_size": world_size, "accumulation": accumulation}
    runs = [run for rank in range(world_size) for run in Cut(rank=rank, **cut).runs(size)]
    assert [i for run in runs for i in range(*run)] == list(range(size))
    assert all(start % block == 0 for start, stop in runs if stop > start)
    assert Cut(**cut).fits(size) == all(stop > start for start, stop in runs)


@pytest.mark.parametrize(("size", "block", "world_size", "accumulation"), CASES)
def test_ranks_differ_by_one_block_at_most(size, block, world_size, accumulation):
    cut = {"batch_size": size, "seed": 0, "block": block, "world_size": world_size, "accumulation": accumulation}
    shares = [sum(stop - start for start, stop in Cut(rank=r, **cut).runs(size)) for r in range(world_size)]
    assert max(shares) - min(shares) <= block
