"""The data keys: those that each kind of set accepts, and errors that name the key."""

import pytest

from robust_dist.train.build import build_augment
from robust_dist.train.recipe import DataConfig, Recipe, conflicts, load_recipe, parse_recipe, recipe_dict
from robust_dist.train.sources import preprocessing_of

FOLDER = {"name": "imagefolder"}
HUB = {"name": "hub", "path": "someone/pets"}
SHARDS = {"name": "webdataset", "train": "train-*.tar", "eval": ["val-0.tar", "val-1.tar"]}


@pytest.mark.parametrize("settings", [{}, FOLDER, HUB, SHARDS, {**FOLDER, "train": "images/a", "workers": 0}])
def test_each_kind_of_set_takes_its_own_keys(settings):
    assert DataConfig(**settings).streamed == bool(settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"workers": 8}, r"data.workers=8 is for data.name=imagefolder or hub or webdataset.*data.name is 'digits'"),
        ({"name": "cifar10", "size": 64}, "data.size=64 is for .* leave data.size out"),
        ({**FOLDER, "keep_on": "host", "crop_scale": (0.5, 1.0)}, "data.crop_scale=.*left out: data.keep_on=host"),
        ({**FOLDER, "crop_scale": None, "crop_ratio": (1.0, 2.0)}, "data.crop_ratio=.*data.crop_scale=null keeps"),
        ({**FOLDER, "crop_scale": None, "eval_resize": 300}, "data.eval_resize=300.*augment.crop crops on the device"),
        ({**FOLDER, "streaming": True}, "data.streaming=True is for data.name=hub, but data.name is 'imagefolder'"),
        ({**FOLDER, "path": "a/b"}, "data.path='a/b' is for data.name=hub"),
        ({**FOLDER, "num_classes": 3}, "data.num_classes=3 is for data.name=hub or webdataset"),
        ({**HUB, "image_keys": ["jpg"]}, r"data.image_keys=\['jpg'\] is for data.name=webdataset"),
        ({**SHARDS, "image_keys": []}, r"data.image_keys=\[\] .*endings of image members, such as \[jpg, png\]"),
        ({"exif": "on"}, "data.exif='on' is for data.name=imagefolder or hub or webdataset"),
        ({**SHARDS, "image_column": "img"}, "data.image_column='img' is for data.name=hub"),
        ({"name": "hub"}, "data.path=None .* a set's name on the Hub, or a folder"),
        ({"name": "webdataset", "train": "a.tar"}, r"data.eval=None .*'train-\{000..146\}.tar'"),
        ({**FOLDER, "train": ["a", "b"]}, "data.train=.* a folder below data.root"),
        ({**HUB, "eval": ""}, "data.eval='' .* the name of a split"),
        ({**FOLDER, "size": 0}, "data.size=0"),
        ({**FOLDER, "eval_size": 300, "eval_resize": 256}, "data.eval_resize=256 .* evaluation images' size, 300"),
        ({**FOLDER, "crop_scale": (0.5, 0.1)}, "data.crop_scale"),
        ({**FOLDER, "crop_scale": (0.0, 1.0)}, "data.crop_scale"),
        ({**FOLDER, "crop_ratio": (2.0, 1.0)}, "data.crop_ratio"),
        ({**FOLDER, "mean": (120.0, 120.0, 120.0)}, "data.mean"),
        ({**FOLDER, "std": (0.0, 1.0, 1.0)}, "data.std"),
        ({**FOLDER, "workers": -1}, "data.workers"),
        ({**FOLDER, "prefetch": 0}, "data.prefetch"),
        ({**FOLDER, "max_bad_share": 1.0}, "data.max_bad_share"),
        ({**FOLDER, "shuffle_window": 0}, "data.shuffle_window"),
        ({**SHARDS, "num_classes": 0}, "data.num_classes"),
    ],
)
def test_what_the_set_would_not_look_at_or_cannot_be_is_an_error_that_names_the_key(settings, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**settings)


@pytest.mark.parametrize(("word", "exif"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_exif_is_on_off_or_auto_however_yaml_reads_that(tmp_path, word, exif):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{name: hub, path: a/b, num_classes: 4, exif: {word}}}")
    assert load_recipe(path).data.exif == exif
    with pytest.raises(SystemExit):
        parse_recipe(["--config", str(path), "--data.exif", "upright"])


def test_evaluation_images_have_imagenets_proportions_unless_told():
    assert DataConfig(**FOLDER).eval_sides == (224, 256)
    assert DataConfig(**FOLDER, size=160, eval_size=192).eval_sides == (192, 219)
    assert DataConfig(**FOLDER, eval_size=320, eval_resize=320).eval_sides == (320, 320)


def test_streamed_sets_get_flip_and_imagenets_scale_and_no_second_crop():
    recipe = parse_recipe(["--data.name", "imagefolder", "--data.size", "64", "--data.eval_size", "96"])
    training, evaluation = build_augment(recipe, 5), build_augment(recipe, 5, evaluation=True)
    assert (training.size, evaluation.size) == ((64, 64), (96, 96))
    assert training.crop is None
    assert training.flip is not None
    assert preprocessing_of(recipe.data).mean == (0.485, 0.456, 0.406)
    own = parse_recipe(["--data.name", "imagefolder", "--data.mean", "[0.1, 0.2, 0.3]", "--data.std", "[1, 1, 1]"])
    assert (preprocessing_of(own.data).mean, preprocessing_of(own.data).std) == ((0.1, 0.2, 0.3), (1, 1, 1))


def test_settings_that_move_no_weight_may_change_between_two_starts():
    ours, theirs = (Recipe(data=DataConfig(**FOLDER, **more)) for more in ({}, {"workers": 0, "prefetch": 9}))
    theirs.data.root, theirs.data.max_bad_share = "elsewhere", 0.5
    assert conflicts(recipe_dict(ours), recipe_dict(theirs)) == []
    theirs.data.shuffle_window = 5
    assert conflicts(recipe_dict(ours), recipe_dict(theirs)) == ["data.shuffle_window: 16384 here, 5 in the folder"]


def test_an_unknown_set_s_error_names_the_formats():
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet'.*imagefolder, hub and webdataset"):
        preprocessing_of(DataConfig(name="imagenet"))
