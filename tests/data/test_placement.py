"""Where a set lies, decided by its size and the device's free memory, and what the start says about it."""

import pytest
import torch

from robust_dist.data import DataError, HostSet, ImageSet, image_set
from robust_dist.data.image_set import choose_places, place
from robust_dist.train import opening
from robust_dist.train.data_config import DataConfig
from robust_dist.train.opening import data_lines, data_notes
from robust_dist.train.sources import open_sets

GPU = torch.device("cuda", 0)


def pets(count=5, name="pets"):
    return ImageSet(
        torch.zeros(count, 3, 4, 6, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("cat",), name
    )


@pytest.mark.parametrize(
    ("sizes", "free", "keep_on", "wanted"),
    [
        ([100], 200, "auto", ["device"]),
        ([101], 200, "auto", ["host"]),
        ([60, 40], 200, "auto", ["device", "device"]),
        ([60, 41], 200, "auto", ["device", "host"]),
        ([101, 100], 200, "auto", ["host", "device"]),
        ([1], 0, "auto", ["host"]),
        ([10**15, 10**15], None, "auto", ["device", "device"]),
        ([101, 1], 200, "device", ["device", "device"]),
        ([1, 1], 200, "host", ["host", "host"]),
        ([1], None, "host", ["host"]),
    ],
)
def test_auto_takes_the_device_for_at_most_half_of_its_free_memory(sizes, free, keep_on, wanted):
    assert choose_places(sizes, free, keep_on) == wanted


def free(monkeypatch, count):
    for module in (image_set, opening):
        monkeypatch.setattr(module, "free_bytes", lambda device: count)


def test_a_set_that_does_not_fit_stays_on_the_host_and_says_so(monkeypatch):
    free(monkeypatch, 700)
    (streamed,) = place([pets()], GPU)
    assert isinstance(streamed, HostSet)
    assert streamed.device == GPU
    (line,) = data_lines([streamed], "auto")
    assert line == (
        "400 bytes of data in the host's memory, too much for 50% of the 700 bytes free on cuda:0 "
        "(data.keep_on=auto); batches are copied a step ahead: pets, 400 bytes in 5 images"
    )
    assert data_notes([streamed]) == [
        {"name": "pets", "images": 5, "bytes": 400, "kept_on": "host", "device_bytes": 0},
    ]


def test_a_set_that_is_to_lie_on_the_device_and_does_not_fit_is_an_error_with_a_remedy(monkeypatch):
    free(monkeypatch, 399)
    message = r"data.keep_on='device': pets needs 400 bytes on cuda:0, but 399 are free; set data.keep_on=host"
    with pytest.raises(DataError, match=message):
        place([pets()], GPU, "device")


def test_sets_on_the_device_are_told_with_their_bytes():
    sets = place([pets(), pets(3, "more pets")], torch.device("cpu"))
    assert all(isinstance(one, ImageSet) for one in sets)
    assert data_lines(sets, "auto") == [
        "640 bytes of data on cpu: pets, 400 bytes in 5 images; more pets, 240 bytes in 3 images"
    ]
    assert [note["device_bytes"] for note in data_notes(sets)] == [400, 240]


def test_one_set_may_lie_on_the_device_and_the_other_on_the_host(monkeypatch):
    free(monkeypatch, 1000)
    first, second = data_lines([pets(), HostSet(pets(3), GPU)], "auto")
    assert first == "400 bytes of data on cpu (1000 bytes free there): pets, 400 bytes in 5 images"
    assert second.startswith("240 bytes of data in the host's memory, too much for 50%")
    assert data_lines([HostSet(pets(), GPU)], "host")[0].startswith(
        "400 bytes of data in the host's memory (data.keep_on=host); "
    )


def test_a_set_that_is_read_while_training_has_no_line():
    assert data_lines([object()], "auto") == data_notes([object()]) == []


@pytest.mark.parametrize(("keep_on", "kind"), [("auto", ImageSet), ("device", ImageSet), ("host", HostSet)])
def test_the_recipe_s_key_decides(keep_on, kind):
    data = DataConfig(name="digits", keep_on=keep_on)
    assert {type(one) for one in open_sets(data, torch.device("cpu"), download=False)} == {kind}


@pytest.mark.gpu
def test_a_small_set_lies_on_the_gpu():
    (kept,) = place([pets()], torch.device("cuda"))
    assert isinstance(kept, ImageSet)
    assert kept.device.type == "cuda"
    assert "free there" in data_lines([kept], "auto")[0]
