"""A run's folder records what it is trained on; a start with other data, or overlapping parts, is an error."""

import json
import os
import shutil

import pytest
import torch

from robust_dist.data.identity import are_copies
from robust_dist.train.data_record import check_parts, data_record, differences
from robust_dist.train.folder import RunFolder, RunFolderError
from robust_dist.train.recipe import DataConfig, Recipe
from robust_dist.train.sources import open_sets, preprocessing_of
from tests.data.tiny_sets import encoded, write_image_folder, write_shards

CPU = torch.device("cpu")
LABELS = {"train": [0, 1, 0, 1, 1], "val": [1, 0]}


@pytest.fixture
def recipe(tmp_path):
    """A recipe for an image folder with the classes ant and bee; val's images are not in train."""
    for part, labels in LABELS.items():
        write_image_folder(tmp_path / "set" / part, labels)
    for number, path in enumerate(sorted((tmp_path / "set" / "val").rglob("*.jpg"))):
        path.write_bytes(encoded(90 + number, 0))
    return Recipe(data=DataConfig(name="imagefolder", root=str(tmp_path / "set"), size=32, workers=0))


def record_of(recipe):
    return data_record(recipe, open_sets(recipe.data, CPU, download=False), preprocessing_of(recipe.data))


def begin(recipe, folder, record):
    """Claim the folder for a run that trains an epoch."""
    run = RunFolder(folder)
    run.claim(recipe, {}, record)
    run.append({"step": 1})
    run.release()


def claim(recipe, folder):
    run = RunFolder(folder)
    run.claim(recipe, {}, record_of(recipe))
    run.release()


def test_data_json_holds_classes_counts_preprocessing_and_fingerprints(recipe, tmp_path):
    begin(recipe, tmp_path / "run", record_of(recipe))
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert record["classes"] == ["ant", "bee"]
    assert (record["train"]["images"], record["eval"]["images"]) == (5, 2)
    assert record["train"]["fingerprint"] != record["eval"]["fingerprint"]
    sizes = {
        "train_size": 32,
        "eval_size": 32,
        "eval_resize": 37,
        "crop_scale": [0.08, 1.0],
        "crop_ratio": [3 / 4, 4 / 3],
    }
    scale = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert record["preprocessing"] == {**scale, **sizes, "crop_ratio": [3 / 4, 4 / 3], "crop_padding": 0, "flip": True}


def test_the_same_data_elsewhere_and_mended_images_are_the_same(recipe, tmp_path):
    begin(recipe, tmp_path / "run", record_of(recipe))
    before = (tmp_path / "run" / "data.json").read_bytes()
    recipe.data.root = str(shutil.copytree(tmp_path / "set", tmp_path / "moved"))
    (tmp_path / "moved" / "train" / "ant" / "00000.jpg").write_bytes(encoded(5, 0))
    claim(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "data.json").read_bytes() == before


def contents(folder):
    """All files except the lock, which names the last process that looked."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def rename_class(root):
    for part in LABELS:
        os.rename(root / part / "ant", root / part / "cat")


def add_class(root):
    for part in LABELS:
        write_image_folder(root / part, [2])


CHANGES = {
    "a class is renamed": (rename_class, r"class 0 is 'bee' here, 'ant' in .*\n  class 1 is 'cat' here, 'bee' in"),
    "a class comes in": (add_class, r"classes: 3 here, 2 in the folder; new: 'cat'"),
    "an image goes": (
        lambda root: (root / "train/ant/00000.jpg").unlink(),
        r"train: the run was training on 5 images, but .*set/train has 4",
    ),
    "a label changes": (
        lambda root: os.rename(root / "train/ant/00000.jpg", root / "train/bee/00000.jpg"),
        r"train: .*set/train has as many images as before, but other names or labels",
    ),
    "evaluation images come": (
        lambda root: shutil.copy(root / "val/ant/00001.jpg", root / "val/ant/7.jpg"),
        r"eval: the run was evaluating on 2 images, but .*set/val has 3",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_start_with_other_data_is_refused_with_the_difference(recipe, tmp_path, change):
    begin(recipe, tmp_path / "run", record_of(recipe))
    alter, message = CHANGES[change]
    alter(tmp_path / "set")
    before = contents(tmp_path / "run")
    with pytest.raises(RunFolderError, match=rf"(?s)contains a run on other data.*remove .*data.json.*{message}"):
        claim(recipe, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    # Removing the file overrides this.
    (tmp_path / "run" / "data.json").unlink()
    claim(recipe, tmp_path / "run")


def test_a_folder_of_an_older_version_goes_on_and_gets_a_data_json(recipe, tmp_path):
    begin(recipe, tmp_path / "run", None)
    assert not (tmp_path / "run" / "data.json").exists()
    claim(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == ["ant", "bee"]


def test_a_run_that_has_trained_nothing_takes_other_data(recipe, tmp_path):
    claim(recipe, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000000").mkdir(parents=True)
    (tmp_path / "set" / "val" / "ant" / "8.jpg").write_bytes(encoded(8, 0))
    claim(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["eval"]["images"] == 3


def test_a_torn_data_json_is_named_and_not_taken_for_a_match(recipe, tmp_path):
    begin(recipe, tmp_path / "run", record_of(recipe))
    for content in ('{"classes": ["a', "[]", "{}"):
        (tmp_path / "run" / "data.json").write_text(content)
        with pytest.raises(RunFolderError, match=r"data\.json cannot be read|classes: 2 here, 0 in the folder"):
            claim(recipe, tmp_path / "run")


def test_another_revision_of_the_hub_counts_where_the_data_are_other_ones():
    part = {"name": "pets", "images": 3, "fingerprint": "a", "revision": "1"}
    there = {"classes": ["ant"], "train": part, "eval": part, "preprocessing": {}}
    commit = {**there, "train": {**part, "revision": "2"}}
    assert differences(commit, there) == []
    moved = {**there, "train": {**part, "revision": "2", "fingerprint": "b"}}
    (line,) = differences(moved, there)
    assert line.endswith("(the Hub's revision is 2 and was 1: set data.revision)")


def changed_labels(one):
    return type(one)(one.images, one.labels.roll(1), one.classes, one.name)


def test_sets_by_name_are_told_by_their_labels():
    recipe = Recipe()
    sets = open_sets(recipe.data, CPU, download=False)
    other = [changed_labels(sets[0]), sets[1]]
    ours, theirs = (data_record(recipe, one, preprocessing_of(recipe.data)) for one in (sets, other))
    assert ours["train"]["fingerprint"] != theirs["train"]["fingerprint"]
    assert ours["eval"] == theirs["eval"]
    assert ours["preprocessing"]["train_size"] == 32


def parts(recipe):
    return check_parts(recipe.data, open_sets(recipe.data, CPU, download=False))


def link_folder(root):
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")


def link_class(root):
    shutil.rmtree(root / "val" / "bee")
    (root / "val" / "bee").symlink_to(root / "train" / "bee")


def link_file(root):
    (root / "val" / "ant" / "00001.jpg").unlink()
    (root / "val" / "ant" / "00001.jpg").symlink_to(root / "train" / "ant" / "00000.jpg")


def hard_link(root):
    (root / "val" / "ant" / "00002.jpg").hardlink_to(root / "train" / "ant" / "00002.jpg")


@pytest.mark.parametrize("link", [link_folder, link_class, link_file, hard_link])
def test_an_image_folder_that_is_linked_to_the_training_images_is_refused(recipe, tmp_path, link):
    assert parts(recipe) == []
    link(tmp_path / "set")
    with pytest.raises(ValueError, match=r"data.train='train' and data.eval='val' share images .*/val"):
        parts(recipe)


def test_links_into_a_pool_of_images_are_no_common_images(recipe, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for path in sorted((tmp_path / "set").rglob("*.jpg")):
        target = pool / "-".join(path.parts[-3:])
        path.rename(target)
        path.symlink_to(target)
    assert parts(recipe) == []


def test_a_copy_of_the_training_images_is_a_warning_and_so_is_one_name_for_both_parts(recipe, tmp_path):
    shutil.rmtree(tmp_path / "set" / "val")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "val")
    (warning,) = parts(recipe)
    assert "looks like a copy of" in warning
    (tmp_path / "set" / "val" / "ant" / "00000.jpg").write_bytes(encoded(7, 1))
    assert parts(recipe) == []
    recipe.data.eval = "./train"
    (warning,) = parts(recipe)
    assert "data.train and data.eval are both 'train'" in warning


def test_shards_in_both_parts_are_refused_unless_both_are_named_the_same(tmp_path):
    write_shards(tmp_path, LABELS["train"] * 2, per_shard=4)
    os.symlink(tmp_path / "train-000001.tar", tmp_path / "val-000000.tar")
    data = DataConfig("webdataset", str(tmp_path), train="train-*.tar", eval="val-000000.tar", num_classes=2, workers=0)
    with pytest.raises(ValueError, match=r"share images \(4 images: 0 to 3 of .*tar\)"):
        parts(Recipe(data=data))
    data.eval = ["train-*.tar"]
    assert "both" in parts(Recipe(data=data))[0]


@pytest.fixture
def hub(tmp_path):
    """Writes a saved set without splits; returns its recipe for two parts."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": encoded(index, index % 2), "path": None} for index in range(10)]
    columns = {"image": images, "label": [index % 2 for index in range(10)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return lambda *names: Recipe(
        data=DataConfig("hub", path=str(tmp_path / "saved"), train=names[0], eval=names[1], workers=0)
    )


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        ((None, None), "10 images: 0 to 9"),
        (("train", "validation"), "10 images: 0 to 9"),
        (("train[:80%]", "train[50%:]"), "3 images: 5 to 7"),
        (("train[:3]+train[6:]", "train[5:8]"), "2 images: 6 to 7"),
    ],
)
def test_rows_of_a_table_in_both_parts_are_refused(hub, names, shared):
    with pytest.raises(ValueError, match=rf"{shared} of .*saved.*such as 'train\[:80%\]' and 'train\[80%:\]'"):
        parts(hub(*names))


def test_parts_of_a_saved_set_without_splits_are_named_by_slices(hub):
    train, test = open_sets(hub("train[:80%]", "train[80%:]").data, CPU, download=False)
    assert (len(train), len(test)) == (8, 2)
    assert test.source.read(1) == (encoded(9, 1), 1)
    assert parts(hub("train[:80%]", "train[80%:]")) == []
    assert len(parts(hub("train", "train"))) == 1
    assert not are_copies(train, test)
