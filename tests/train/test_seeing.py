"""What a run displays and records about itself: figures, trackers, a profile; none of it changes the run."""

import importlib
import json
import shutil

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from robust_dist.train import fit, main
from robust_dist.train.curves import decay_corners, plot_curves
from robust_dist.train.display import Display, Figures, Meter, window
from robust_dist.train.metrics import MEASURED, best_row, without_measured
from robust_dist.train.recipe import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    TrackingConfig,
    parse_recipe,
)
from tests.train.few import few_digits


def run(folder, *, profile=False, epochs=1, **tracking):
    """The rows of epochs of 12 steps, in this process."""
    AcceleratorState._reset_state(True)
    recipe = Recipe(
        model=ModelConfig("resnet8"),
        optimizer=OptimizerConfig(lr=0.05),
        checkpoint=CheckpointConfig(keep=9),
        tracking=TrackingConfig(**{"trackers": [], "progress": False} | tracking),
        epochs=epochs,
        batch_size=16,
        run_dir=str(folder),
        profile=profile,
    )
    return fit(recipe, **few_digits(192, 32)).rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two epochs with TensorBoard, resumed from its first one."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    rows = run(folder, epochs=2, trackers=["tensorboard"])
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    again = run(folder, epochs=2, trackers=["tensorboard"])
    assert list(map(without_measured, again)) == list(map(without_measured, rows))
    return folder, again


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled") / "run"
    return folder, run(folder, epochs=2, profile=(3, 2), peak_tflops=0.5)


def weights(folder):
    return (folder / "checkpoints" / "step-00000024" / "model.safetensors").read_bytes()


def test_a_profile_changes_nothing_of_the_run(plain, profiled):
    assert list(map(without_measured, profiled[1])) == list(map(without_measured, plain[1]))
    assert weights(profiled[0]) == weights(plain[0])


def test_a_profile_holds_the_steps_that_were_asked_for(profiled):
    folder = profiled[0] / "profile"
    events = json.loads((folder / "rank-0.4.pt.trace.json").read_text())["traceEvents"]
    assert len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")}) == 2
    assert "RAdaBeliefW.step" in "".join(event["name"] for event in events)
    assert "aten::convolution_backward" in (folder / "operators.4.txt").read_text()


@pytest.mark.parametrize(
    ("setting", "left", "steps"),
    [
        (False, 100, None),
        (True, 100, (10, 5)),
        ((3, 2), 100, (3, 2)),
        ((50, 5), 20, (15, 5)),
        (True, 4, (1, 3)),
        (True, 1, None),
    ],
)
def test_a_profile_s_window_is_moved_until_it_fits_into_the_run(setting, left, steps):
    assert window(setting, left) == steps


def test_profile_is_a_key_of_the_command_line():
    assert parse_recipe(["--profile", "true"]).profile is True
    assert parse_recipe(["--profile", "[20, 3]"]).profile == (20, 3)
    with pytest.raises(ValueError, match=r"profile=\(0, 3\)"):
        parse_recipe(["--profile", "[0, 3]"])


def test_every_measured_figure_is_recorded(plain, profiled):
    for row in (*plain[1], *profiled[1]):
        assert row.keys() >= MEASURED
        assert row["images_per_second"] == row["images_per_second_per_rank"] > 0
        assert 0 <= row["data_wait_share"] <= 1
        assert row["peak_memory_gib"] > 0
    assert {row["mfu"] for row in plain[1]} == {None}
    ratios = [row["mfu"] / row["images_per_second"] for row in profiled[1]]
    # ResNet-8 at 32x32 does 12.5 M multiply-adds per image forward, and twice that backward.
    assert ratios == pytest.approx([3 * 2 * 12.5e6 / 0.5e12] * 2, rel=0.05)


def scalars(folder, key):
    event_accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder / "trackers" / "robust_dist"))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(key)}, len(found.Scalars(key))


def test_tensorboard_has_every_epoch_once_after_a_run_was_taken_up(plain):
    folder, rows = plain
    values, count = scalars(folder, "train_loss")
    assert values == pytest.approx({row["step"]: row["train_loss"] for row in rows})
    assert count == 2
    assert scalars(folder, "peak_memory_gib")[1] == 2
    assert json.loads((folder / "trackers" / "runs.json").read_text()) == {"tensorboard": None}
    assert len(list((folder / "trackers").rglob("hparams.yml"))) == 1


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        ({"trackers": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"trackers": ["dvclive"]}, "pip install dvclive"),
        (
            {"trackers": ["tensorboard"], "options": {"tensorboard": {"flush_seconds": 1}}},
            "tensorboard could not start",
        ),
    ],
)
def test_a_tracker_that_cannot_be_used_is_an_error_before_the_first_step(tmp_path, tracking, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **tracking)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_options_of_a_tracker_that_is_not_used_are_refused():
    with pytest.raises(ValueError, match=r"tracking\.options\.wandb"):
        TrackingConfig(options={"wandb": {"entity": "us"}})


class Unreachable(GeneralTracker):
    """A tracker whose server disappears after the start."""

    name = "unreachable"
    requires_logging_directory = False
    tracker = None

    def __init__(self, run_name, **options):
        super().__init__()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **options):
        raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_on_the_way_is_named_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "unreachable", Unreachable)
    rows = run(tmp_path, epochs=2, trackers=["unreachable", "tensorboard"])
    assert len(rows) == 2
    assert capsys.readouterr().out.count("the tracker unreachable failed") == 1
    assert scalars(tmp_path, "train_loss")[1] == 2


# These packages' own warnings.
FOREIGN = pytest.mark.filterwarnings("ignore")


def twice(folder, tracker):
    """A run of two epochs, resumed from its first one."""
    run(folder, epochs=2, trackers=[tracker])
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    run(folder, epochs=2, trackers=[tracker])
    return json.loads((folder / "trackers" / "runs.json").read_text())[tracker]


@FOREIGN
def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    name = twice(tmp_path / "run", "wandb")
    folders = list((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(name) for folder in folders)


@FOREIGN
def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    name = twice(tmp_path / "run", "mlflow")
    runs = mlflow.search_runs(experiment_names=["robust_dist"], output_format="list")
    assert [run.info.run_id for run in runs] == [name]
    assert {point.step for point in mlflow.MlflowClient().get_metric_history(name, "train_loss")} == {12, 24}


@FOREIGN
def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    name = twice(tmp_path / "run", "trackio")
    assert name.startswith("run-")


def test_only_waiting_for_the_loader_counts_as_waiting(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    meter = Meter(world_size=2, flops_per_image=10, peak=1000.0)
    for images in meter.fetch([32, 32, 16]):
        meter.count(images)
    # Every reading of the clock is a second: the start, two around each of three batches and the end, and the last.
    figures = meter.epoch()
    assert figures == Figures(seconds=9, images=80, wait_seconds=4)
    assert meter.mfu(figures) == pytest.approx(10 * (80 / 9) / 2 / 1000)
    assert meter.recent().images == 80
    assert meter.recent().images == 0


def test_the_bar_shows_rate_wait_memory_and_mfu():
    AcceleratorState._reset_state(True)
    recipe = Recipe(tracking=TrackingConfig(progress=False))
    meter = Meter(world_size=2, flops_per_image=10, peak=1000.0)
    display = Display(recipe, Accelerator(cpu=True), 10, 0, meter)
    text = display._postfix(Figures(seconds=2.0, images=80, wait_seconds=0.5))
    assert text.startswith("20 images/s per rank, data wait 25%, ")
    assert text.endswith(" GiB, MFU 20.0%")


def decays(*values, epochs, off_at=0.75, decay=0.01):
    """The corners for a run with these decays after its epochs."""
    recipe = Recipe(
        optimizer=OptimizerConfig(weight_decay=decay),
        schedule=ScheduleConfig(weight_decay_off_at=off_at),
        epochs=epochs,
    )
    rows = [{"epoch": epoch, "weight_decay": value} for epoch, value in enumerate(values, start=1)]
    return decay_corners(rows, recipe)


def test_weight_decay_is_drawn_as_a_step_where_it_was_switched_off():
    # A row has its epoch's last step; the switch came before it, where the recipe says.
    assert decays(0.01, 0.01, 0.0, epochs=3) == ([0, 2.25, 2.25, 3], [0.01, 0.01, 0, 0])
    assert decays(0.01, 0.01, 0.01, 0.0, epochs=4) == ([0, 3, 3, 4], [0.01, 0.01, 0, 0])
    assert decays(0.0, epochs=1) == ([0, 0.75, 0.75, 1], [0.01, 0.01, 0, 0])
    assert decays(0.01, 0.01, epochs=30) == ([0, 2], [0.01, 0.01])
    # A custom trigger switches at another step than the recipe's.
    assert decays(0.01, 0.0, 0.0, epochs=3) == ([0, 1, 1, 3], [0.01, 0.01, 0, 0])
    assert decays(0.0, 0.0, epochs=2, decay=0.0) == ([0, 2], [0, 0])
    assert decays(None, epochs=2) == ([], [])


@pytest.mark.parametrize("rows", [1, 300])
def test_curves_are_drawn_of_one_epoch_many_and_rows_without_numbers(rows, tmp_path):
    nothing = {"train_loss": None, "eval_loss": float("nan"), "eval_accuracy": float("nan"), "lr": None}
    found = [
        {"epoch": epoch, "train_loss": 1.0, "eval_accuracy": 0.5, "weight_decay": 0.01, "eval_samples": 3}
        | (nothing if epoch % 3 == 0 else {})
        for epoch in range(1, rows + 1)
    ]
    recipe = Recipe(epochs=300, run_dir=str(tmp_path / "$x_$"))
    plot_curves(found, tmp_path / "curves.png", recipe)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # As with `--checkpoint best`: the newest in a tie.
    assert best_row(found)["epoch"] == max(row["epoch"] for row in found if row["eval_accuracy"] == 0.5)
    plot_curves([], tmp_path / "none.png", recipe)
    assert not (tmp_path / "none.png").exists()


def test_the_last_lines_name_tensorboard_s_command_where_it_is_used(tmp_path, capsys):
    main._say_end(
        Recipe(run_dir=str(tmp_path / "a run"), epochs=1), [{"epoch": 1, "eval_accuracy": 0.5, "eval_samples": 8}]
    )
    accuracy, _, board, use = capsys.readouterr().out.strip().splitlines()
    assert accuracy == "accuracy 50.00% on 8 held-out images of digits"
    assert board == f"tensorboard: tensorboard --logdir '{tmp_path}/a run/trackers'"
    assert use.startswith("use it: ")
