"""Samples of weight 0 do not count in the loss, its gradients, or evaluation."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_dist.augment import RobustAugment
from robust_dist.data import ImageSet
from robust_dist.data.batches import Cut
from robust_dist.data.decode import CentralCrop
from robust_dist.data.sets import EvalBatch
from robust_dist.data.stream_set import StreamSet
from robust_dist.train.evaluate import count_batch, evaluate, no_totals, score_of
from robust_dist.train.step import summed_loss
from tests.data.coloured import CLASSES, Coloured, colour

N, SIZE = 20, 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradients_are_those_of_the_good_samples(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator).requires_grad_()
    targets = torch.rand(6, 5, generator=generator).softmax(1)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    good = weights > 0
    weighed = summed_loss(logits, targets, weights, smoothing)
    plain = summed_loss(logits[good], targets[good], None, smoothing)
    torch.testing.assert_close(weighed, plain)
    (ours,), (theirs,) = torch.autograd.grad(weighed, logits), torch.autograd.grad(plain, logits)
    torch.testing.assert_close(ours, theirs)
    assert not ours[~good].any()


def ordered(row):
    """The classes of a row of logits in descending order, ties in class order."""
    return sorted(range(len(row)), key=lambda number: -row[number])


@pytest.mark.parametrize("num_classes", [1, 5, 6, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_5_and_every_class_s_accuracy_are_those_of_counting_by_hand(num_classes, dtype):
    generator = torch.Generator().manual_seed(0)
    # In halves, so that many logits are equal.
    logits = (4 * torch.randn(64, num_classes, generator=generator)).round().div(2).to(dtype)
    labels = torch.randint(num_classes, (64,), generator=generator)
    good = torch.arange(64) % 7 > 0
    parts = [
        count_batch(logits[of], EvalBatch(logits[of], labels[of], good[of]), num_classes)
        for of in (slice(0, 40), slice(40, 64))
    ]
    found = score_of(torch.stack(parts).sum(0))
    rows, own = logits[good].float().tolist(), labels[good].tolist()
    ranks = [ordered(row).index(label) for row, label in zip(rows, own, strict=True)]
    assert found.samples == len(own)
    assert found.accuracy == sum(rank == 0 for rank in ranks) / len(own)
    assert found.top5 == (None if num_classes < 6 else sum(rank < 5 for rank in ranks) / len(own))
    right = [[rank == 0 for rank, label in zip(ranks, own, strict=True) if label == n] for n in range(num_classes)]
    wanted = [sum(of) / len(of) if of else None for of in right]
    assert list(found.class_accuracy) == wanted
    there = [value for value in wanted if value is not None]
    assert found.mean_class_accuracy == pytest.approx(sum(there) / len(there))


class Operators(TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_counting_a_batch_calls_nothing_that_waits_for_the_device():
    with Operators() as called:
        count_batch(torch.randn(8, 10), EvalBatch(torch.zeros(8), torch.arange(8)), 10)
    assert "index_add_" in called.names
    assert called.names.isdisjoint({"_local_scalar_dense", "nonzero", "bincount", "masked_select", "item", "equal"})


def test_logits_that_are_no_numbers_name_no_class_beyond_the_first_five():
    batch = EvalBatch(torch.zeros(10), torch.arange(10))
    found = score_of(count_batch(torch.full((10, 10), torch.nan), batch, 10))
    assert (found.accuracy, found.top5) == (0.1, 0.5)
    assert math.isnan(score_of(no_totals(3, torch.device("cpu"))).mean_class_accuracy)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, len(CLASSES)))


def resident(numbers):
    colours = torch.tensor([colour(number) for number in numbers], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()
    return ImageSet(images, torch.tensor(numbers) % 7, CLASSES, "resident")


def score(model, image_set):
    augment = RobustAugment(len(CLASSES), SIZE, (0.5,) * 3, (0.5,) * 3)
    return evaluate(model, image_set, augment, batch_size=6)


def test_a_streamed_set_scores_as_a_resident_one_and_bad_images_are_left_out_and_told(model):
    bad = {0, 7, 18, 19}
    streamed = StreamSet(Coloured(N, bad=bad), CentralCrop(SIZE, SIZE), torch.device("cpu"), workers=0)
    found, wanted = score(model, streamed), score(model, resident([i for i in range(N) if i not in bad]))
    assert (found.samples, found.accuracy) == (wanted.samples, wanted.accuracy)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert {image.where for image in streamed.take_bad()} == {f"sample {index}" for index in bad}
    assert streamed.take_bad() == []


def test_a_set_without_a_good_image_scores_nan_of_no_samples(model):
    streamed = StreamSet(Coloured(N, bad=range(N)), CentralCrop(SIZE, SIZE), torch.device("cpu"), workers=0)
    found = score(model, streamed)
    assert found.samples == 0
    assert found.accuracy != found.accuracy
    assert len(streamed.take_bad()) == N


def test_a_set_for_evaluation_gives_no_training_batches():
    with pytest.raises(ValueError, match="coloured is for evaluation"):
        StreamSet(Coloured(N), CentralCrop(SIZE, SIZE), torch.device("cpu")).loader(Cut(4, seed=0))
