"""`robust-dist recipe` inspects a folder and writes a recipe that trains as it is."""

import json
import shutil

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from robust_dist.cli import main
from robust_dist.data.pictures import write_pictures
from robust_dist.train.folder import RunFolderError
from robust_dist.train.main import train
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import parse_recipe
from tests.data.tiny_sets import encode, picture, write_image_folder


def suggested(folder, capsys):
    """The recipe that was printed, and its comments."""
    assert main(["recipe", str(folder)]) == 0
    text = capsys.readouterr().out
    return yaml.safe_load(text), [line.strip("# ") for line in text.splitlines() if "#" in line]


def test_what_it_writes_trains_as_it_is_and_notes_the_split_and_goes_on(tmp_path, capsys):
    AcceleratorState._reset_state(True)
    pictures, file = tmp_path / "pictures", tmp_path / "recipe.yaml"
    assert write_pictures(pictures, 40) == 40
    assert main(["recipe", str(pictures), "--out", str(file)]) == 0
    assert f"train with: robust-dist train --config {file}" in capsys.readouterr().out
    assert main(["recipe", str(pictures), "--out", str(file)]) == 2
    assert "already exists; choose another path" in capsys.readouterr().err
    words = [
        "--config",
        str(file),
        "--run_dir",
        str(tmp_path / "run"),
        "--epochs",
        "3",
        "--batch_size",
        "8",
        "--tracking.trackers",
        "[]",
    ]
    recipe = parse_recipe([*words, "--model.name", "resnet8", "--data.workers", "0"])
    assert (recipe.data.in_memory, recipe.data.size, recipe.augment.flip) == (True, 32, False)
    rows = train(recipe)
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [record[part]["split"] for part in ("train", "eval")] == [{"eval_share": 0.2, "seed": 0}] * 2
    assert record["train"]["images"] + record["eval"]["images"] == 40
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    assert list(map(without_measured, train(recipe))) == list(map(without_measured, rows))
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert ", the same)" in capsys.readouterr().out
    shutil.copyfile(pictures / "0" / "001.png", pictures / "0" / "more.png")
    with pytest.raises(RunFolderError, match="contains a run on other data"):
        train(recipe)


def test_parts_sizes_bad_files_copies_and_turned_images_are_seen(tmp_path, capsys):
    root = tmp_path / "outer" / "my pets"
    write_image_folder(root / "Train", [0] * 16 + [1] * 3)
    write_image_folder(root / "test", [0, 1])
    (root / "Train" / "ant" / "torn.jpg").write_bytes(b"no image")
    shutil.copyfile(root / "Train" / "ant" / "00000.jpg", root / "test" / "bee" / "copy.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "Train" / "bee" / "turned.jpg").write_bytes(encode(picture(90, 1), exif=exif))
    recipe, said = suggested(tmp_path / "outer", capsys)
    assert recipe["data"] | {"workers": 0} == {
        "name": "imagefolder",
        "root": str(root),
        "train": "Train",
        "eval": "test",
        "size": 32,
        "crop_scale": [0.7, 1.0],
        "crop_ratio": [0.9, 1.1],
        "mean": recipe["data"]["mean"],
        "std": recipe["data"]["std"],
        "exif": "on",
        "max_bad_share": 0.09,
        "drop_last": True,
        "block": 2,
        "workers": 0,
    }
    told = "\n".join(said)
    for part in (
        "24 images of 2 classes",
        "unbalanced: 'ant' has 75% of them",
        "torn.jpg: not an image",
        "copy.jpg and",
        "width 48, height 40 pixels; 0 are grey",
        "contains only my pets",
    ):
        assert part in told


def test_a_folder_with_a_training_part_alone_is_split(tmp_path, capsys):
    write_image_folder(tmp_path / "train", [0, 0, 1, 1])
    recipe, _ = suggested(tmp_path, capsys)
    assert (recipe["data"]["root"], recipe["data"]["eval_share"]) == (str(tmp_path / "train"), 0.2)


def empty(folder):
    folder.mkdir()


def loose(folder):
    folder.mkdir()
    (folder / "1.jpg").write_bytes(encode(picture(0, 0)))


def shards(folder):
    folder.mkdir()
    (folder / "train-0.tar").write_bytes(b"")


def unreadable(folder):
    (folder / "ant").mkdir(parents=True)
    (folder / "ant" / "1.jpg").write_bytes(b"")


def alone(folder):
    write_image_folder(folder, [0, 1])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "is not there; name a folder"),
        (lambda folder: folder.write_text(""), "is a file; name a folder"),
        (empty, "has no sub-folders and no images"),
        (loose, "1 images: put each into a sub-folder named after its class"),
        (shards, "start from the recipe imagenet_resnet50_shards"),
        (unreadable, "none of 1 images can be read: "),
        (alone, "each class has one image, so none is left for evaluation"),
    ],
)
def test_what_is_no_folder_of_classes_is_told_apart(make, named, tmp_path, capsys):
    make(tmp_path / "given")
    assert main(["recipe", str(tmp_path / "given")]) == 2
    assert named in capsys.readouterr().err
