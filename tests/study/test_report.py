"""Reports: tables beside the paper's figures, unfinished studies, two studies, JSON and pictures."""

import json

import numpy as np
import pytest

from robust_dist.cli import main
from robust_dist.study import plots
from robust_dist.study.child import slot_environment
from robust_dist.study.figures import holm
from robust_dist.study.grid import StudyError
from robust_dist.study.outcome import Failure, Result, judge
from robust_dist.study.parse import load_study
from robust_dist.study.report import write_report
from robust_dist.study.summary import (
    against_reference,
    at_defaults,
    default_against_reference,
    in_units,
    robustness,
    summarize,
)
from robust_dist.train.curves import line_style
from robust_dist.train.main import DIVERGED
from robust_dist.train.recipe import Recipe
from tests.study.studies import with_results, write

GRID = {
    "axes": {"method": {"A": {"optimizer.name": "adamw"}, "B": {}}, "optimizer.lr": [0.1, 0.01, 0.001]},
    "seeds": [0, 1],
    "compare": "method",
    "reference": "B",
    "paper": {"A": {0.1: "diverged", 0.01: 95.06, 0.001: 94.15}, "B": {0.1: 93.69, 0.01: 95.88, 0.001: 93.86}},
}
# Shares, by method and learning rate, with seed 0; seed 1 has half a point more.
SEED_0 = {
    ("A", "0.1"): "diverged",
    ("A", "0.01"): 0.95,
    ("A", "0.001"): 0.94,
    ("B", "0.1"): 0.93,
    ("B", "0.01"): 0.96,
    ("B", "0.001"): 0.94,
}


def accuracy(run):
    value = SEED_0[run.cell.labels]
    return value if value == "diverged" else value + 0.005 * run.seed


@pytest.fixture
def folder(tmp_path):
    return with_results(tmp_path / "study", write(tmp_path / "grid.yaml", **GRID), accuracy)


def test_a_table_has_mean_and_spread_beside_the_paper_s_figure(folder):
    text = write_report(folder, folder.path / "report")
    assert "All 12 runs are finished." in text
    assert "| method \\ optimizer.lr | 0.1 | 0.01 | 0.001 |" in text
    # 95.0 and 95.5: mean 95.25, standard deviation 0.5 / sqrt(2)
    assert "| A | diverged (paper: diverged) | 95.25 ± 0.35 (paper: 95.06) | 94.25 ± 0.35 (paper: 94.15) |" in text
    assert "revision: abc" in text
    assert "a diverged run counts as guessing" in text


def test_figures_of_robustness_stand_by_contender_with_the_paper_s_below(folder):
    found = robustness(summarize(folder))
    count, figures = found["A"]
    assert count == 3
    # A diverged run counts as guessing among ten classes, 10 %.
    assert figures["mean"].value == pytest.approx((10 + 95.25 + 94.25) / 3)
    assert figures["best minus mean"].value == pytest.approx(95.25 - (10 + 95.25 + 94.25) / 3)
    assert figures["max"].interval == pytest.approx((95.0, 95.5))
    text = write_report(folder, folder.path / "report")
    assert "| A (paper) | 66.40 |" in text  # (10 + 95.06 + 94.15) / 3
    assert "| B (paper) | 94.48 |" in text


def test_a_diverged_run_may_count_as_something_else(folder):
    assert robustness(summarize(folder, diverged_as=0.0))["A"][1]["min"].value == 0.0
    assert "a diverged run counts as 0.00%" in write_report(folder, folder.path / "report", diverged_as=0.0)


def test_the_reference_is_tested_against_the_others_over_cells_and_seeds(folder):
    (comparison,) = against_reference(summarize(folder))
    assert (comparison.first, comparison.second, comparison.test.pairs) == ("B", "A", 6)
    # Differences: 83, 83.5, 1, 1, 0, 0 points.
    assert comparison.test.difference == pytest.approx((83 + 83.5 + 1 + 1) / 6)
    assert comparison.test.p == pytest.approx(2 * 4 / 2**6)


def test_an_unfinished_study_is_reported_and_says_so(tmp_path):
    def some(run):
        return accuracy(run) if run.seed == 0 and run.cell.labels != ("B", "0.1") else None

    folder = with_results(tmp_path / "study", write(tmp_path / "grid.yaml", **GRID), some)
    text = write_report(folder, tmp_path / "report")
    assert "Unfinished: 5 of 12 runs have a result" in text
    assert "| B | - (paper: 93.69) | 96.00 (n = 1 of 2) (paper: 95.88) |" in text
    assert "| B (2 of 3 cells) | 95.00 |" in text
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["complete"] is False
    assert [run.get("missing", False) for run in report["runs"]].count(True) == 7


def test_a_study_without_any_result_is_reported_too(tmp_path):
    folder = with_results(tmp_path / "study", write(tmp_path / "grid.yaml", **GRID), lambda run: None)
    assert "Unfinished: 0 of 12" in write_report(folder, tmp_path / "report")


def test_the_json_has_every_run_with_recipe_revision_and_machine(folder):
    write_report(folder, folder.path / "report")
    report = json.loads((folder.path / "report" / "report.json").read_text())
    assert len(report["runs"]) == 12
    run = report["runs"][1]
    assert (run["labels"], run["seed"], run["accuracy"]) == (["A", "0.01"], 0, 0.95)
    assert run["settings"] == {"optimizer.name": "adamw", "optimizer.lr": 0.01}
    assert (run["environment"]["revision"], run["environment"]["device"]) == ("abc", "cpu")
    assert run["recipe"] == {"seed": 0}
    assert report["robustness"]["B"]["max"]["value"] == pytest.approx(96.25)
    assert report["study"]["seeds"] == [0, 1]


def test_pictures_are_drawn_and_curves_only_over_learning_rates(folder, tmp_path):
    write_report(folder, folder.path / "report")
    for name in ("heat_map.png", "learning_rates.png"):
        assert (folder.path / "report" / name).read_bytes()[:4] == b"\x89PNG"
    rows = with_results(
        tmp_path / "rows", write(tmp_path / "rows.yaml", axes={"depth": {"a": {}, "b": {}}}), lambda _: 1
    )
    write_report(rows, tmp_path / "other")
    assert (tmp_path / "other" / "heat_map.png").exists()
    assert not (tmp_path / "other" / "learning_rates.png").exists()


def test_a_report_is_made_again_from_its_json_alone(folder, tmp_path, capsys):
    first, again = folder.path / "report", tmp_path / "again"
    write_report(folder, first)
    assert main(["study", "report", str(first / "report.json"), "--out", str(again)]) == 0
    for name in ("report.md", "report.json", "heat_map.png", "learning_rates.png"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert main(["study", "report", str(first / "report.json")]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert main(["study", "report", str(first / "report.md"), "--out", str(again)]) == 2
    assert "is no study's folder and no report.json" in capsys.readouterr().err


def test_lines_differ_in_marker_and_line_and_the_picture_explains_bars_and_crosses(folder):
    figure = plots.learning_rates(summarize(folder))
    (axes,) = figure.axes
    lines = [container[0] for container in axes.containers]
    assert len({line.get_marker() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    assert axes.get_legend().get_title().get_text() == "method"
    note = figure.get_supxlabel()
    assert "bars: ± 1 standard deviation (n - 1)" in note
    assert "x at the bottom: every seed diverged" in note
    styles = {(style["color"], style["linestyle"], style["marker"]) for style in map(line_style, range(60))}
    assert len(styles) == 60


def test_numbers_grow_to_the_right_and_upwards_in_a_heat_map(tmp_path):
    axes = {"optimizer.weight_decay": [0.1, 0.01], "optimizer.lr": [0.1, 0.001, 0.01]}
    shares = {("0.1", "0.1"): 0.5, ("0.1", "0.001"): 0.1, ("0.01", "0.01"): 0.9}

    def accuracy(run):
        return "diverged" if run.cell.labels == ("0.01", "0.1") and run.seed == 0 else shares.get(run.cell.labels, 0.7)

    folder = with_results(tmp_path / "study", write(tmp_path / "grid.yaml", axes=axes, seeds=[0, 1]), accuracy)
    figure = plots.heat_map(summarize(folder))
    drawn = figure.axes[0]
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    # The first row is the highest.
    assert [text.get_text() for text in drawn.get_yticklabels()] == ["0.1", "0.01"]
    texts = [text.get_text() for text in drawn.texts]
    assert texts == ["10.00", "70.00", "50.00", "70.00", "90.00", "40.00*"]
    assert "*: some of the seeds diverged" in figure.get_supxlabel()


def test_two_studies_are_tested_over_their_common_cells_and_seeds(folder, tmp_path, capsys):
    keys = GRID | {"axes": GRID["axes"] | {"optimizer.lr": [0.01, 0.001, 1.0e-4]}, "paper": {}, "seeds": [1, 2]}

    def better(run):
        return 0.97 + 0.001 * run.seed

    other = with_results(tmp_path / "other", write(tmp_path / "other.yaml", **keys), better)
    words = ["study", "report", str(folder.path), "--against", str(other.path), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    output = capsys.readouterr().out
    # Common: 2 methods x 2 learning rates x seed 1; 97.1 - (95.5, 94.5, 96.5, 94.5).
    assert "| grid: all cells | other (--against) | 4 | -1.85 | 0.125 |" in output
    assert "| grid: A | other (--against) | 2 | -2.10 | 0.5 |" in output


def test_studies_without_a_common_cell_are_refused(folder, tmp_path):
    other = with_results(tmp_path / "o", write(tmp_path / "o.yaml", axes={"optimizer.lr": [0.5]}), lambda _: 0.5)
    with pytest.raises(StudyError, match="in common"):
        write_report(folder, tmp_path / "out", against=other)


def run_folder(path, rows):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps({"starts": [{"revision": "abc", "command": ["x"], "time": "t"}]}))
    return path


def row(epoch, accuracy, train_loss, eval_loss=1.0):
    speed = {"images_per_second": 1.0, "eval_samples": 9, "step": epoch}
    return {"epoch": epoch, "eval_accuracy": accuracy, "train_loss": train_loss, "eval_loss": eval_loss} | speed


@pytest.mark.parametrize(
    ("losses", "diverged"), [((1.0, 1.0), False), ((2.4, 2.4), True), ((2.4, 2.2), False), ((2.2, 9.0), False)]
)
def test_the_last_epoch_counts_and_losses_above_guessing_are_divergence(tmp_path, losses, diverged):
    path = run_folder(tmp_path / "run", [row(1, 0.9, 0.5), row(2, 0.4, *losses)])
    result = judge(path, Recipe(epochs=2), 0, tmp_path / "log")
    assert isinstance(result, Result)
    assert (result.accuracy, result.epochs, result.chance) == (0.4, 2, 0.1)
    assert (result.diverged is not None) == diverged
    assert result.environment["revision"] == "abc"
    assert "command" not in result.environment
    assert "run_dir" not in result.recipe


@pytest.mark.parametrize(("status", "epochs"), [(1, 2), (-9, 2), (0, 3)])
def test_any_other_end_is_a_failure_with_the_end_of_the_log(tmp_path, status, epochs):
    path = run_folder(tmp_path / "run", [row(1, 0.9, 0.5), row(2, 0.4, 1.0)])
    (tmp_path / "log").write_text("\n".join(f"line {i}" for i in range(100)))
    failure = judge(path, Recipe(epochs=epochs), status, tmp_path / "log")
    assert isinstance(failure, Failure)
    assert failure.log.endswith("line 99")
    assert "line 50" not in failure.log


def test_a_loss_that_is_no_longer_finite_is_a_result_without_an_epoch(tmp_path):
    result = judge(run_folder(tmp_path / "run", []), Recipe(), DIVERGED, tmp_path / "log")
    assert isinstance(result, Result)
    assert (result.accuracy, result.epochs) == (None, 0)
    assert "finite" in result.diverged


def test_workers_go_round_the_gpus_or_share_the_threads():
    launcher = {"RANK": "1", "MASTER_ADDR": "x", "HOME": "h"}
    found = [slot_environment(slot, 3, ["4", "7"], launcher) for slot in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["4", "7", "4"]
    assert all("RANK" not in one and "MASTER_ADDR" not in one and one["HOME"] == "h" for one in found)
    assert slot_environment(0, 1000, [], {})["OMP_NUM_THREADS"] == "1"
    assert slot_environment(0, 2, [], {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_a_dry_run_counts_runs_and_steps_and_measures_a_step(tmp_path, capsys):
    small = {"model.name": "resnet8", "batch_size": 32, "data.drop_last": True}
    path = write(
        tmp_path / "grid.yaml", axes={"optimizer.lr": [0.1, 0.01]}, seeds=[0, 1, 2], budget={"epochs": 7}, set=small
    )
    assert main(["study", "run", str(path), "--dry-run", "--dir", str(tmp_path / "study")]) == 0
    output = capsys.readouterr().out
    # 1,438 digits make 44 whole batches of 32.
    assert "2 cells x 3 seeds = 6 runs of 308 steps" in output
    assert ("GPU hours of h100 by an estimate" in output) != ("GPU hours, without" in output)
    assert not (tmp_path / "study").exists()


def test_spread_is_over_seeds_and_the_points_are_percent(folder):
    points = summarize(folder).points
    assert points.shape == (6, 2)
    assert np.allclose(points[1], [95.0, 95.5])


TRAVEL = {
    "base": "quickstart",
    "axes": {
        "data.block": [4, 8],
        "method": {"A": {"optimizer.name": "adamw"}, "B": {}, "C": {"optimizer.beta2": "auto"}},
        "optimizer.lr": [0.1, 0.01, 0.001],
    },
    "seeds": [0, 1],
    "compare": "method",
    "reference": "B",
    "tasks": "data.block",
}
# By task and method at 0.1, 0.01, 0.001; seed 1 has a point more.
TASKS = {
    ("4", "A"): (0.50, 0.80, 0.70),
    ("4", "B"): (0.75, 0.78, 0.60),
    ("4", "C"): (0.60, 0.60, 0.60),
    ("8", "A"): (0.40, 0.60, 0.65),
    ("8", "B"): (0.70, 0.72, 0.50),
    ("8", "C"): (0.55, 0.50, 0.50),
}
DEFAULTS = {"A": 0.01, "B": 0.1, "C": 0.01}


def of_task(run):
    task, method, rate = run.cell.labels
    return TASKS[task, method][["0.1", "0.01", "0.001"].index(rate)] + 0.01 * run.seed


def test_contenders_are_judged_at_their_defaults_on_every_task_and_in_units_of_them(tmp_path):
    config = write(tmp_path / "travel.yaml", **TRAVEL, defaults=DEFAULTS)
    folder = with_results(tmp_path / "study", config, of_task)
    summary = summarize(folder)
    found = at_defaults(summary)
    # The best cells are A at 0.01 (80.5) and B at 0.01 (72.5).
    assert found["A"].regret == pytest.approx([0, 12])
    assert found["B"].regret == pytest.approx([5, 2])
    assert found["C"].regret == pytest.approx([20, 22])
    assert found["B"].points == pytest.approx(np.array([[75, 76], [70, 71]]))
    # Two tasks: of the four flips none is more extreme than C's, and two are not less extreme than A's.
    tests = {test.second: test.test for test in default_against_reference(summary)}
    assert tests["A"].difference == pytest.approx(2.5)
    assert tests["A"].pairs == 2
    assert tests["C"].difference == pytest.approx(17.5)
    assert (tests["A"].p, tests["C"].p) == (pytest.approx(1.0), pytest.approx(1.0))
    assert in_units(summary)["B"] == pytest.approx({1.0: 73.0, 0.1: 75.5, 0.01: 55.5})
    assert in_units(summary)["A"] == pytest.approx({10.0: 45.5, 1.0: 70.5, 0.1: 68.0})
    text = write_report(folder, folder.path / "report")
    assert "| contender | mean accuracy | mean regret | largest | 4 | 8 | B - it | p |" in text
    assert "| B (0.1) | 73.00 | 3.50 | 5.00 | 5.00 | 2.00 |  |  |" in text
    assert "| times the default | 0.01 | 0.1 | 1 | 10 | mean | lowest |" in text
    assert "| B | 55.50 | 75.50 | 73.00 | - | 74.25 | 73.00 |" in text
    again = json.loads((folder.path / "report" / "report.json").read_text())
    assert again["at_defaults"]["B"]["regret"] == pytest.approx([5, 2])
    assert main(["study", "report", str(folder.path / "report" / "report.json"), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "report.md").read_text() == text


def test_a_study_without_tasks_is_judged_by_seeds_and_one_without_rates_needs_no_default(tmp_path):
    axes = {"method": TRAVEL["axes"]["method"], "optimizer.lr": [0.1, 0.01, 0.001]}
    keys = TRAVEL | {"axes": axes, "tasks": None}
    config = write(tmp_path / "flat.yaml", **keys, defaults=DEFAULTS)
    flat = with_results(tmp_path / "flat", config, lambda run: TASKS["4", run.cell.labels[0]][1] + 0.01 * run.seed)
    assert [test.test.pairs for test in default_against_reference(summarize(flat))] == [2, 2]
    assert at_defaults(summarize(flat))["C"].regret == pytest.approx([20])
    axes = {key: TRAVEL["axes"][key] for key in ("data.block", "method")}
    config = write(tmp_path / "one.yaml", **(TRAVEL | {"axes": axes}))

    def some(run):
        return None if run.cell.labels == ("8", "C") else TASKS[run.cell.labels][0]

    one = with_results(tmp_path / "one", config, some)
    found = at_defaults(summarize(one))
    assert found["A"].regret == pytest.approx([25, 30])
    assert found["C"].regret == pytest.approx([15, np.nan], nan_ok=True)
    assert in_units(summarize(one)) == {}
    assert "| B | 72.50 | 0.00 | 0.00 | 0.00 | 0.00 |" in write_report(one, one.path / "report")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": "model"}, "tasks='model' must be an axis beside compare; there are data.block, optimizer.lr"),
        ({"tasks": "method"}, "must be an axis beside compare"),
        ({}, "tasks needs defaults, each contender's place on the axis 'optimizer.lr'"),
        ({"defaults": {"A": 0.01, "B": 0.1}}, "for each of A, B, C"),
        ({"defaults": DEFAULTS | {"D": 0.1}}, "for each of A, B, C; D is no place of 'method'"),
        ({"defaults": DEFAULTS | {"C": 0.02}}, "C: 0.02 is no place of 'optimizer.lr' (0.1, 0.01, 0.001)"),
        ({"defaults": DEFAULTS, "tasks": None}, "one axis beside compare and tasks; there are 2"),
        ({"compare": None, "reference": None}, "tasks needs compare"),
    ],
)
def test_tasks_and_defaults_that_cannot_be_are_named(tmp_path, keys, message):
    config = write(tmp_path / "bad.yaml", **(TRAVEL | keys))
    with pytest.raises(StudyError) as error:
        load_study(config)
    assert message in str(error.value)


def test_holm_s_correction_is_for_the_whole_family():
    # Holm 1979: 3 x 0.01; 2 x 0.03; then 0.04, but no less than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
