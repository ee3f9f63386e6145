"""A set in the host's memory yields the same batches, keys and evaluation as one on the device."""

import pytest
import torch

from robust_dist.data import DeviceLoader, HostSet, ImageSet
from robust_dist.data.batches import Cut
from robust_dist.data.loader import Prefetcher
from robust_dist.data.sets import LabelledSet

N = 75
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def noise():
    images = torch.randint(0, 256, (N, 1, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(N) % 7, tuple("abcdefg"), "noise")


@pytest.fixture(params=[0, 1, 2])
def ahead(request, monkeypatch):
    """Number of batches in flight: 0 on a CPU, 1 on a GPU."""
    monkeypatch.setattr(Prefetcher, "ahead", request.param)
    return request.param


def same(one, other):
    fields = ("images", "labels", "indices", "keys")
    equal = all(torch.equal(getattr(one, field).cpu(), getattr(other, field).cpu()) for field in fields)
    return equal and (one.global_size, one.weights) == (other.global_size, other.weights)


def same_epoch(ours, theirs):
    pairs = list(zip(ours, theirs, strict=True))
    return pairs and all(same(a, b) for step, twin in pairs for a, b in zip(step, twin, strict=True))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("start_step", [0, 1])
@pytest.mark.usefixtures("ahead")
def test_batches_are_the_device_loader_s_at_any_cut_and_after_a_resume(noise, world_size, accumulation, start_step):
    for rank in range(world_size):
        cut = Cut(32, seed=5, rank=rank, world_size=world_size, accumulation=accumulation, block=2)
        ours, theirs = HostSet(noise, CPU).loader(cut), noise.loader(cut)
        for epoch in range(2):
            assert same_epoch(ours.epoch(epoch, start_step), theirs.epoch(epoch, start_step))


@pytest.mark.parametrize("batch_size", [10, 75, 100])
@pytest.mark.usefixtures("ahead")
def test_evaluation_sees_the_same_samples(noise, batch_size):
    ours = list(HostSet(noise, CPU).eval_batches(3, N, batch_size))
    theirs = list(noise.eval_batches(3, N, batch_size))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(ours, theirs, strict=True)
    )


def test_it_has_the_face_of_a_set_and_its_samples_to_look_at(noise):
    streamed: LabelledSet = HostSet(noise, CPU)
    loader = streamed.loader(Cut(32, seed=0))
    assert (len(streamed), streamed.name, streamed.classes, streamed.channels) == (N, "noise", noise.classes, 1)
    assert (streamed.group_sizes, streamed.stage, streamed.take_bad()) == ((N,), noise.stage, [])
    assert torch.equal(streamed.filler(), noise.filler())
    ours, theirs = streamed.first_samples(1, 2, 8, 3), noise.first_samples(1, 2, 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    assert ours.bad == theirs.bad == {}
    assert (loader.steps_per_epoch, loader.samples_per_epoch, loader.take_bad()) == (3, N, [])


def test_a_start_outside_the_epoch_and_a_set_elsewhere_are_refused(noise):
    loader = HostSet(noise, CPU).loader(Cut(32, seed=0))
    with pytest.raises(ValueError, match="start_step must be from 0 to 3"):
        loader.epoch(0, 4)
    elsewhere = ImageSet.__new__(ImageSet)
    for name, value in vars(noise).items():
        object.__setattr__(elsewhere, name, value.to("meta") if isinstance(value, torch.Tensor) else value)
    with pytest.raises(ValueError, match="noise is on meta: a HostSet needs it on the CPU"):
        HostSet(elsewhere, CPU)


@pytest.mark.gpu
def test_copies_run_ahead_from_pinned_memory_and_wait_for_nothing(noise):
    device = torch.device("cuda", torch.cuda.current_device())
    loader = HostSet(noise, device).loader(Cut(16, seed=5, block=2))
    list(loader.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = list(loader.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loader.prefetcher.ahead == 1
    assert {batch.images.device for (batch,) in ours} == {device}
    assert same_epoch(ours, DeviceLoader(noise, batch_size=16, seed=5, block=2).epoch(1))


@pytest.mark.gpu
def test_pinned_memory_is_not_filled_anew_while_it_is_being_copied():
    images = torch.randint(0, 256, (512, 3, 224, 224), dtype=torch.uint8)
    large = ImageSet(images, torch.zeros(512, dtype=torch.int64), ("a",), "large")
    ours = HostSet(large, torch.device("cuda")).loader(Cut(64, seed=0)).epoch(0)
    assert same_epoch(ours, large.loader(Cut(64, seed=0)).epoch(0))
