"""An epoch on a device never reads from it: shown with fake CUDA tensors, which have no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from robust_dist import RobustAugment
from robust_dist.data import DeviceLoader
from tests.data.pretended import DEVICE, image_set, move, pretending
from tests.versions import needs_torch_2_7

pytestmark = needs_torch_2_7
N, SIZE = 75, 8


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_order_batches_and_augmentation_of_an_epoch_ask_the_device_nothing(mode):
    pipeline = RobustAugment(3, SIZE, (0.5,) * 3, (0.5,) * 3, cutmix_mode=mode, cutmix_p=0.5, block=2, backend="torch")
    seen = 0
    with pretending():
        move(pipeline)
        for step in DeviceLoader(image_set(N, SIZE), batch_size=32, seed=0, block=2, accumulation=2).epoch(1):
            for batch in step:
                images, targets = batch.augmented(pipeline)
                seen += len(targets)
                assert {t.device for t in (images, targets, batch.images, batch.labels, batch.keys)} == {DEVICE}
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
def test_what_would_wait_is_noticed(ask):
    noticed = (DataDependentOutputException, DynamicOutputShapeException, AssertionError)
    with pretending(), pytest.raises(noticed):
        ask(torch.zeros(3, dtype=torch.int64, device=DEVICE))
