"""An image folder's samples are those of torchvision's ImageFolder, and faults of a folder are named."""

import os
import pickle
import random

import numpy as np
import pytest

from robust_dist.data.decode import decode_rgb
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.folder import open_image_folder
from robust_dist.data.source import PackedStrings
from tests.data.tiny_sets import encoded, turned_image, write_image_folder

LABELS = [2, 0, 1, 1, 0, 2, 2]


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_samples_and_labels_are_the_written_ones(tmp_path):
    source = open_image_folder(write_image_folder(tmp_path, LABELS))
    assert source.classes == ("ant", "bee", "cat")
    assert len(source) == 7
    assert source.group_sizes == (7,)
    order = sorted(range(7), key=lambda i: (LABELS[i], i))
    assert [source.read(k) for k in range(7)] == [(encoded(i, LABELS[i]), LABELS[i]) for i in order]
    assert source.where(0) == str(tmp_path / "ant" / "00001.jpg")


def test_the_order_is_that_of_torchvision_for_nested_linked_and_oddly_named_files(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    root, outside = tmp_path / "set", tmp_path / "outside"
    names = [
        "b/2.JPEG",
        "b/10.png",
        "b/a/z.jpg",
        "b/a/a.webp",
        "b/a b/1.jpg",
        "b/B.jpg",
        "b/a.jpg",
        "a/ü.jpg",
        "a/é/1.bmp",
    ]
    random.Random(0).shuffle(names)
    for name in [*names, "b/notes.txt", "b/a/also.json"]:
        put(root / name)
    put(outside / "linked.jpg")
    (root / "c").symlink_to(outside)
    (root / "b" / "below").symlink_to(outside)
    source = open_image_folder(root)
    theirs = datasets.ImageFolder(root)
    assert source.classes == tuple(theirs.classes)
    assert [(source.where(i), source.read(i)[1]) for i in range(len(source))] == theirs.samples
    assert len(source) == len(names) + 2


def test_hidden_files_and_folders_are_left_out(tmp_path):
    write_image_folder(tmp_path, [0, 1])
    put(tmp_path / ".ipynb_checkpoints" / "a.jpg")
    put(tmp_path / "ant" / "._00000.jpg")
    put(tmp_path / "ant" / ".cache" / "a.jpg")
    source = open_image_folder(tmp_path)
    assert (source.classes, len(source)) == (("ant", "bee"), 2)


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    write_image_folder(tmp_path, [0, 1])
    for name in (
        "ant/a.HEIC",
        "ant/deep/b.heic",
        "bee/c.jp2",
        "bee/none",
        "bee/.hidden.jpg",
        "loose.jpg",
        "ant/deep/.d/x",
    ):
        put(tmp_path / name)
    reasons = dict(open_image_folder(tmp_path).left_out)
    assert reasons == {".heic": 2, ".jp2": 1, "no extension": 1, "hidden": 2, "outside of the class folders": 1}
    (tmp_path / "clean").mkdir()
    assert open_image_folder(write_image_folder(tmp_path / "clean", [0, 1])).left_out == ()


@pytest.mark.parametrize("parts", [["images"], ["train", "Val"]])
def test_a_folder_one_level_too_high_is_an_error(tmp_path, parts):
    for part in parts:
        write_image_folder(tmp_path / part, [0, 1])
    with pytest.raises(DataError, match=rf"one level too high.*{parts[0]}.* the sub-folders 'ant', 'bee'"):
        open_image_folder(tmp_path)


def test_classes_may_have_their_images_in_folders_of_their_own(tmp_path):
    for name in ("ant/images/1.jpg", "bee/images/1.jpg", "cat/day/1.jpg", "cat/night/1.jpg"):
        put(tmp_path / name)
    assert open_image_folder(tmp_path).classes == ("ant", "bee", "cat")
    put(tmp_path / "one" / "only" / "images" / "1.jpg")
    assert open_image_folder(tmp_path / "one").classes == ("only",)


def test_a_source_is_pickled_without_an_object_a_sample_and_reads_the_same_after_it(tmp_path):
    source = open_image_folder(write_image_folder(tmp_path, LABELS))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(7)] == [source.read(i) for i in range(7)]
    arrays = [value for value in vars(source).values() if not isinstance(value, (str, tuple, np.ndarray, type))]
    assert [type(value) for value in arrays] == [PackedStrings]


@pytest.mark.parametrize("strings", [[], [""], ["a", "", "bc"], ["ü", os.fsdecode(b"\xff\xfe"), "x" * 3000]])
def test_packed_strings_are_the_strings(strings):
    packed = pickle.loads(pickle.dumps(PackedStrings.of(strings)))
    assert list(packed) == strings
    assert len(packed) == len(strings)
    with pytest.raises(IndexError):
        packed[len(strings)]


def test_class_folders_in_both_forms_of_unicode_are_one_class(tmp_path):
    composed, parted = "caf\u00e9", "cafe\u0301"
    for part, names in {"train": [composed, parted, "zoo"], "val": [parted, "zoo"], "one": ["ant", parted]}.items():
        for name in names:
            put(tmp_path / part / name / "1.jpg", f"{part} {name}".encode())
    train = open_image_folder(tmp_path / "train")
    assert train.classes == (parted, "zoo")
    assert [train.read(i) for i in range(3)] == [
        (f"train {name}".encode(), label) for name, label in [(parted, 0), (composed, 0), ("zoo", 1)]
    ]
    val = open_image_folder(tmp_path / "val", classes=(composed, "zoo"))
    assert [val.read(i)[1] for i in range(2)] == [0, 1]
    assert val.where(0) == str(tmp_path / "val" / parted / "1.jpg")
    with pytest.raises(DataError, match="lacks 'zoo' and also has 'ant'"):
        open_image_folder(tmp_path / "one", classes=train.classes)


def test_exif_of_a_folder_is_left_unless_it_is_asked_for(tmp_path):
    put(tmp_path / "a" / "1.jpg", turned_image())
    read = [open_image_folder(tmp_path, exif=exif).read(0)[0] for exif in ("auto", "off", "on")]
    assert [decode_rgb(data).size for data in read] == [(48, 40), (48, 40), (40, 48)]


def test_a_file_that_is_gone_is_a_bad_image(tmp_path):
    source = open_image_folder(write_image_folder(tmp_path, LABELS))
    os.unlink(source.where(3))
    with pytest.raises(BadImageError, match="No such file"):
        source.read(3)
    assert source.read(2)[1] == 1


def test_the_training_splits_classes_give_the_labels(tmp_path):
    folder = write_image_folder(tmp_path, [0, 1, 2])
    source = open_image_folder(folder, classes=("cat", "ant", "bee"))
    assert source.classes == ("cat", "ant", "bee")
    assert [source.read(i) for i in range(3)] == [(encoded(2, 2), 0), (encoded(0, 0), 1), (encoded(1, 1), 2)]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("ant", "bee", "dog"), r"val must have the training split's classes, but lacks 'dog'$"),
        (("ant",), r"also has 'bee'"),
        (("ant", *"abcdefg"), r"lacks 'a', 'b', 'c', 'd', 'e' and 2 more and also has 'bee'"),
    ],
)
def test_other_classes_than_the_training_splits_are_named(tmp_path, classes, words):
    with pytest.raises(DataError, match=words):
        open_image_folder(write_image_folder(tmp_path, [0, 1]), classes=classes, name="val")


def test_a_folder_that_is_none_or_has_no_images_says_what_would_be_right(tmp_path):
    file = tmp_path / "file.jpg"
    put(file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    put(tmp_path / "flat" / "a.jpg")
    write_image_folder(tmp_path / "hole", [0, 1])
    put(tmp_path / "hole" / "cat" / "readme.txt")
    for name, words in {
        "absent": r"there is no folder .*absent; .*<folder>/<class>/<image>",
        "file.jpg": r"file.jpg is a file; .*<folder>/<class>/<image>",
        "empty": r"empty has no sub-folders; .*<folder>/<class>/<image>",
        "flat": r"flat has no sub-folders; .*<folder>/<class>/<image>",
        "hole": r"no image in the class folder 'cat'. Images end in .jpg, .*",
    }.items():
        with pytest.raises(DataError, match=words):
            open_image_folder(tmp_path / name)


def test_a_link_to_a_folder_above_is_an_error_and_not_an_endless_walk(tmp_path):
    write_image_folder(tmp_path, [0, 1])
    (tmp_path / "ant" / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"loop.* contains itself through a link"):
        open_image_folder(tmp_path)
