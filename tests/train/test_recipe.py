"""Recipes: YAML and command line into a dataclass, errors that name the key."""

from pathlib import Path

import pytest
import yaml

from robust_dist.train.recipe import Recipe, conflicts, load_recipe, parse_recipe, recipe_dict

RECIPES = sorted(Path(__file__).parents[2].glob("configs/recipes/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_runs_in_a_folder_of_its_own(path):
    assert load_recipe(path).run_dir == f"runs/{path.stem}"


def test_the_paper_s_settings_are_the_defaults():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing, recipe.ema_decay) == (300, 128, 0.0, None)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert recipe.schedule.weight_decay_off_at == 0.75
    assert (recipe.augment.cutmix_alpha, recipe.augment.cutmix_p) == (1.0, 1.0)


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("optimizer: {lr: 5e-4, betas: [0.9, 0.99]}\nmodel: {name: resnet8}\nepochs: 7\n")
    recipe = parse_recipe(["--config", str(path), "--epochs", "3", "--augment.crop", "2"])
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.epochs) == (5e-4, (0.9, 0.99), 3)
    assert (recipe.model.name, recipe.augment.crop) == ("resnet8", 2)


def test_a_recipe_written_as_yaml_is_read_back_the_same(tmp_path):
    recipe = parse_recipe(["--optimizer.lr", "0.3", "--ema_decay", "0.99", "--optimizer.no_decay", "[bias]"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(recipe)))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.lrr", "1"], "optimizer.lrr"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--augment.cutmix_mode", "both"], "augment.cutmix_mode"),
        (["--epochs", "1.5"], "epochs"),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_an_error_that_names_the_key(words, named, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(words)
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_an_error_that_names_it(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("optimiser: {lr: 0.1}\n")
    with pytest.raises(SystemExit):
        load_recipe(path)
    assert "optimiser" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", "-1"),
        ("optimizer.lr", ".nan"),
        ("optimizer.betas", "[0.9, 1.0]"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.clip_norm", "0"),
        ("schedule.weight_decay_off_at", "1.5"),
        ("augment.cutmix_p", "2"),
        ("augment.cutmix_alpha", "0"),
        ("checkpoint.every_steps", "0"),
        ("checkpoint.keep", "0"),
        ("epochs", "0"),
        ("batch_size", "0"),
        ("accumulation", "0"),
        ("label_smoothing", "1"),
        ("ema_decay", "1"),
        ("seed", "-1"),
        ("data.block", "0"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_the_setting(key, value):
    with pytest.raises(ValueError, match=key):
        parse_recipe([f"--{key}", value])


def test_conflicts_name_what_changes_the_result_and_nothing_else():
    ours, theirs = Recipe(run_dir="a"), Recipe(run_dir="b")
    theirs.tracking.progress = False
    theirs.checkpoint.every_steps = 3
    theirs.data.keep_on, theirs.cuda_graph = "host", True
    assert conflicts(recipe_dict(ours), recipe_dict(theirs)) == []
    theirs.optimizer.lr = 0.5
    theirs.model.options = {"depth": 3}
    lines = conflicts(recipe_dict(ours), recipe_dict(theirs))
    assert "optimizer.lr: 0.01 here, 0.5 in the folder" in lines
    assert any(line.startswith("model.options.depth") for line in lines)


def test_a_key_that_an_older_folder_does_not_have_counts_as_its_default():
    ours, theirs = recipe_dict(Recipe()), recipe_dict(Recipe())
    del theirs["ema_decay"], theirs["augment"]
    assert conflicts(ours, theirs) == []
    assert conflicts(recipe_dict(Recipe(ema_decay=0.9)), theirs) == ["ema_decay: 0.9 here, None in the folder"]
