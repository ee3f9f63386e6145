"""DeviceLoader: the same global batches at any world size, every sample once, resumed mid-epoch."""

import itertools

import pytest
import torch

from robust_dist import RobustAugment
from robust_dist.augment.keys import sample_keys
from robust_dist.data import Batch, DeviceLoader, ImageSet, evaluation_batches
from robust_dist.data.batches import BatchPlan, Cut

N = 75
BATCH, BLOCK = 32, 2
CUTS = list(itertools.product((1, 2, 3, 4), (1, 2, 4)))


@pytest.fixture(scope="module")
def numbers():
    """Each image's first pixel is its own number, so that a wrong gather is visible."""
    images = torch.randint(0, 256, (N, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(N)
    return ImageSet(images, torch.arange(N) % 7, tuple("abcdefg"), "numbers")


def loaders(numbers, world_size=1, **options):
    options = {"batch_size": BATCH, "seed": 5, "block": BLOCK} | options
    return [DeviceLoader(numbers, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def global_batches(numbers, epoch, world_size=1, **options):
    """For each step, the micro-batches of all ranks in order."""
    steps = zip(*(loader.epoch(epoch) for loader in loaders(numbers, world_size, **options)), strict=True)
    return [[batch for rank in step for batch in rank] for step in steps]


def joined(step):
    return torch.cat([batch.indices for batch in step])


def order(numbers, epoch, **options):
    return torch.cat([joined(step) for step in global_batches(numbers, epoch, **options)])


@pytest.mark.parametrize(("world_size", "accumulation"), CUTS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_and_micro_batches_join_to_one_processes_batches_over_whole_epochs(
    numbers, world_size, accumulation, drop_last
):
    options = {"drop_last": drop_last, "block": 1 if world_size * accumulation > 4 else BLOCK, "batch_size": 40}
    for epoch in range(2):
        alone = global_batches(numbers, epoch, drop_last=drop_last, batch_size=40)
        together = global_batches(numbers, epoch, world_size, accumulation=accumulation, **options)
        assert len(together) == len(alone) == (1 if drop_last else 2)
        for one, many in zip(alone, together, strict=True):
            assert len(many) == world_size * accumulation
            assert torch.equal(joined(one), joined(many))


def test_every_sample_comes_once_an_epoch(numbers):
    for epoch in range(3):
        assert order(numbers, epoch).sort().values.tolist() == list(range(N))


def test_the_order_depends_on_seed_and_epoch_alone(numbers):
    first = order(numbers, 0)
    assert torch.equal(first, order(numbers, 0, batch_size=16, block=4))
    assert not torch.equal(first, order(numbers, 1))
    assert not torch.equal(first, order(numbers, 0, seed=6))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (3, 1)])
def test_a_sample_keeps_its_elem_block_at_any_world_size(numbers, world_size, accumulation):
    def blocks(step):
        runs = [batch.indices.split(BLOCK) for batch in step]
        return [tuple(block.tolist()) for run in runs for block in run]

    alone = global_batches(numbers, 0)
    together = global_batches(numbers, 0, world_size, accumulation=accumulation)
    assert [blocks(step) for step in together] == [blocks(step) for step in alone]


def test_a_batch_holds_the_samples_that_its_indices_name(numbers):
    for (batch,) in loaders(numbers)[0].epoch(3):
        assert isinstance(batch, Batch)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert torch.equal(batch.images, numbers.images[batch.indices])
        assert torch.equal(batch.labels, numbers.labels[batch.indices])
        assert torch.equal(batch.keys, sample_keys(5, 3, batch.indices))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_global_size_is_the_sum_over_ranks_and_micro_batches(numbers, world_size, accumulation):
    for step in global_batches(numbers, 0, world_size, accumulation=accumulation):
        total = sum(len(batch.indices) for batch in step)
        assert [batch.global_size for batch in step] == [total] * len(step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_epoch_yields_exactly_the_remaining_steps(numbers, world_size):
    for loader in loaders(numbers, world_size, batch_size=16, accumulation=2):
        whole = list(loader.epoch(1))
        for start in range(loader.steps_per_epoch + 1):
            rest = list(loader.epoch(1, start_step=start))
            assert len(rest) == loader.steps_per_epoch - start
            for resumed, undisturbed in zip(rest, whole[start:], strict=True):
                same_step(resumed, undisturbed)


def tensors(batch):
    return batch.images, batch.labels, batch.indices, batch.keys


def same_step(step, other):
    for batch, twin in zip(step, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(twin), strict=True))
        assert batch.global_size == twin.global_size


@pytest.mark.parametrize("start_step", [-1, 4])
def test_a_start_step_outside_the_epoch_is_refused_before_the_first_batch(numbers, start_step):
    with pytest.raises(ValueError, match=f"start_step must be from 0 to 3 .*not {start_step}"):
        loaders(numbers)[0].epoch(0, start_step=start_step)


def test_a_set_smaller_than_the_batch_is_one_batch(numbers):
    (loader,) = loaders(numbers, batch_size=1000)
    assert loader.steps_per_epoch == 1
    assert next(loader.epoch(0))[0].global_size == N


def test_a_micro_batch_of_one_sample_is_allowed(numbers):
    sizes = [[len(batch.indices) for batch in step] for step in global_batches(numbers, 0, batch_size=74, block=74)]
    assert sizes == [[74], [1]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"block": 0}, "block=0 is below 1"),
        ({"accumulation": 0}, "accumulation=0 is below 1"),
        ({"world_size": 0}, "world_size=0 is below 1"),
        ({"rank": 1}, r"rank must be from 0 to 0 \(world_size=1\), not 1"),
        ({"rank": -1, "world_size": 2}, r"rank must be from 0 to 1 \(world_size=2\), not -1"),
        ({"batch_size": 100, "drop_last": True}, "drop_last=True with batch_size=100 leaves no batch of the 75"),
        (
            {"batch_size": 32, "block": 8, "world_size": 2, "accumulation": 2},
            r"the last global batch of 11 samples \(batch_size=32, 75 images\) has 2 blocks of block=8: too few for "
            r"world_size=2 x accumulation=2. Set drop_last=True, or block of 3 or less, or fewer ranks",
        ),
        (
            {"batch_size": 25, "block": 8, "world_size": 8},
            r"a global batch of 25 .* world_size=8 .* Set batch_size of 64 or more, or block of 3 or less",
        ),
        ({"batch_size": 74, "block": 1, "world_size": 2}, "the last global batch of 1 .* Set drop_last=True, or fewer"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_at_construction(numbers, options, match):
    with pytest.raises(ValueError, match=match):
        DeviceLoader(numbers, **({"batch_size": BATCH, "seed": 0} | options))


@pytest.mark.parametrize(
    ("options", "block"),
    [({"batch_size": 32, "world_size": 2, "accumulation": 2}, 3), ({"batch_size": 25, "world_size": 8}, 3)],
)
def test_the_block_that_the_error_names_is_the_largest_that_works(numbers, options, block):
    DeviceLoader(numbers, seed=0, block=block, **options)
    with pytest.raises(ValueError, match="too few"):
        DeviceLoader(numbers, seed=0, block=block + 1, **options)


def test_a_count_of_another_type_is_a_type_error(numbers):
    with pytest.raises(TypeError, match=r"batch_size=32\.0 is a float: it must be a whole number in range"):
        DeviceLoader(numbers, batch_size=32.0, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 80])
@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_evaluation_counts_every_sample_once_whatever_the_world_size(numbers, world_size, batch_size):
    shares = [list(evaluation_batches(numbers, batch_size, rank, world_size)) for rank in range(world_size)]
    images = torch.cat([images for share in shares for images, _ in share])
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert torch.equal(images, numbers.images)
    assert torch.equal(labels, numbers.labels)
    sizes = [sum(len(labels) for _, labels in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(1 <= len(labels) <= batch_size for share in shares for _, labels in share)


@pytest.mark.parametrize(
    ("args", "match"), [((0, 0, 1), "batch_size=0 is below 1"), ((8, 2, 2), "rank must be from 0 to 1")]
)
def test_evaluation_refuses_settings_before_the_first_batch(numbers, args, match):
    with pytest.raises(ValueError, match=match):
        evaluation_batches(numbers, *args)


@pytest.mark.gpu
def test_no_batch_waits_for_the_device(numbers):
    (loader,) = loaders(numbers.to("cuda"))
    pipeline = RobustAugment(7, 4, (0.5,) * 3, (0.2,) * 3, crop=1, block=BLOCK).to("cuda")

    def epoch(number):
        return [(tensors(batch), batch.augmented(pipeline)) for (batch,) in loader.epoch(number)]

    epoch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = epoch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (found, _), (twin,) in zip(on_gpu, loaders(numbers)[0].epoch(1), strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, tensors(twin), strict=True))


def test_a_plan_takes_the_batch_size_of_one_process():
    assert BatchPlan("s", 9, 4).runs(2) == BatchPlan("s", 9, Cut(4, seed=0)).runs(2)
    with pytest.raises(ValueError, match="batch_size=0 is below 1"):
        BatchPlan("s", 9, 0)
