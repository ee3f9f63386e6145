"""A study's file: what is in it, and errors that name what is wrong."""

from pathlib import Path

import pytest

from robust_dist.study.folder import StudyFolder, differences
from robust_dist.study.grid import StudyError, study_dict, study_from_dict
from robust_dist.study.parse import load_study
from robust_dist.study.worker import _secret_words
from robust_dist.train.recipe import parse_recipe, recipe_dict
from tests.study.studies import write

STUDIES = sorted(Path(__file__).parents[2].glob("configs/studies/*.yaml"))
ROWS = {"A": {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}, "B": {"optimizer.name": "RAdaBeliefW"}}


def test_lists_are_values_of_a_key_and_mappings_are_rows_that_set_several(tmp_path):
    path = write(tmp_path / "s.yaml", axes={"method": ROWS, "optimizer.lr": [0.1, "1e-3"]}, seeds=[3, 1])
    study, recipes = load_study(path)
    assert [cell.name for cell in study.cells()] == ["A_0.1", "A_0.001", "B_0.1", "B_0.001"]
    assert [run.name for run in study.runs()][:5] == [f"{name}_seed3" for name in recipes] + ["A_0.1_seed1"]
    ours = recipes["A_0.001"]
    assert (ours.optimizer.name, ours.optimizer.weight_decay, ours.optimizer.lr) == ("adamw", 0.1, 0.001)
    assert (ours.epochs, ours.batch_size, ours.tracking.progress) == (1, 512, False)
    assert recipes["B_0.1"].optimizer.weight_decay == 5e-4  # the base recipe's


def test_a_study_written_down_is_read_back_the_same(tmp_path):
    keys = {"axes": {"method": ROWS, "optimizer.lr": [0.1]}, "compare": "method", "paper": {"A": {0.1: "diverged"}}}
    study, _ = load_study(write(tmp_path / "s.yaml", **keys))
    assert study_from_dict(study_dict(study)) == study
    assert study.paper == {("A", "0.1"): "diverged"}
    assert study.contenders() == {"A": [0], "B": [1]}


LR = {"optimizer.lr": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"axes": LR, "axis": {}}, "unknown key 'axis'"),
        ({"axes": {"optimizer.lrr": [0.1]}}, r"axes.optimizer.lrr: 'optimizer.lrr' .* did you mean 'optimizer.lr'"),
        ({"axes": {"optimizer.lr": []}}, "axes.optimizer.lr is empty"),
        ({"axes": {"method": {}}}, "axes.method is empty"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"optimizer.lr": [0.1, "1e-1"]}}, "axes.optimizer.lr has '0.1' twice"),
        ({"axes": {"optimizer.lr": ["fast"]}}, "cell fast: .*optimizer.lr"),
        ({"axes": {"optimizer.lr": [0.1, -1]}}, "cell -1: optimizer.lr=-1.0 is not valid"),
        ({"axes": {"optimizer.name": ["adam"]}}, "cell adam: optimizer.weight_decay"),
        ({"axes": {"method": {"A": {"optimiser.lr": 1}}}}, "'optimiser.lr' is no key of a recipe"),
        ({"axes": {"seed": [1]}}, "'seed' cannot be set here .give the study's seeds"),
        ({"axes": {"checkpoint.keep": [1]}}, "'checkpoint.keep' cannot be set here"),
        ({"axes": LR | {"rows": {"A": {"optimizer.lr": 1}}}}, "'optimizer.lr' is set by the axes"),
        ({"axes": LR, "set": {"optimizer.lr": 1}}, "'optimizer.lr' is set for all cells and by an axis"),
        ({"axes": LR, "budget": None}, "budget is missing"),
        ({"axes": LR, "budget": {"steps": 3}}, "budget"),
        ({"axes": {"epochs": [1, 2]}}, "leave it out where epochs is an axis"),
        ({"axes": LR, "seeds": []}, "seeds"),
        ({"axes": LR, "seeds": [0, 0]}, "seeds"),
        ({"axes": LR, "seeds": [0.5]}, "seeds"),
        ({"axes": LR, "base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"axes": LR, "compare": "method"}, "compare='method' is no axis"),
        ({"axes": {"method": ROWS}, "compare": "method", "reference": "C"}, "reference='C'"),
        ({"axes": LR, "paper": {0.3: 95}}, "paper: '0.3' is no place"),
        ({"axes": LR, "paper": {0.1: "bad"}}, "paper.0.1='bad'"),
        ({"axes": {"method": {"a b": {}, "a/b": {}}}}, "share the file name"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(tmp_path, keys, named):
    with pytest.raises(StudyError, match=named):
        load_study(write(tmp_path / "s.yaml", **keys))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base: x.yaml\n\tseeds: [0]\n", "line 2: found character"),
        ("axes: {a: [1, 2}\n", "line 1: expected"),
        ("seeds: [0]\nbase: x\nseeds: [1]\n", "'seeds' is given twice, in lines 1 and 3"),
        ("axes:\n  a: !!python/name:os.system\n", "line 2: tags are not supported"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("base: [a]\nseeds: [0]\naxes: {}\n", "line 1: base=.'a'. must be text"),
    ],
)
def test_a_file_that_is_no_study_is_an_error_that_names_the_line(tmp_path, text, named):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=named):
        load_study(path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"axes": LR, "compare": ["optimizer.lr"]}, "is no axis"),
        ({"axes": {f"row{i}": {str(j): {} for j in range(9)} for i in range(9)}}, "axes make 387420489 cells"),
        ({"axes": {"rows": {"x" * 300: {}}}}, "too long"),
        ({"axes": LR, "seeds": [2**63]}, "below 2..63"),
        ({"axes": {"model.options": [{"class_path": "os.system"}]}}, "model.options.class_path is not allowed"),
        ({"axes": LR, "set": {"model.options.class_path": "os.system"}}, "model.options.class_path is not allowed"),
        ({"axes": LR, "set": {"batch_size": None}}, "batch_size is empty"),
    ],
)
def test_what_no_study_can_have_is_an_error_that_names_it(tmp_path, keys, named):
    with pytest.raises(StudyError, match=named):
        load_study(write(tmp_path / "s.yaml", **keys))


def test_text_is_text_in_a_study_and_numbers_are_the_same_however_they_are_spelt(tmp_path):
    path = write(tmp_path / "s.yaml", axes={"precision.mixed": [False], "optimizer.lr": ["1e-3"]})
    path.write_text(path.read_text().replace("- false", "- no"))
    study, recipes = load_study(path)
    assert [(one.precision.mixed, one.optimizer.lr) for one in recipes.values()] == [("no", 1e-3)]
    # As version 0.4.4 kept it.
    older = study_from_dict(study_dict(study))
    older.axes[1].settings[0]["optimizer.lr"] = "1e-3"
    assert differences(study, older) == []


def test_secrets_of_a_study_reach_its_runs_and_none_of_its_files(tmp_path):
    shared = {"tracking.trackers": ["tensorboard"], "tracking.options": {"tensorboard": {"api_key": "XYZ-1"}}}
    study, recipes = load_study(write(tmp_path / "s.yaml", axes=LR, set=shared))
    StudyFolder(tmp_path / "study").claim(study)
    StudyFolder(tmp_path / "study").claim(study)
    assert "XYZ-1" not in (tmp_path / "study" / "study.yaml").read_text()
    assert (tmp_path / "study" / "study.yaml").stat().st_mode & 0o077 == 0
    ours = next(iter(recipes.values()))
    assert parse_recipe(_secret_words(recipe_dict(ours))).tracking.options == ours.tracking.options


def test_epochs_can_be_an_axis_where_there_is_no_budget(tmp_path):
    _, recipes = load_study(write(tmp_path / "s.yaml", axes={"epochs": [1, 2]}, budget=None))
    assert [recipe.epochs for recipe in recipes.values()] == [1, 2]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_valid_to_its_last_cell(path):
    study, recipes = load_study(path)
    assert len(recipes) == len(study.cells()) > 0
    assert study.description
    # Fewer are a choice, which the file's plan states.
    assert len(study.seeds) >= 3 or "# Plan, written before the first run:" in path.read_text()
