"""An epoch on a device asks it nothing: shown on pretended CUDA tensors, which hold no value to ask for."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust_dist import RobustAugment
from robust_dist.data import DeviceLoader, ImageSet

N, SIZE = 75, 8


class NoCopies(TorchDispatchMode):
    """Refuses what moves values between the host and the device; numbers that ride on a kernel's launch are none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        before, after = (
            {t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.dim()}
            for tree in ((args, kwargs), found)
        )
        assert len(before | after) < 2, f"{function} moves values from {before} to {after}"
        return found


@pytest.fixture
def on_a_device():
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies():
        yield torch.device("cuda", 0)


def image_set(device):
    made = object.__new__(ImageSet)  # whose checks would look at the labels
    images = torch.empty(N, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    labels = torch.empty(N, dtype=torch.int64, device=device)
    for name, value in {"images": images, "labels": labels, "classes": tuple("abc"), "name": "pretended"}.items():
        object.__setattr__(made, name, value)
    return made


def pipeline_on(device, pipeline):
    for module in pipeline.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return pipeline


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_order_batches_and_augmentation_of_an_epoch_ask_the_device_nothing(mode, request):
    pipeline = RobustAugment(3, SIZE, (0.5,) * 3, (0.5,) * 3, cutmix_mode=mode, cutmix_p=0.5, block=2, backend="torch")
    device = request.getfixturevalue("on_a_device")
    pipeline_on(device, pipeline)
    seen = 0
    for step in DeviceLoader(image_set(device), batch_size=32, seed=0, block=2, accumulation=2).epoch(1):
        for batch in step:
            images, targets = batch.augmented(pipeline)
            seen += len(targets)
            assert {t.device for t in (images, targets, batch.images, batch.labels, batch.keys)} == {device}
    assert seen == N


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.nonzero(),
        lambda t: t.cpu(),
        lambda t: t + torch.tensor([1, 2, 3]).to(t.device),
        lambda t: t.copy_(torch.ones(3, dtype=torch.int64)),
    ],
)
def test_what_would_wait_is_noticed(on_a_device, ask):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, AssertionError)):
        ask(torch.zeros(3, dtype=torch.int64, device=on_a_device))
