"""ImageSet rejects what is not a labelled image set, and says what is wrong."""

import pytest
import torch

import robust_dist.data.image_set as image_set_module
from robust_dist.data import DataError, ImageSet

CLASSES = ("cat", "dog", "ship")


def make(**changes):
    fields = {
        "images": torch.zeros(5, 3, 4, 6, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 1, 0]),
        "classes": CLASSES,
        "name": "pets",
    }
    return ImageSet(**(fields | changes))


def test_counts_and_bytes_are_those_of_the_tensors():
    pets = make()
    assert (len(pets), pets.num_classes, pets.nbytes) == (5, 3, 5 * 3 * 4 * 6 + 5 * 8)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"images": torch.zeros(5, 3, 4, 6)}, TypeError, "pets: images must be torch.uint8, not torch.float32"),
        ({"labels": torch.zeros(5)}, TypeError, "pets: labels must be torch.int64, not torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"pets: labels must be \[5\].* not \[4\]"),
        ({"labels": torch.zeros(5, 1, dtype=torch.int64)}, ValueError, r"labels must be \[5\].* not \[5, 1\]"),
        ({"images": torch.zeros(5, 4, 6, dtype=torch.uint8)}, ValueError, r"\[N, C, H, W\].*not \[5, 4, 6\]"),
        ({"images": torch.zeros(0, 3, 4, 6, dtype=torch.uint8)}, ValueError, r"no empty side, not \[0, 3, 4, 6\]"),
        ({"labels": torch.tensor([0, 1, 2, 3, 9])}, ValueError, "pets: image 3 has label 3, outside the 3 classes"),
        ({"labels": torch.tensor([0, -1, 2, 3, 9])}, ValueError, r"image 1 has label -1,.*\(0 to 2\)"),
    ],
)
def test_what_is_wrong_is_named(changes, error, match):
    with pytest.raises(error, match=match):
        make(**changes)


def test_images_and_labels_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="images are on cpu but labels on meta"):
        make(labels=torch.zeros(5, dtype=torch.int64, device="meta"))


def test_to_the_same_device_is_the_set_itself():
    pets = make()
    assert pets.to("cpu") is pets


def test_a_set_that_does_not_fit_says_bytes_needed_and_free_and_one_that_just_fits_passes(monkeypatch):
    monkeypatch.setattr(image_set_module, "free_bytes", lambda device: 399 if device.index else 400)
    with pytest.raises(DataError, match=r"pets: 400 bytes .* on cuda:1, but 399 are free.*data.name=imagefolder"):
        make().to("cuda:1")
    make().fits_on("cuda")


@pytest.mark.gpu
def test_cuda_tells_its_free_memory_and_takes_the_set():
    device = torch.device("cuda", torch.cuda.current_device())
    assert 0 < image_set_module.free_bytes(device) <= torch.cuda.get_device_properties(device).total_memory
    moved = make().to(device)
    assert moved.device == device
    assert moved.to("cuda") is moved
