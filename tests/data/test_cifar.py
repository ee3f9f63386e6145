"""CIFAR through torchvision's own classes, on small files of the same format."""

import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch

from robust_dist.data import DataError
from robust_dist.data.cifar import load_with

datasets = pytest.importorskip("torchvision.datasets")
CLASSES = [f"class {i}" for i in range(10)]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def batch(seed, count, key):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": data, key: rng.integers(0, 10, count).tolist()}


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def small(request, tmp_path):
    """A subclass of torchvision's class whose file lists name two small training files and a test file."""
    parent = getattr(datasets, request.param)
    key, meta_key = ("labels", "label_names") if request.param == "CIFAR10" else ("fine_labels", "fine_label_names")
    folder = tmp_path / parent.base_folder
    folder.mkdir()
    content = {"a": batch(0, 6, key), "b": batch(1, 4, key), "t": batch(2, 3, key)}
    md5 = {name: write(folder, name, entry) for name, entry in content.items()}
    meta_md5 = write(folder, "meta", {meta_key: CLASSES})
    meta = {"filename": "meta", "key": meta_key, "md5": meta_md5}
    lists = {"train_list": [["a", md5["a"]], ["b", md5["b"]]], "test_list": [["t", md5["t"]]], "meta": meta}
    return type(request.param, (parent,), {**lists, "content": content, "key": key}), tmp_path


@pytest.mark.parametrize(("train", "files"), [(True, "ab"), (False, "t")])
def test_images_and_labels_are_the_files(small, train, files):
    dataset_class, root = small
    loaded = load_with(dataset_class, root, train=train, download=False)
    entries = [dataset_class.content[name] for name in files]
    data = torch.from_numpy(np.concatenate([entry["data"] for entry in entries]))
    assert torch.equal(loaded.images, data.reshape(-1, 3, 32, 32))
    assert loaded.labels.tolist() == [label for entry in entries for label in entry[dataset_class.key]]
    assert loaded.images.is_contiguous()
    assert loaded.classes == tuple(CLASSES)
    assert loaded.name == f"{dataset_class.__name__} ({'train' if train else 'test'})"


@pytest.mark.parametrize("name", ["b", "t", "meta"])
def test_a_missing_file_is_named_with_its_folder_and_what_to_do(small, name):
    dataset_class, root = small
    (root / dataset_class.base_folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} \(missing\) in .*{dataset_class.base_folder}. Allow the download"):
        load_with(dataset_class, root, train=True, download=False)


def test_a_torn_file_is_named(small):
    dataset_class, root = small
    path = root / dataset_class.base_folder / "a"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"{dataset_class.__name__}: a \(torn\) in "):
        load_with(dataset_class, root, train=True, download=False)


def test_a_label_outside_the_classes_is_named(small):
    dataset_class, root = small
    entry = dataset_class.content["t"]
    entry[dataset_class.key][1] = 10
    md5 = write(root / dataset_class.base_folder, "t", entry)
    dataset_class.test_list = [["t", md5]]
    with pytest.raises(ValueError, match="image 1 has label 10, outside the 10 classes"):
        load_with(dataset_class, root, train=False, download=False)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", ["a", "t", "meta"])
def test_a_file_that_is_not_the_published_one_is_refused_and_left_as_it_is(small, name, download):
    dataset_class, root = small
    archive(dataset_class, root, root / "small.tar.gz")
    write(root / dataset_class.base_folder, name, {**batch(7, 6, dataset_class.key), "label_names": CLASSES})
    before = contents(root)
    with pytest.raises(DataError, match=rf"{name} \(not the published file\) in .*Nothing was changed.*data.own_files"):
        load_with(dataset_class, root, train=True, download=download)
    assert contents(root) == before


def test_own_files_are_trained_on_as_they_are_where_that_is_asked_for(small):
    dataset_class, root = small
    labels = [9] * 6
    write(root / dataset_class.base_folder, "a", {**dataset_class.content["a"], dataset_class.key: labels})
    before = contents(root)
    loaded = load_with(dataset_class, root, train=True, download=True, own_files=True)
    assert loaded.labels.tolist() == labels + dataset_class.content["b"][dataset_class.key]
    assert contents(root) == before


def test_a_missing_file_comes_from_the_archive_beside_own_ones_and_changes_no_other_file(small):
    dataset_class, root = small
    folder = root / dataset_class.base_folder
    archive(dataset_class, root, root / "small.tar.gz")
    write(folder, "a", {**dataset_class.content["a"], dataset_class.key: [9] * 6})
    (folder / "notes.txt").write_text("mine")
    (folder / "t").unlink()
    before = contents(root)
    loaded = load_with(dataset_class, root, train=False, download=True, own_files=True)
    assert loaded.labels.tolist() == dataset_class.content["t"][dataset_class.key]
    after = contents(root)
    assert {path: after[path] for path in before} == before
    assert [path.name for path in after if path not in before] == ["t"]


def test_an_archive_of_the_user_s_is_not_written_over(small):
    dataset_class, root = small
    archive(dataset_class, root, root / "small.tar.gz")
    (root / "small.tar.gz").write_bytes(b"mine")
    (root / dataset_class.base_folder / "t").unlink()
    with pytest.raises(DataError, match="The download failed"):
        load_with(dataset_class, root, train=True, download=True)
    assert (root / "small.tar.gz").read_bytes() == b"mine"


def test_own_files_that_are_no_set_are_named(small):
    dataset_class, root = small
    (root / dataset_class.base_folder / "a").write_bytes(b"no pickle")
    with pytest.raises(DataError, match=r"the files in .* cannot be read"):
        load_with(dataset_class, root, train=True, download=False, own_files=True)


def archive(dataset_class, root, path):
    """Pack the set's folder, and register the archive with the class; no address responds."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / dataset_class.base_folder, dataset_class.base_folder)
    dataset_class.url, dataset_class.filename = "http://127.0.0.1:1/none", path.name
    dataset_class.tgz_md5 = hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path_factory):
    """A local web server over an empty folder."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_the_download_mends_what_is_missing(small, server, tmp_path_factory):
    dataset_class, root = small
    folder, url = server
    archive = folder / "small.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / dataset_class.base_folder, dataset_class.base_folder)
    dataset_class.url, dataset_class.filename = f"{url}/small.tar.gz", "small.tar.gz"
    dataset_class.tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    fetched = load_with(dataset_class, tmp_path_factory.mktemp("empty"), train=True, download=True)
    assert torch.equal(fetched.images, load_with(dataset_class, root, train=True, download=False).images)


def test_a_failed_download_says_so_and_what_was_missing(small, server):
    dataset_class, root = small
    dataset_class.url, dataset_class.filename = f"{server[1]}/absent.tar.gz", "absent.tar.gz"
    (root / dataset_class.base_folder / "t").unlink()
    with pytest.raises(DataError, match=r"t \(missing\) in .* The download failed: .*404"):
        load_with(dataset_class, root, train=True, download=True)


def test_complete_files_are_never_fetched_again(small):
    dataset_class, root = small
    dataset_class.url = "http://127.0.0.1:1/never"
    load_with(dataset_class, root, train=True, download=True)
