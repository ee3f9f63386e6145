"""A folder without parts is split by a hash of each image's name, the same everywhere and always."""

import numpy as np
import pytest

from robust_dist.data.errors import DataError
from robust_dist.data.folder import Split, open_image_folder
from robust_dist.train.data_config import DataConfig
from robust_dist.train.sources import open_source
from tests.data.tiny_sets import CLASSES, write_image_folder

LABELS = [0] * 40 + [1] * 30 + [2] * 2 + [3]


def names(count, label=0):
    return [f"{CLASSES[label]}/{number:04d}.jpg" for number in range(count)], np.full(count, label)


def chosen(split, given, labels):
    return {name for name, is_eval in zip(given, split.evaluates(given, labels), strict=True) if is_eval}


@pytest.mark.parametrize("seed", range(3))
def test_more_files_move_no_image_to_the_other_part(seed):
    split = Split(0.2, seed)
    few, many = names(100), names(1000)
    assert chosen(split, *few) == chosen(split, *many) & set(few[0])
    assert 0.16 < len(chosen(split, *many)) / 1000 < 0.24


def test_another_seed_and_another_share_choose_others_and_order_changes_nothing():
    given, labels = names(200)
    first = chosen(Split(0.2), given, labels)
    assert chosen(Split(0.2), given[::-1], labels) == first
    assert chosen(Split(0.2, 1), given, labels) != first
    assert chosen(Split(0.3), given, labels) > first


def test_the_choice_is_the_same_in_every_version():
    assert sorted(chosen(Split(0.2), *names(12))) == ["ant/0002.jpg", "ant/0010.jpg", "ant/0011.jpg"]


@pytest.mark.parametrize("share", [1e-9, 0.2, 1 - 1e-9])
def test_a_class_of_two_images_has_one_in_each_part_and_one_alone_is_for_training(share):
    labels = np.array(LABELS)
    given = [f"{CLASSES[label]}/{number}.jpg" for number, label in enumerate(labels)]
    is_eval = Split(share).evaluates(given, labels)
    assert [is_eval[labels == label].any() for label in range(4)] == [True, True, True, False]
    assert [(~is_eval[labels == label]).any() for label in range(4)] == [True] * 4


def test_the_parts_of_a_folder_are_all_of_it_and_have_its_classes(tmp_path):
    folder = write_image_folder(tmp_path, LABELS)
    data = DataConfig("imagefolder", root=str(folder), eval_share=0.25, split_seed=4)
    whole = open_image_folder(folder)
    train = open_source(data, "train", None, download=False)
    test = open_source(data, "eval", train.classes, download=False)
    files = [[source.where(index) for index in range(len(source))] for source in (whole, train, test)]
    assert sorted(files[1] + files[2]) == sorted(files[0])
    assert train.classes == test.classes == whole.classes
    for source in (train, test):
        assert source.group_sizes == (len(source),)
        assert all(f"/{CLASSES[source.read(index)[1]]}/" in source.where(index) for index in range(len(source)))
    assert len({source.fingerprint() for source in (whole, train, test)}) == 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval_share": 0.0}, r"data\.eval_share=0\.0"),
        ({"eval_share": 1.0}, r"data\.eval_share=1\.0"),
        ({"eval_share": 0.2, "train": "train"}, r"data\.train='train' is not valid: it must be left out"),
        ({"split_seed": 3}, r"data\.split_seed=3"),
        ({"name": "digits", "eval_share": 0.2}, r"data\.eval_share=0\.2 is for data\.name=imagefolder"),
    ],
)
def test_a_split_that_cannot_be_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        DataConfig(**{"name": "imagefolder"} | settings)


def test_a_folder_of_the_other_layout_is_named_with_the_remedy(tmp_path):
    write_image_folder(tmp_path / "flat", [0, 1])
    write_image_folder(tmp_path / "parts" / "train", [0, 1])
    write_image_folder(tmp_path / "parts" / "val", [0, 1])
    with pytest.raises(DataError, match=r"there is no folder .*train.*data\.eval_share=0\.2 holds out part of them"):
        open_source(DataConfig("imagefolder", root=str(tmp_path / "flat")), "train", None, download=False)
    data = DataConfig("imagefolder", root=str(tmp_path / "parts"), eval_share=0.2)
    with pytest.raises(DataError, match="is one level too high"):
        open_source(data, "train", None, download=False)
    with pytest.raises(DataError, match="each class has one image, so none is left for evaluation"):
        open_image_folder(tmp_path / "flat").part(Split(0.2), evaluation=True)
