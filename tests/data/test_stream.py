"""The Loader of a StreamSet: DeviceLoader's guarantees for images read by workers, and the handling of bad ones."""

import itertools

import pytest
import torch

from robust_dist.augment.keys import permutation, sample_keys
from robust_dist.data import Batch, DeviceLoader, ImageSet
from robust_dist.data.errors import BadImage
from robust_dist.data.reading import stand_ins
from tests.data.coloured import CLASSES, Coloured, Mislabelled, logged, numbers, stream_loader

GROUPS = (11, 30, 2, 20, 12)
N = sum(GROUPS)
BATCH, BLOCK = 32, 2


def loaders(source, world_size=1, **options):
    settings = {"batch_size": BATCH, "seed": 5, "block": BLOCK} | options
    return [stream_loader(source, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]


def global_batches(source, epoch, world_size=1, start=0, **options):
    """For each step, the micro-batches of all ranks in order."""
    steps = zip(*(one.epoch(epoch, start) for one in loaders(source, world_size, **options)), strict=True)
    return [[batch for rank in step for batch in rank] for step in steps]


def joined(step):
    return torch.cat([batch.indices for batch in step])


def same_batches(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.keys, other.keys)
        assert one.global_size == other.global_size
        assert (one.weights is None) == (other.weights is None)
        assert one.weights is None or torch.equal(one.weights, other.weights)


@pytest.mark.parametrize(("world_size", "accumulation"), list(itertools.product((1, 2, 3, 4), (1, 2))))
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_and_micro_batches_join_to_one_processes_batches(world_size, accumulation, drop_last):
    source = Coloured(*GROUPS)
    options = {"drop_last": drop_last, "block": 1 if world_size * accumulation > 4 else BLOCK}
    alone = global_batches(source, 1, drop_last=drop_last)
    together = global_batches(source, 1, world_size, accumulation=accumulation, **options)
    assert len(together) == len(alone) == (2 if drop_last else 3)
    for one, many in zip(alone, together, strict=True):
        assert len(many) == world_size * accumulation
        assert torch.equal(joined(one), joined(many))
        assert torch.equal(one[0].images, torch.cat([batch.images for batch in many]))
        assert {batch.global_size for batch in many} == {len(joined(one))}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_sample_comes_once_an_epoch_also_when_shards_do_not_divide_by_ranks(tmp_path, world_size):
    source = Coloured(*GROUPS, log=tmp_path / "log")
    steps = global_batches(source, 0, world_size, block=1)
    assert torch.cat([joined(step) for step in steps]).sort().values.tolist() == list(range(N))
    assert sorted(logged(source.log)) == list(range(N))
    assert all(len(step) == world_size for step in steps)


def test_a_batch_holds_the_samples_that_its_indices_name_and_their_keys():
    for (batch,) in loaders(Coloured(*GROUPS))[0].epoch(3):
        assert (batch.images.dtype, batch.labels.dtype, batch.weights) == (torch.uint8, torch.int64, None)
        assert batch.images.shape[1:] == (3, 4, 4)
        assert torch.equal(numbers(batch.images), batch.indices)
        assert torch.equal(batch.labels, batch.indices % 7)
        assert torch.equal(batch.keys, sample_keys(5, 3, batch.indices))


def test_a_set_of_one_group_comes_in_device_loaders_batches():
    images = torch.zeros(N, 3, 4, 4, dtype=torch.uint8)
    resident = ImageSet(images, torch.arange(N) % 7, CLASSES, "resident")
    options = {"batch_size": BATCH, "seed": 5, "accumulation": 2, "block": BLOCK}
    for rank in range(2):
        ours = stream_loader(Coloured(N), rank=rank, world_size=2, **options)
        theirs = DeviceLoader(resident, rank=rank, world_size=2, **options)
        assert ours.steps_per_epoch == theirs.steps_per_epoch
        assert ours.samples_per_epoch == theirs.samples_per_epoch == N
        for step, twin in zip(ours.epoch(2), theirs.epoch(2), strict=True):
            for one, other in zip(step, twin, strict=True):
                fields = ("labels", "indices", "keys")
                assert all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_epoch_gives_the_rest_and_reads_nothing_else(tmp_path, start, world_size):
    """Steps done by one process and continued by any number of them: each sample is read exactly once."""
    source = Coloured(*GROUPS, log=tmp_path / "log")
    done = list(itertools.islice(loaders(source)[0].epoch(1), start))
    rest = global_batches(source, 1, world_size, start)
    assert sorted(logged(source.log)) == list(range(N))
    for one, many in zip(global_batches(Coloured(*GROUPS), 1), done + rest, strict=True):
        assert torch.equal(joined(one), joined(many))
        assert torch.equal(one[0].images, torch.cat([batch.images for batch in many]))


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_step_outside_the_epoch_is_refused_before_the_first_batch(start):
    with pytest.raises(ValueError, match=f"start_step must be from 0 to 3 .*not {start}"):
        loaders(Coloured(*GROUPS))[0].epoch(0, start_step=start)


def test_a_cut_that_leaves_a_rank_without_samples_is_refused_at_once():
    with pytest.raises(ValueError, match=r"the last global batch of 11 samples .* Set drop_last=True"):
        loaders(Coloured(*GROUPS), 4, block=8)


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_images_weigh_nothing_and_a_good_one_of_their_block_is_in_their_place(world_size):
    bad, gone = {3, 40, 41}, {17}
    spoiled = Coloured(N, bad=bad, gone=gone)
    ranks = loaders(spoiled, world_size, block=4)
    steps = list(zip(*(one.epoch(0) for one in ranks), strict=True))
    whole = global_batches(Coloured(N), 0, world_size, block=4)
    for step, twins in zip(steps, whole, strict=True):
        for (batch,), twin in zip(step, twins, strict=True):
            assert torch.equal(batch.indices, twin.indices)
            assert torch.equal(batch.keys, twin.keys)
            assert batch.images.shape == twin.images.shape
            assert batch.global_size == twin.global_size
            check_weights(batch, bad | gone)
    found = [image for one in ranks for image in one.take_bad()]
    assert {image.where for image in found} == {"sample 3", "sample 40", "sample 41", "sample 17"}
    assert len(found) == 4
    assert BadImage("sample 17", "No such file") in found
    assert all(one.take_bad() == [] for one in ranks)


def check_weights(batch, bad):
    wanted = [float(index not in bad) for index in batch.indices.tolist()]
    assert (batch.weights is None) == all(wanted)
    if batch.weights is not None:
        assert batch.weights.dtype == torch.float32
        assert batch.weights.tolist() == wanted
    shown = numbers(batch.images)
    assert torch.equal(batch.labels, shown % 7)
    for slot, (index, weight) in enumerate(zip(batch.indices.tolist(), wanted, strict=True)):
        block = batch.indices[slot // 4 * 4 : slot // 4 * 4 + 4].tolist()
        assert shown[slot] == index if weight else int(shown[slot]) in set(block) - bad


@pytest.mark.parametrize(
    ("bad", "count", "block", "wanted"),
    [
        ([1], 8, 4, {1: 0}),
        ([4, 5, 6], 8, 4, {4: 7, 5: 7, 6: 7}),
        ([4, 5, 6, 7], 12, 4, {4: 0, 5: 0, 6: 0, 7: 0}),
        ([0, 1], 2, 8, {}),
        ([0, 1, 2], 5, 3, {0: 3, 1: 3, 2: 3}),
    ],
)
def test_a_stand_in_is_of_the_same_block_if_any_is_good(bad, count, block, wanted):
    assert stand_ins(bad, count, block) == wanted


def test_a_micro_batch_without_a_good_image_is_black_and_weighs_nothing():
    for (batch,) in loaders(Coloured(N, bad=range(N)))[0].epoch(0):
        assert not batch.images.any()
        assert not batch.labels.any()
        assert not batch.weights.any()


def test_bad_images_are_told_with_the_step_that_they_are_in():
    (loader,) = loaders(Coloured(N, bad=range(N)))
    for (batch,) in loader.epoch(0):
        assert [image.where for image in loader.take_bad()] == [f"sample {i}" for i in batch.indices.tolist()]


def test_a_label_outside_the_classes_is_an_error_that_names_the_sample():
    with pytest.raises(ValueError, match=r"sample \d+ has label 7, outside the 7 classes of coloured \(0 to 6\)"):
        next(loaders(Mislabelled(N))[0].epoch(0))


def test_reading_takes_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(loaders(Coloured(N))[0].epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_of_a_set_of_one_group_is_the_permutation():
    order = torch.cat([joined(step) for step in global_batches(Coloured(N), 4)])
    assert torch.equal(order, permutation(5, 4, N))


@pytest.mark.gpu
def test_no_batch_waits_for_the_device_and_all_arrive_whole():
    (loader,), (twin,) = loaders(Coloured(*GROUPS, bad=[3]), device="cuda"), loaders(Coloured(*GROUPS, bad=[3]))
    list(loader.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = list(loader.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, other in zip(on_gpu, twin.epoch(1), strict=True):
        same_batches(map(on_cpu, step), other)


def on_cpu(batch):
    weights = None if batch.weights is None else batch.weights.cpu()
    tensors = (batch.images, batch.labels, batch.indices, batch.keys)
    return Batch(*(tensor.cpu() for tensor in tensors), batch.global_size, weights)
