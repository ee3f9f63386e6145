"""An optimizer and a recipe key are each added in one place, from outside the package (robust_dist/train/README.md)."""

import importlib
import json
from dataclasses import dataclass, field

import pytest

from robust_dist.study.parse import load_study
from robust_dist.train.folder import RunFolderError
from robust_dist.train.keys import FREE, keys_of, recipe_dict
from robust_dist.train.main import train
from robust_dist.train.recipe import AugmentConfig, OptimizerConfig, Recipe, conflicts, parse_recipe
from tests.study.studies import write

SIGNED = """
import torch
from robust_dist.train.optimizers import OptimizerChoice

class Signed(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, dead_zone=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "dead_zone": dead_zone})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * p.grad.sign() * (p.grad.abs() > group["dead_zone"]))

signed = OptimizerChoice(
    make=Signed, problem=lambda recipe: "augment.cutmix=True with name='signed'" if recipe.augment.cutmix else None
)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with the optimizer, as installed by pip."""
    (tmp_path / "signed_package.py").write_text(SIGNED)
    info = tmp_path / "signed_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signed_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robust_dist.optimizers]\nsigned = signed_package:signed\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@dataclass
class BrightAugment(AugmentConfig):
    """The training pipeline, with adjustable brightness.

    Attributes:
        brightness: Factor of every training image.
        bright_note: A word that changes nothing.
    """

    brightness: float = 1.0
    bright_note: str = field(default="", metadata=FREE)

    def build(self, *images, **given):
        pipeline = super().build(*images, **given)
        pipeline.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * self.brightness, outputs[1]))
        return pipeline


@dataclass
class BrightRecipe(Recipe):
    """A recipe with a key of our own."""

    augment: BrightAugment = field(default_factory=BrightAugment)


TINY = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
TINY += ["--batch_size", "512", "--epochs", "1", "--tracking.trackers", "[]"]
TINY += ["--tracking.progress", "false", "--augment.cutmix", "false"]


def test_an_optimizer_and_a_key_from_outside_train_and_the_folder_knows_them(installed, tmp_path, capsys):
    words = [*TINY, "--optimizer.name", "signed", "--optimizer.options.dead_zone", "1e-9", "--optimizer.lr", "1e-3"]
    words += ["--augment.brightness", "0.5", "--run_dir", str(tmp_path / "run")]
    recipe = parse_recipe(words, BrightRecipe)
    assert recipe.augment.brightness == 0.5
    (row,) = train(recipe)
    assert row["eval_samples"] == 359
    start = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][-1]
    assert set(start["backends"]) == {"optimizer", "augmentation"}
    assert f"signed, augmentation by {start['backends']['augmentation']}" in capsys.readouterr().out
    noted = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "brightness: 0.5" in noted
    assert "name: signed" in noted
    again = parse_recipe([*words, "--augment.brightness", "0.25"], BrightRecipe)
    with pytest.raises(RunFolderError, match=r"augment.brightness: 0.25 here, 0.5 in the folder"):
        train(again)


def test_a_key_from_outside_has_its_help_its_check_and_its_freedom(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"], BrightRecipe)
    said = " ".join(capsys.readouterr().out.split())
    assert "--augment.brightness VALUE Factor of every training image. (default: 1.0)" in said
    assert "--augment.cutmix_p VALUE Probability of CutMix." in said
    with pytest.raises(SystemExit):
        parse_recipe(["--augment.brightnes", "2", "--augment.brightness", "dark"], BrightRecipe)
    said = capsys.readouterr().err
    assert "unknown setting --augment.brightnes; did you mean '--augment.brightness'" in said
    assert "augment.brightness='dark'" in said
    ours, theirs = BrightRecipe(), BrightRecipe(augment=BrightAugment(bright_note="dim"))
    assert conflicts(recipe_dict(ours), recipe_dict(theirs), kind=BrightRecipe) == []
    assert not keys_of(Recipe).is_known("augment.brightness")


def test_an_optimizer_from_outside_is_taken_by_studies_and_refused_where_its_record_says_so(installed, tmp_path):
    _, recipes = load_study(write(tmp_path / "s.yaml", axes={"optimizer.name": ["signed", "adamw"]}))
    assert [recipe.optimizer.name for recipe in recipes.values()] == ["signed", "adamw"]
    words = [*TINY[:-1], "true", "--optimizer.name", "signed", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"augment.cutmix=True with name='signed'"):
        train(parse_recipe(words))
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimizer_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match=r"optimizer.name='RAdaBelif' .*RAdaBeliefW, nag, .*'robust_dist.optimizers'"):
        OptimizerConfig(name="RAdaBelif")
