"""Data sets by name."""

import sys

import pytest

from robust_dist.data import DATASETS, dataset_info, load_dataset
from robust_dist.data.fashion_mnist import DEBIAN_FOLDER


@pytest.mark.parametrize("name", DATASETS)
def test_every_record_is_complete(name):
    info = dataset_info(name)
    assert len(info.mean) == len(info.std) == info.channels
    assert all(0 < value < 1 for value in info.mean + info.std)
    assert info.num_classes > 1
    assert info.size > 2 * info.crop_padding
    assert info.description


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cifar-10'; known are cifar10, cifar100, digits, .*mean 'cifar10'"):
        load_dataset("cifar-10", "data", train=True)


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("cifar10", "torchvision.datasets")])
def test_a_missing_package_is_named_with_its_remedy(name, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module.split('.')[0]}: pip install 'robust_dist\[train\]'"):
        load_dataset(name, tmp_path, train=True)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits"}))
def test_without_download_nothing_is_written(name, tmp_path):
    if name == "fashion_mnist" and DEBIAN_FOLDER.exists():
        pytest.skip("Debian's package is installed")
    root = tmp_path / "data"
    with pytest.raises(ValueError, match=str(root)):
        load_dataset(name, root, train=True, download=False)
    assert list(tmp_path.iterdir()) == []
