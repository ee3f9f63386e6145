"""The effects of options that are off in the paper's recipe."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from robust_dist.train import fit
from robust_dist.train.main import train
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    Recipe,
    ScheduleConfig,
    TrackingConfig,
)
from tests.train.few import few_digits


def recipe(folder, **changes):
    settings = {
        "data": DataConfig(name="digits"),
        "model": ModelConfig("resnet8", {"stem_stride": 2}),
        "optimizer": OptimizerConfig(lr=0.05),
        "tracking": TrackingConfig(trackers=[], progress=False),
        "epochs": 1,
        "batch_size": 128,
        "run_dir": str(folder),
    }
    return Recipe(**settings | changes)


def run(folder, **changes):
    """The rows of one epoch of 12 steps, in this process."""
    # Accelerate keeps the precision of the process's first run.
    AcceleratorState._reset_state(True)
    return train(recipe(folder, **changes))


def run_few(folder, parts=None, **changes):
    """Run on a few images, as CPUs without bfloat16 arithmetic are twelve times slower; `parts` go to `fit`."""
    AcceleratorState._reset_state(True)
    return fit(recipe(folder, **changes), **few_digits(64, 32), **(parts or {})).rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain") / "run")[0]


def test_the_moving_average_changes_what_is_evaluated_and_not_what_is_trained(plain, tmp_path):
    row = run(tmp_path, ema_decay=0.9)[0]
    assert row["train_loss"] == plain["train_loss"]
    assert row["eval_loss"] != plain["eval_loss"]


def test_label_smoothing_clipping_and_warm_up_change_training(plain, tmp_path):
    changes = {
        "smoothing": {"label_smoothing": 0.2},
        "clipping": {"optimizer": OptimizerConfig(lr=0.05, clip_norm=1e-3)},
        "warm-up": {"schedule": ScheduleConfig(warmup_steps=6)},
        "decay": {"optimizer": OptimizerConfig(lr=0.05, weight_decay=1.0)},
    }
    losses = {name: run(tmp_path / name, **change)[0]["train_loss"] for name, change in changes.items()}
    assert len({plain["train_loss"], *losses.values()}) == 5


def test_checkpoints_are_written_when_the_recipe_says(tmp_path):
    run(tmp_path, epochs=3, checkpoint=CheckpointConfig(every_epochs=2, every_steps=10, keep=9))
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [10, 20, 24, 30, 36]


def test_bfloat16_trains_close_to_float32_and_goes_on_bit_for_bit(tmp_path):
    settings = {"batch_size": 32, "epochs": 2, "checkpoint": CheckpointConfig(every_steps=1, keep=9)}
    single = run_few(tmp_path / "float32", **settings)
    half = {**settings, "precision": PrecisionConfig(mixed="bf16")}
    rows = run_few(tmp_path / "bf16", **half)
    assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in single], rel=0.02)
    assert [row["train_loss"] for row in rows] != [row["train_loss"] for row in single]
    shutil.rmtree(tmp_path / "bf16" / "checkpoints" / "step-00000004")
    again = run_few(tmp_path / "bf16", **half)
    AcceleratorState._reset_state(True)
    assert list(map(without_measured, again)) == list(map(without_measured, rows))
    assert json.loads((tmp_path / "bf16" / "metrics.jsonl").read_text().splitlines()[-1]) == again[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this run would be on a GPU")
def test_fp16_on_a_cpu_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"precision.mixed='fp16' needs a GPU.*: set precision.mixed to bf16 or no"):
        run(tmp_path / "run", precision=PrecisionConfig(mixed="fp16"))
    assert not (tmp_path / "run").exists()
