"""The contract of every source with the loader, for all kinds of files."""

import multiprocessing
import pickle
import random

import pytest

from robust_dist.data.folder import open_image_folder
from tests.data.tiny_sets import encoded, write_image_folder, write_parquet, write_shards

LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
KINDS = ("folder", "table", "saved", "imagefolder", "parquet", "shards")


def open_source(kind, root, labels=LABELS):
    """The same samples in the same order from every kind of file."""
    if kind == "folder":
        return open_image_folder(write_image_folder(root, labels))
    if kind == "shards":
        from robust_dist.data.shards import open_webdataset

        write_shards(root, labels, per_shard=4)
        return open_webdataset(f"{root}/train-*.tar")
    datasets = pytest.importorskip("datasets")
    from robust_dist.data.hub import open_hub

    if kind == "imagefolder":
        write_image_folder(root / "train", labels)
        return open_hub(str(root), "train", cache_dir=str(root / "cache"))
    write_parquet(root / "files", labels, files=2, group=3, classes=("ant", "bee", "cat", "dog"))
    if kind == "saved":
        table = datasets.load_dataset(str(root / "files"), cache_dir=str(root / "cache"))
        table.save_to_disk(root / "saved")
        return open_hub(str(root / "saved"), "train")
    if kind == "parquet":
        return open_hub(str(root / "files"), "train", streaming=True, spool_dir=root / "spool")
    return open_hub(str(root / "files"), "train", cache_dir=str(root / "cache"))


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    return open_source(request.param, tmp_path_factory.mktemp(request.param))


RIGHT = [(encoded(index, label), label) for index, label in enumerate(LABELS)]


def test_every_sample_is_the_written_file_with_its_label_in_any_order(source):
    assert len(source) == len(LABELS)
    for index in random.Random(0).sample(range(len(LABELS)), len(LABELS)):
        assert source.read(index) == RIGHT[index]
        assert type(source.read(index)[1]) is int


def test_the_groups_add_up_to_the_set(source):
    assert sum(source.group_sizes) == len(source)
    assert min(source.group_sizes) > 0


def test_labels_are_below_the_number_of_classes(source):
    assert len(source.classes) == 4
    assert set(LABELS) == set(range(4))


def test_a_sample_can_be_found_by_a_person(source):
    places = [source.where(index) for index in range(len(source))]
    assert len(set(places)) == len(places)
    assert all("/" in place for place in places)


def test_it_is_small_when_pickled_and_reads_the_same_after_it(source):
    source.read(0)
    pickled = pickle.dumps(source)
    assert len(pickled) < 6_000
    copy = pickle.loads(pickled)
    assert [copy.read(index) for index in range(len(source))] == RIGHT
    assert (copy.classes, copy.group_sizes, copy.name) == (source.classes, source.group_sizes, source.name)


def _read_all(source, seed, results):
    order = random.Random(seed).sample(range(len(source)), len(source))
    results.put(all(source.read(index) == RIGHT[index] for _ in range(20) for index in order))


def test_processes_that_were_forked_from_a_reader_do_not_disturb_each_other(source):
    source.read(5)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_read_all, args=(source, seed, results)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [results.get() for _ in workers] == [True] * 3


@pytest.mark.parametrize("index", [-1, len(LABELS)])
def test_an_index_outside_of_the_set_is_an_error(source, index):
    with pytest.raises(IndexError):
        source.read(index)
