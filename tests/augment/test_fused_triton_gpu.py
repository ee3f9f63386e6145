"""On a GPU: Triton's kernels give the bits of torch's operations on the CPU, wait for nothing, and can be captured."""

import copy

import pytest
import torch

from robust_dist.augment import TrivialAugment, TrivialAugmentPlan, sample_keys
from tests.augment.reference import CELLS, pictures, plan_of
from tests.augment.test_fused_triton import assert_same, by_torch, keys_of, make

pytestmark = pytest.mark.gpu


def on_gpu(*tensors):
    return [t if t is None else t.cuda() for t in tensors]


def fused(module, images, labels, keys, index=None):
    ours = copy.deepcopy(module).cuda()
    ours.backend = "triton"
    images, labels, keys, index = on_gpu(images, labels, keys, index)
    return ours(images, labels, keys, index=index)


def batch(shape, kind="noise"):
    return pictures(kind, shape), torch.arange(shape[0]) % 10, sample_keys(3, 0, range(shape[0]))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (33, 47), (224, 224), (512, 300)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_bin_and_sign_equals_torchs(channels, size, interpolation):
    cells = CELLS if max(size) < 200 else CELLS[::7]
    keys = keys_of(cells)
    images, labels = pictures("noise", (len(cells), channels, *size)), torch.arange(len(cells)) % 10
    module = make(images.shape, interpolation=interpolation, fill=100, cutmix=size == (32, 32))
    assert_same(fused(module, images, labels, keys), by_torch(module, images, labels, keys))


@pytest.mark.parametrize("kind", ["smooth", "grey", "low contrast", "constant", "two levels"])
@pytest.mark.parametrize("size", [32, 224])
def test_pictures_of_every_kind_equal_torchs(kind, size):
    shape = (96, 3, size, size)
    module, parts = make(shape, num_bins=9), batch(shape, kind)
    assert_same(fused(module, *parts), by_torch(module, *parts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_come_in_the_dtype_and_format_asked_for(dtype, channels_last):
    module, parts = make((64, 3, 32, 32), dtype=dtype, channels_last=channels_last), batch((64, 3, 32, 32))
    found, expected = fused(module, *parts), by_torch(module, *parts)
    assert_same(found, expected)
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize("size", [0, 1, 7, 512, 4099])
@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_batches_of_any_size_gathered_from_the_set_equal_torchs(size, mode, alpha):
    images, labels, _ = batch((600, 3, 32, 32))
    index = torch.randint(0, 600, (size,), generator=torch.Generator().manual_seed(size))
    module = make(images.shape, cutmix_mode=mode, cutmix_alpha=alpha, cutmix_p=0.8 if mode == "elem" else 1.0)
    keys = sample_keys(1, 2, range(size))
    assert_same(fused(module, images, labels, keys, index), by_torch(module, images, labels, keys, index))


@pytest.mark.parametrize("size", [32, 224])
def test_trivialaugment_alone_equals_torchs(size):
    images = pictures("smooth", (len(CELLS[::5]), 3, size, size))
    ours, theirs = TrivialAugment(backend="triton").cuda(), TrivialAugment(backend="torch")
    plan = plan_of(CELLS[::5])
    moved = TrivialAugmentPlan(*on_gpu(plan.op, plan.magnitude_bin, plan.negative))
    assert_same([ours.apply(images.cuda(), moved)], [theirs.apply(images, plan)])


def test_channels_last_images_are_read_in_place_and_stay_so():
    images, labels, keys = batch((32, 3, 33, 47))
    images = images.contiguous(memory_format=torch.channels_last)
    module = make(images.shape)
    found = fused(module, images, labels, keys)
    assert_same(found, by_torch(module, images, labels, keys))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_nothing_waits_for_the_device(mode):
    module = make((64, 3, 32, 32), backend="triton", cutmix_mode=mode, cutmix_alpha=0.5).cuda()
    images, labels, keys = on_gpu(*batch((64, 3, 32, 32)))
    index = torch.arange(63, device="cuda")
    first = module(images, labels, keys[:63], index=index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = module(images, labels, keys[:63], index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(again, [t.cpu() for t in first])


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_a_cuda_graph_replays_with_new_keys(mode):
    images, labels, keys = batch((128, 3, 32, 32))
    module = make(images.shape, cutmix_mode=mode)
    ours = copy.deepcopy(module).cuda()
    ours.backend = "triton"
    place = on_gpu(images, labels, keys, torch.arange(128).flip(0))
    ours(*place[:3], index=place[3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(*place[:3], index=place[3])
    for epoch in (1, 2, 3):
        keys = sample_keys(0, epoch, range(128))
        place[2].copy_(keys)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out, by_torch(module, images, labels, keys, torch.arange(128).flip(0)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_the_images():
    module, parts = make((32, 3, 32, 32)), batch((32, 3, 32, 32))
    ours = copy.deepcopy(module).to("cuda:1")
    ours.backend = "triton"
    assert_same(ours(*(t.to("cuda:1") for t in parts)), by_torch(module, *parts))
