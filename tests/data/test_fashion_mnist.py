"""Fashion-MNIST from plain or recompressed IDX files, wherever they lie."""

import gzip
import itertools
import struct
from pathlib import Path

import pytest
import torch

import robust_dist.data.fashion_mnist as fashion
from robust_dist.data import DATASETS, DataError, load_dataset
from robust_dist.data.fashion_mnist import read_idx

COUNTS = {"train": 12, "t10k": 5}


def idx_bytes(values):
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + bytes(values.flatten().tolist())


def content(prefix):
    generator = torch.Generator().manual_seed(len(prefix))
    images = torch.randint(0, 256, (COUNTS[prefix], 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.arange(COUNTS[prefix], dtype=torch.uint8) % 10


def write(folder, prefix, *, packed):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in zip(("images-idx3", "labels-idx1"), content(prefix), strict=True):
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx_bytes(values)) if packed else idx_bytes(values))


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "COUNTS", COUNTS)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "usr")


def load(tmp_path, train=True):
    return load_dataset("fashion_mnist", tmp_path / "data", train=train, download=False)


@pytest.mark.parametrize("folder", ["data/FashionMNIST/raw", "data/fashion-mnist", "usr"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_the_files_are_found_plain_and_packed_in_every_folder(tmp_path, folder, packed, train):
    prefix = "train" if train else "t10k"
    write(tmp_path / folder, prefix, packed=packed)
    loaded = load(tmp_path, train)
    images, labels = content(prefix)
    assert torch.equal(loaded.labels, labels.long())
    for channel in range(3):
        assert torch.equal(loaded.images[:, channel, 2:30, 2:30], images)


def test_the_margin_is_black(tmp_path):
    write(tmp_path / "usr", "train", packed=True)
    loaded = load(tmp_path)
    assert loaded.images.shape == (12, 3, 32, 32)
    assert loaded.images.long().sum() == 3 * content("train")[0].long().sum()


def test_torchvisions_folder_comes_before_debians(tmp_path):
    write(tmp_path / "usr", "train", packed=True)
    write(tmp_path / "data/FashionMNIST/raw", "train", packed=False)
    assert fashion.find_folder(tmp_path / "data", "train") == tmp_path / "data/FashionMNIST/raw"
    (tmp_path / "data/FashionMNIST/raw/train-labels-idx1-ubyte").unlink()
    assert fashion.find_folder(tmp_path / "data", "train") == tmp_path / "usr"


def test_missing_files_are_named_with_every_folder_and_what_to_do(tmp_path):
    write(tmp_path / "usr", "train", packed=True)
    (tmp_path / "usr/train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"fashion-mnist lacks train-.*usr lacks train-images-idx3.*apt-get install"):
        load(tmp_path)


def test_a_failed_download_keeps_the_advice(tmp_path, monkeypatch):
    pytest.importorskip("torchvision.datasets")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"(?s)lacks train-images.*The download failed: .*train-images-idx3-ubyte.gz"):
        load_dataset("fashion_mnist", tmp_path / "data", train=True)


@pytest.mark.parametrize("packed", [False, True])
def test_a_download_joins_own_files_and_changes_none(tmp_path, monkeypatch, packed):
    torchvision_class = pytest.importorskip("torchvision.datasets").FashionMNIST
    raw = tmp_path / "data/FashionMNIST/raw"
    write(raw, "train", packed=packed)
    before = {path.name: path.read_bytes() for path in raw.iterdir()}

    def download(self):
        for prefix, plain in itertools.product(fashion.COUNTS, (True, False)):
            write(Path(self.raw_folder), prefix, packed=not plain)

    monkeypatch.setattr(torchvision_class, "download", download)
    load_dataset("fashion_mnist", tmp_path / "data", train=False)
    after = {path.name: path.read_bytes() for path in raw.iterdir()}
    assert {name: after[name] for name in before} == before
    assert sorted(name.removesuffix(".gz") for name in after if name not in before) == sorted(
        2 * ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 10, 200, -1])
def test_a_torn_file_is_named_with_what_to_do(tmp_path, packed, keep):
    write(tmp_path / "usr", "train", packed=packed)
    path = next((tmp_path / "usr").glob("train-images*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path.name} .*Delete {path.name} in .*usr"):
        load(tmp_path)


def test_a_file_of_another_count_is_named(tmp_path):
    write(tmp_path / "usr", "train", packed=False)
    path = tmp_path / "usr/train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(torch.zeros(11, dtype=torch.uint8)))
    with pytest.raises(DataError, match=rf"{path.name} holds \[11\] values, not \[12\]"):
        load(tmp_path)


def test_a_label_outside_the_classes_is_named(tmp_path):
    write(tmp_path / "usr", "train", packed=False)
    labels = content("train")[1]
    labels[4] = 200
    (tmp_path / "usr/train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match="image 4 has label 200, outside the 10 classes"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("start", "match"),
    [(b"\x00\x00\x0d\x02", "begins with 00000d02, not 00000802"), (b"PK\x03\x04", "begins with 504b0304")],
)
def test_a_foreign_file_is_told_by_its_first_bytes(tmp_path, start, match):
    path = tmp_path / "file"
    path.write_bytes(start + bytes(100))
    with pytest.raises(DataError, match=match):
        read_idx(path, 2)


def test_extra_bytes_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(torch.arange(6, dtype=torch.uint8).reshape(2, 3)))
    assert read_idx(path, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="its header says 6 values, but it has 7"):
        read_idx(path, 2)


def test_mean_and_std_follow_from_the_unpadded_ones():
    inside, mean, std = (28 / 32) ** 2, 0.28604, 0.35302
    padded = (inside * (std**2 + mean**2) - (inside * mean) ** 2) ** 0.5
    assert DATASETS["fashion_mnist"].mean[0] == pytest.approx(inside * mean, abs=5e-5)
    assert DATASETS["fashion_mnist"].std[0] == pytest.approx(padded, abs=5e-5)
