"""The bundled digits are as their docstring says."""

import hashlib

import pytest
import torch

from robust_dist.data import DATASETS, load_dataset
from robust_dist.data.registry import enlarge, held_out

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def both():
    return {train: load_dataset("digits", "/nonexistent", train=train, download=False) for train in (True, False)}


def test_the_split_is_1438_and_359_of_ten_classes(both):
    assert {train: len(image_set) for train, image_set in both.items()} == {True: 1438, False: 359}
    assert both[True].num_classes == DATASETS["digits"].num_classes == 10


def test_a_fifth_of_each_class_is_held_out(both):
    test, train = both[False].labels.bincount(), both[True].labels.bincount()
    assert torch.equal(test, ((test + train) * 0.2).round().long())


def test_the_split_never_changes(both):
    scans = sklearn_datasets.load_digits()
    numbers = held_out(torch.tensor(scans.target.tolist())).nonzero().flatten().tolist()
    assert hashlib.sha256(str(numbers).encode()).hexdigest()[:16] == "85534e49b9ee16ca"


def test_no_scan_lies_in_both_splits(both):
    scans = torch.tensor(sklearn_datasets.load_digits().images)
    train, test = ({image.numpy().tobytes() for image in both[t].images} for t in (True, False))
    assert len(scans.unique(dim=0)) == len(train) + len(test)
    assert not train & test


def test_mean_and_std_are_those_of_the_training_images(both):
    pixels = both[True].images[:, 0].double() / 255
    info = DATASETS["digits"]
    assert info.mean == (pytest.approx(pixels.mean().item(), abs=5e-5),) * 3
    assert info.std == (pytest.approx(pixels.std().item(), abs=5e-5),) * 3


def test_the_three_channels_are_equal(both):
    images = both[False].images
    assert images.shape[1:] == (3, 32, 32)
    assert torch.equal(images[:, :1].expand_as(images), images)


def test_one_nearest_neighbour_reaches_what_the_docstring_says():
    scans = sklearn_datasets.load_digits()
    labels, pixels = torch.tensor(scans.target.tolist()), torch.tensor(scans.images.tolist()).flatten(1)
    test = held_out(labels)
    nearest = torch.cdist(pixels[test], pixels[~test]).argmin(1)
    right = (labels[~test][nearest] == labels[test]).sum().item()
    assert f"{right / 359:.2%}" == "99.44%"


def test_enlarging_is_bilinear_and_spans_0_to_255():
    scans = torch.zeros(2, 8, 8)
    scans[0] = 16
    scans[1, :, 4:] = 8
    large = enlarge(scans)
    assert large[0].unique().tolist() == [255]
    ramp = [round(127.5 * eighths / 8) for eighths in (1, 3, 5, 7)]
    assert large[1, 0, 9, 12:20].tolist() == [0, 0, *ramp, 128, 128]


def test_digits_are_not_mirrored():
    assert DATASETS["digits"].flip is False
