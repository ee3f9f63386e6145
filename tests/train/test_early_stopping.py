"""Early stopping is decided by `metrics.jsonl` alone, so that every start and rank decides the same."""

import json
import math
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from robust_dist.train import fit
from robust_dist.train.metrics import EarlyStoppingConfig, early_stop, without_measured
from robust_dist.train.recipe import ModelConfig, OptimizerConfig, Recipe, ScheduleConfig, TrackingConfig
from tests.study.studies import write
from tests.train.few import few_digits


def rows(*values, metric="eval_accuracy"):
    return [{"epoch": number, metric: value} for number, value in enumerate(values, start=1)]


def stops_after(values, **config):
    """The epoch after which a run ends, None if it does not."""
    given = EarlyStoppingConfig(**config)
    found = rows(*values, metric=given.metric)
    ends = (end for end in range(1, len(found) + 1) if early_stop(found[:end], given))
    return next(ends, None)


@pytest.mark.parametrize(
    ("values", "config", "epoch"),
    [
        ([0.5, 0.6, 0.7], {"patience": None}, None),
        ([0.5, 0.6, 0.7, 0.8], {"patience": 1}, None),
        ([0.5, 0.7, 0.7, 0.6, 0.9], {"patience": 2}, 4),
        ([0.5, 0.7, 0.6, 0.71, 0.6, 0.6, 0.6], {"patience": 3}, 7),
        ([0.5, 0.55, 0.6, 0.65], {"patience": 2, "min_delta": 0.09}, None),
        ([0.5, 0.55, 0.6, 0.65], {"patience": 2, "min_delta": 0.15}, 3),
        ([2.0, 1.0, 1.1, 0.9, 1.0], {"patience": 2, "metric": "eval_loss"}, None),
        ([2.0, 1.0, 1.1, 1.0, 0.5], {"patience": 2, "metric": "train_loss"}, 4),
        ([None, math.nan, 0.5], {"patience": 2}, 2),
        ([0.5, math.nan, None, 0.6], {"patience": 3}, None),
    ],
)
def test_a_run_ends_after_patience_epochs_without_an_improvement_beyond_min_delta(values, config, epoch):
    assert stops_after(values, **config) == epoch


def test_the_reason_names_metric_epochs_and_the_best():
    config = EarlyStoppingConfig(patience=1, min_delta=0.01)
    said = early_stop(rows(0.5, 0.505), config)
    assert said == (
        "stopped early: eval_accuracy has not improved by more than 0.01 for 1 epoch; its best value, 50.00%, is that "
        "of epoch 1"
    )


RECIPE = Recipe(
    model=ModelConfig("resnet8"),
    optimizer=OptimizerConfig(lr=0.05),
    schedule=ScheduleConfig("constant", weight_decay_off_at=1.0),
    tracking=TrackingConfig(trackers=[], progress=False),
    epochs=4,
    batch_size=16,
)
# No accuracy exceeds another by more than 1.
STOPPING = EarlyStoppingConfig(patience=2, min_delta=1)


def run(folder, sets=None, **settings):
    AcceleratorState._reset_state(True)
    return fit(replace(RECIPE, run_dir=str(folder), **settings), **(sets or few_digits(192, 32))).rows


def test_a_run_that_stopped_early_ends_at_once_when_started_again_and_without_the_key_goes_on_bit_for_bit(
    tmp_path, capsys
):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "run"
    stopped = run(folder, early_stopping=STOPPING)
    said = capsys.readouterr().out
    assert said.count("stopped early: eval_accuracy") == 1
    assert "belong to all" not in said
    assert (folder / "curves.png").exists()
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(folder, early_stopping=STOPPING) == stopped
    assert "stopped early" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    on = run(folder)
    wanted = [without_measured(row) for row in whole]
    assert [without_measured(row) for row in stopped] == wanted[:3]
    assert [without_measured(row) for row in on] == wanted
    ours, theirs = (
        load_file(path / "checkpoints" / "step-00000048" / "model.safetensors") for path in (folder, tmp_path / "whole")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_metric_that_the_data_cannot_have_is_refused_before_the_first_step(tmp_path):
    two_classes = {name: (one.images, one.labels % 2) for name, one in few_digits(64, 64).items()}
    with pytest.raises(ValueError, match=r"early_stopping.metric='eval_top5_accuracy'.*for 2 classes"):
        run(tmp_path, two_classes, early_stopping=EarlyStoppingConfig(patience=1, metric="eval_top5_accuracy"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_study_trains_every_run_to_its_end(tmp_path):
    from robust_dist.study.grid import StudyError
    from robust_dist.study.parse import load_study

    base = tmp_path / "base.yaml"
    base.write_text("early_stopping: {patience: 3}\n")
    axes = {"optimizer.lr": [0.1, 0.01]}
    _, recipes = load_study(write(tmp_path / "study.yaml", base=str(base), axes=axes))
    assert {recipe.early_stopping.patience for recipe in recipes.values()} == {None}
    with pytest.raises(StudyError, match=r"early_stopping.patience.*all runs of a study train equally long"):
        load_study(write(tmp_path / "other.yaml", axes=axes, set={"early_stopping.patience": 3}))


def test_the_rows_hold_every_figure_that_may_be_asked_for(tmp_path):
    (row,) = run(tmp_path, epochs=1)
    config = EarlyStoppingConfig()
    asked = EarlyStoppingConfig.__annotations__["metric"].__args__
    assert config.metric in asked
    assert all(isinstance(row[metric], float) for metric in asked)
    assert len(row["eval_class_accuracy"]) == 10
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row
