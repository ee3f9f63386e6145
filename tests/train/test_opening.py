"""What a start reports about the data and the run, and its warnings."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from robust_dist.data.image_set import ImageSet
from robust_dist.optim import RAdaBeliefW
from robust_dist.train.opening import oddities, optimizer_backend, part_lines
from robust_dist.train.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe
from robust_dist.train.sources import open_sets
from tests.data.tiny_sets import write_image_folder


def images(count, classes):
    names = tuple(f"c{number}" for number in range(classes))
    return ImageSet(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count) % classes, names, "pets")


def test_each_part_has_a_line_with_images_classes_and_what_was_left_out(tmp_path):
    for part in ("train", "val"):
        write_image_folder(tmp_path / part, [0, 1, 1])
    for name in ("a.heic", "b.heic", "none"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    sets = open_sets(DataConfig("imagefolder", str(tmp_path), size=8), torch.device("cpu"), download=False)
    assert part_lines(sets) == [
        f"train: 3 images of 2 classes (ant, bee), {tmp_path}/train; left out: 2 .heic, 1 no extension",
        f"eval: 3 images, {tmp_path}/val",
    ]


def test_at_most_ten_classes_are_named():
    train, _ = part_lines([images(24, 12), images(12, 12)])
    assert train == "train: 24 images of 12 classes (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, ...), pets"


LONG = Recipe(optimizer=OptimizerConfig(name="adamw"))


@pytest.mark.parametrize(
    ("count", "classes", "ranks", "words"),
    [
        (5, 1, 1, "there is one class, 'c0'"),
        (5, 5, 1, "5 training images have 5 classes"),
        (5, 2, 10_000, "10000 ranks share "),
        (5, 2, 1, None),
    ],
)
def test_what_is_odd_is_one_warning(count, classes, ranks, words):
    found = oddities(LONG, [images(count, classes)] * 2, 100, ranks)
    assert [words in one for one in found] == [True] * (words is not None)


@pytest.mark.parametrize("given", [{"init_from": "runs/a"}, {"model": ModelConfig(weights="DEFAULT")}])
def test_a_measured_rate_on_trained_weights_is_odd(given):
    recipe = replace(LONG, optimizer=OptimizerConfig(lr="auto"), **given)
    (warning,) = oddities(recipe, [images(100, 10)] * 2, 10_000, 1)
    assert warning.startswith(f"optimizer.lr='auto' with {'init_from' if 'init_from' in given else 'model.weights'}:")
    assert oddities(replace(recipe, optimizer=OptimizerConfig()), [images(100, 10)] * 2, 10_000, 1) == []


def test_fewer_steps_than_the_rectification_takes_say_what_to_change():
    sets = [images(5, 2)] * 2
    (warning,) = oddities(Recipe(epochs=4), sets, 100, 1)
    assert warning.startswith("100 steps are few: RAdaBeliefW takes short steps for about the first 1,000.")
    assert "epochs (40 or more), set optimizer.beta2=auto," in warning
    assert "augment.cutmix=false" in warning
    for optimizer, steps in (
        (OptimizerConfig(), 1_000),
        (OptimizerConfig(beta2="auto"), 100),
        (OptimizerConfig(name="adamw"), 100),
    ):
        assert oddities(Recipe(epochs=4, optimizer=optimizer), sets, steps, 1) == []


def test_the_optimizer_s_backend_is_named():
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert optimizer_backend(RAdaBeliefW([parameter], foreach=False)) == "single-tensor"
    assert optimizer_backend(RAdaBeliefW([parameter], foreach=True)) == "foreach"
    assert optimizer_backend(SimpleNamespace(optimizer=torch.optim.SGD([parameter], lr=1))) is None
