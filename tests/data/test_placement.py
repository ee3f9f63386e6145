"""Where a set lies: a decision by its bytes and the device's free ones, and what is said of it."""

import pytest
import torch

from robust_dist.data import DataError, ImageSet, placement
from robust_dist.data.host_set import HostSet
from robust_dist.data.placement import choose_place, place
from robust_dist.train import placing
from robust_dist.train.placing import data_lines, data_notes

GPU = torch.device("cuda", 0)


def pets(count=5, name="pets"):
    return ImageSet(
        torch.zeros(count, 3, 4, 6, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("cat",), name
    )


@pytest.mark.parametrize(
    ("nbytes", "free", "keep_on", "wanted"),
    [
        (100, 200, "auto", "device"),
        (101, 200, "auto", "host"),
        (100, 0, "auto", "host"),
        (10**15, None, "auto", "device"),
        (101, 200, "device", "device"),
        (1, 200, "host", "host"),
        (1, None, "host", "host"),
    ],
)
def test_auto_takes_the_device_for_at_most_half_of_its_free_memory(nbytes, free, keep_on, wanted):
    assert choose_place(nbytes, free, keep_on) == wanted


def free(monkeypatch, count):
    for module in (placement, placing):
        monkeypatch.setattr(module, "free_bytes", lambda device: count)


def test_a_set_that_does_not_fit_stays_on_the_host_and_says_so(monkeypatch):
    free(monkeypatch, 700)
    streamed = place(pets(), GPU)
    assert isinstance(streamed, HostSet)
    assert streamed.device == GPU
    (line,) = data_lines([streamed], "auto")
    assert line == (
        "data in the host's memory: pets (5 images, 400 bytes) do not fit beside a model on cuda:0; 700 bytes are free "
        "there; batches are copied a step ahead (data.keep_on=auto)"
    )
    assert data_notes([streamed]) == [
        {"name": "pets", "images": 5, "bytes": 400, "kept_on": "host", "device_bytes": 0},
    ]


def test_a_set_that_is_to_lie_on_the_device_and_does_not_fit_is_an_error_with_a_remedy(monkeypatch):
    free(monkeypatch, 399)
    message = r"data.keep_on='device': pets needs 400 bytes on cuda:0, where 399 are free; set data.keep_on=host"
    with pytest.raises(DataError, match=message):
        place(pets(), GPU, "device")


def test_sets_on_the_device_are_told_with_their_bytes():
    sets = [place(pets(), torch.device("cpu")), place(pets(3, "more pets"), torch.device("cpu"))]
    assert all(isinstance(one, ImageSet) for one in sets)
    assert data_lines(sets, "auto") == [
        "data on cpu: 640 bytes, pets (5 images, 400 bytes) and more pets (3 images, 240 bytes)"
    ]
    assert [note["device_bytes"] for note in data_notes(sets)] == [400, 240]


def test_one_set_may_fit_where_the_other_does_not(monkeypatch):
    free(monkeypatch, None)
    sets = [place(pets(), torch.device("cpu"), "host"), place(pets(3), torch.device("cpu"))]
    assert [line.split(":")[0] for line in data_lines(sets, "host")] == ["data on cpu", "data in the host's memory"]
    assert "do not fit" not in data_lines(sets, "host")[1]


@pytest.mark.gpu
def test_a_small_set_lies_on_the_gpu():
    kept = place(pets(), torch.device("cuda"))
    assert isinstance(kept, ImageSet)
    assert kept.device.type == "cuda"
    assert "are free there" in data_lines([kept], "auto")[0]
