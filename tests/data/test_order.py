"""EpochOrder: every sample once, shuffled, and few groups at a time."""

import pytest
import torch

from robust_dist.augment.keys import permutation
from robust_dist.data.batches import EpochOrder

GROUPS = {
    "one group": (100,),
    "even shards": (25,) * 4,
    "uneven shards": (1, 40, 3, 0, 17, 30, 9),
    "groups of one": (1,) * 30,
    "a huge group": (5, 500, 5),
}


def whole(seed, epoch, sizes, window, batch):
    order, count = EpochOrder(seed, epoch, sizes, window), sum(sizes)
    return [order.batch(start, min(start + batch, count)) for start in range(0, count, batch)]


def group_of(indices, sizes):
    """The number of each sample's group."""
    ends = torch.tensor(sizes).cumsum(0)
    return torch.searchsorted(ends, indices, right=True)


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("window", [1, 30, 1000])
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_every_sample_comes_once(sizes, window, batch):
    for epoch in range(2):
        order = torch.cat(whole(3, epoch, sizes, window, batch))
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(sum(sizes)))


def test_one_group_is_the_plain_permutation():
    assert torch.equal(torch.cat(whole(3, 2, (100,), 10, 16)), permutation(3, 2, 100))


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_the_order_depends_on_seed_and_epoch(sizes):
    first = torch.cat(whole(3, 0, sizes, 30, 16))
    assert torch.equal(first, torch.cat(whole(3, 0, sizes, 30, 16)))
    assert not torch.equal(first, torch.cat(whole(3, 1, sizes, 30, 16)))
    assert not torch.equal(first, torch.cat(whole(4, 0, sizes, 30, 16)))


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_a_batch_is_the_same_whatever_was_asked_before(sizes):
    batches = whole(3, 0, sizes, 30, 16)
    for number in (len(batches) - 1, 0, len(batches) // 2):
        alone = EpochOrder(3, 0, sizes, 30)
        assert torch.equal(alone.batch(16 * number, 16 * number + len(batches[number])), batches[number])


@pytest.mark.parametrize("window", [50, 200, 10_000])
def test_a_batch_is_sorted_by_group_and_steps_of_a_window_read_the_same_groups(window):
    sizes, batch = (25,) * 40, 100
    seen = [group_of(indices, sizes) for indices in whole(1, 0, sizes, window, batch)]
    for groups in seen:
        changes = int((groups.diff() != 0).sum())
        assert changes + 1 == len(groups.unique()) <= max(window, batch) // 25
    if window == 200:
        assert set(seen[0].tolist()) == set(seen[1].tolist())
        assert set(seen[0].tolist()).isdisjoint(seen[2].tolist())


def test_samples_leave_their_groups_and_groups_their_places():
    sizes = (100,) * 50
    order = torch.cat(whole(0, 0, sizes, 500, 100))
    first = order[:100]
    assert len(group_of(first, sizes).unique()) == 5
    assert first.diff().abs().float().mean() > 20
    groups = [int(group_of(torch.cat([EpochOrder(0, e, sizes, 1).batch(0, 1)]), sizes)) for e in range(200)]
    assert len(set(groups)) > 40


@pytest.mark.parametrize("sizes", [(200,), (20,) * 10])
def test_places_are_uniform_over_many_epochs(sizes):
    """The mean position of a sample over 300 epochs is the middle, within five standard errors."""
    places = torch.stack([torch.argsort(torch.cat(whole(0, e, sizes, 60, 10))) for e in range(300)]).double()
    error = 200 / 12**0.5 / 300**0.5
    assert (places.mean(0) - 99.5).abs().max() < 5 * error
