"""Studies that really train: workers share runs, die, are stopped; what failed and what diverged."""

import contextlib
import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from robust_dist.cli import main
from robust_dist.ranks.claim import RunClaim
from robust_dist.study.folder import StudyFolder
from tests.study.studies import kill, start, wait_until, with_results, write

GOOD = {"optimizer.lr": 0.05}
# The first and the second are the same training; the third diverges; the fourth cannot start.
ROWS = {"good": GOOD, "twin": GOOD, "wild": {"optimizer.lr": 1.0e30}, "broken": {"schedule.warmup_steps": 1000000}}


# What 0.8.0 noted in a study's folder of a run that a worker has; nothing reads it any more.
JOURNAL = """{"op_code":0,"worker_id":"a","study_name":"rows","directions":[2]}
{"op_code":4,"worker_id":"a","study_id":0,"datetime_start":null,"state":4,"value":null,"values":null,"distributions":\
{"row":"{\\"name\\": \\"CategoricalDistribution\\", \\"attributes\\": {\\"choices\\": [\\"good\\"]}}"},\
"params":{"row":0},"user_attrs":{"run":"good_seed0"},"system_attrs":{},"intermediate_values":{}}
{"op_code":6,"worker_id":"a","trial_id":0,"state":0,"values":null,"datetime_start":"2026-11-29T14:34:26.724543+00:00"}
"""


def results(folder: Path) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A study after a worker that was killed in training, and two commands at a time, of which one was killed, too."""
    # A forked process has one thread, whatever is asked for; all runs must have as many to agree to the bit.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        return _shared(tmp_path_factory.mktemp("shared"))


def _shared(folder):
    config, study = write(folder / "rows.yaml", axes={"row": ROWS}), folder / "study"
    alone = start(config, study)
    wait_until(lambda: any((study / "runs" / "good_seed0" / "checkpoints").glob("step-*")), alone)
    kill(alone)
    (study / "journal.log").write_text(JOURNAL)

    paths = [study / "claims" / f"{row}_seed0" for row in ROWS]

    def holders() -> set[int]:
        return {holder.pid for path in paths if (holder := RunClaim.worker_of(path)) is not None}

    def end_first():
        # The other command is the one to find what the killed one left.
        while not holders():
            time.sleep(0.01)
        first = start(config, study)
        wait_until(lambda: first.pid in holders(), first)
        kill(first)

    killer = threading.Thread(target=end_first)
    killer.start()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["study", "run", str(config), "--dir", str(study), "--workers", "2"])
    killer.join()
    return config, study, code, output.getvalue()


def test_the_runs_of_killed_workers_are_taken_again_and_end_as_undisturbed_ones(shared):
    _, folder, code, output = shared
    assert set(results(folder)) == {"good_seed0", "twin_seed0", "wild_seed0"}, output
    assert output.count("its worker died; going on with it") == 2, output
    killed, undisturbed = results(folder)["good_seed0"], results(folder)["twin_seed0"]
    exact = ("accuracy", "train_loss", "epochs", "steps", "eval_samples", "diverged", "recipe")
    assert {key: killed[key] for key in exact} == {key: undisturbed[key] for key in exact}
    assert "resuming" in (folder / "logs" / "good_seed0.log").read_text()
    assert code == 1  # one run has no result


def test_a_run_that_failed_is_started_again_by_the_next_command_alone(shared, tmp_path):
    _, folder, _, output = shared
    assert output.count("broken, seed 0: FAILED") == 1
    shutil.copytree(folder, tmp_path / "study")
    again = StudyFolder(tmp_path / "study")
    assert again.ended() == {f"{row}_seed0" for row in ROWS}
    again.forget_failures(again.study())
    assert again.ended() == {f"{row}_seed0" for row in ROWS if row != "broken"}


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_reported_with_its_log(shared):
    _, folder, _, output = shared
    wild = results(folder)["wild_seed0"]
    assert (wild["accuracy"], wild["diverged"]) == (None, "the training loss was no longer finite")
    failure = json.loads((folder / "failed" / "broken_seed0.json").read_text())
    assert failure["status"] == 2
    assert "warmup_steps=1000000" in failure["log"]
    assert "broken, seed 0: FAILED with status 2" in output
    report = (folder / "report" / "report.md").read_text()
    assert "Unfinished: 3 of 4 runs have a result; 1 failed" in report
    assert "| diverged | - |" in report


def test_status_names_what_diverged_and_what_failed(shared, capsys):
    _, folder, _, _ = shared
    assert main(["study", "status", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "4 runs, 2 finished, 1 diverged, 1 failed, 0 running, 0 waiting" in output
    assert "broken, seed 0: failed with status 2" in output


def test_a_command_that_is_stopped_ends_its_training_and_gives_the_run_back(tmp_path, capsys):
    config, folder = write(tmp_path / "rows.yaml", axes={"row": {"good": GOOD}}), tmp_path / "study"
    claim = folder / "claims" / "good_seed0"

    def stop():
        while RunClaim.worker_of(claim) is None:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert main(["study", "run", str(config), "--dir", str(folder)]) == 130
    stopper.join()
    assert "run the same command to continue" in capsys.readouterr().out
    # The training process holds the lock, too: it has ended.
    assert RunClaim.worker_of(claim) is None
    assert main(["study", "status", str(folder)]) == 0
    assert "0 failed, 0 running, 1 waiting" in capsys.readouterr().out


def test_a_finished_study_is_not_run_again(tmp_path, capsys):
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    with_results(tmp_path / "study", config, lambda run: 0.5)
    assert main(["study", "run", str(config), "--dir", str(tmp_path / "study")]) == 0
    assert "All 4 runs are finished." in capsys.readouterr().out
    assert not (tmp_path / "study" / "runs").exists()


def test_runs_of_an_earlier_report_are_not_trained_again(tmp_path, capsys):
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    first = with_results(tmp_path / "first", config, lambda run: None if run.cell.labels == ("good",) else 0.5)
    second = with_results(tmp_path / "second", config, lambda run: 0.9 if run.cell.labels == ("good",) else None)
    for folder in (first, second):
        assert main(["study", "report", str(folder.path)]) == 0
    report = first.path / "report" / "report.json"
    assert main(["study", "run", str(config), "--dir", str(second.path), "--from", str(report)]) == 0
    out = capsys.readouterr().out
    assert "3 runs taken from" in out
    assert "All 4 runs are finished." in out
    assert not (second.path / "runs").exists()
    kept, taken = (second.result(run) for run in second.study().runs() if run.cell.labels in [("good",), ("wild",)])
    assert kept.accuracy == 0.9
    assert vars(taken) == vars(next(first.result(run) for run in first.study().runs() if run.cell.labels == ("wild",)))


@pytest.mark.parametrize(
    ("text", "named"),
    [("{}", "'study' is missing"), ("no json", "report.json is not JSON"), ('{"a": 1, "a": 2}', "is given twice")],
)
def test_what_is_no_report_is_refused(tmp_path, capsys, text, named):
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    (tmp_path / "report.json").write_text(text)
    words = ["--dir", str(tmp_path / "study"), "--from", str(tmp_path / "report.json")]
    assert main(["study", "run", str(config), *words]) == 2
    assert named in capsys.readouterr().err


def test_a_study_grows_by_seeds_and_places_and_keeps_the_runs_that_both_have(tmp_path, capsys):
    rows = [row for row in ROWS if row not in ("good", "wild")]
    smaller = write(tmp_path / "smaller.yaml", axes={"row": {row: ROWS[row] for row in ["good", *rows]}}, seeds=[0, 1])
    first = with_results(tmp_path / "first", smaller, lambda run: 0.5 + run.seed / 10)
    assert main(["study", "report", str(first.path)]) == 0
    larger = write(tmp_path / "larger.yaml", axes={"row": {row: ROWS[row] for row in ["wild", *rows]}}, seeds=[1, 2])

    def new(run):
        return 0.9 if run.seed == 2 or run.cell.labels == ("wild",) else None

    folder = with_results(tmp_path / "second", larger, new)
    words = ["--dir", str(folder.path), "--from", str(first.path / "report" / "report.json")]
    assert main(["study", "run", str(larger), *words]) == 0
    out = capsys.readouterr().out
    assert f"{len(rows)} runs taken from" in out
    assert "All 6 runs are finished." in out
    taken = [folder.result(run).accuracy for run in folder.study().runs() if new(run) is None]
    assert taken == [0.6] * len(rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"set": {"batch_size": 256}}, "base: batch_size: 512 here, 256 in the report"),
        ({"axes": {"row": ROWS | {"good": {"optimizer.lr": 0.1}}}}, "axes.row: good"),
        ({"axes": {"optimizer.lr": [0.1]}}, "axes.optimizer.lr: (no such axis) here"),
        ({"axes": {"row": {"other": GOOD}}}, "no cell and seed of this study: it has the seeds [0] and row other"),
        ({"seeds": [1, 2]}, "no cell and seed of this study: it has the seeds [1, 2]"),
    ],
)
def test_a_report_that_does_not_fit_is_refused_before_anything_runs(tmp_path, capsys, change, named):
    other = write(tmp_path / "other.yaml", **({"axes": {"row": ROWS}} | change))
    folder = with_results(tmp_path / "other", other, lambda run: 0.5)
    assert main(["study", "report", str(folder.path)]) == 0
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    words = ["--dir", str(tmp_path / "study"), "--from", str(folder.path / "report" / "report.json")]
    assert main(["study", "run", str(config), *words]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_folder_of_another_study_is_refused_with_what_differs(shared, tmp_path, capsys):
    _, folder, _, _ = shared
    other = write(tmp_path / "rows.yaml", axes={"row": ROWS | {"good": {"optimizer.lr": 0.1}}}, seeds=[0, 1])
    assert main(["study", "run", str(other), "--dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "axes.row" in error
    assert "seeds: [0, 1] here, [0] in the folder" in error
    assert StudyFolder(folder).study().seeds == (0,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"set": {"batch_size": 256}}, "base: batch_size: 256 here"),
        ({"axes": {"row": {"good": GOOD}}}, "axes.row"),
        ({"axes": {"optimizer.lr": [0.1]}}, "axes.optimizer.lr"),
    ],
)
def test_every_change_that_moves_results_is_named(tmp_path, capsys, change, named):
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    with_results(tmp_path / "study", config, lambda run: None)
    write(config, **({"axes": {"row": ROWS}} | change))
    assert main(["study", "run", str(config), "--dir", str(tmp_path / "study")]) == 2
    assert named in capsys.readouterr().err


def test_the_paper_s_figures_may_change(tmp_path):
    config = write(tmp_path / "rows.yaml", axes={"row": ROWS})
    folder = with_results(tmp_path / "study", config, lambda run: 0.5)
    write(config, axes={"row": ROWS}, paper={"good": 95.0})
    assert main(["study", "run", str(config), "--dir", str(folder.path)]) == 0
    assert folder.study().paper == {("good",): 95.0}


def test_a_folder_of_other_files_is_refused(tmp_path, capsys):
    config = write(tmp_path / "rows.yaml", axes={"row": {"good": GOOD}})
    assert main(["study", "run", str(config), "--dir", str(tmp_path)]) == 2
    assert "no study.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["status", "nowhere"], ["report", "nowhere"], ["run", "nowhere.yaml"]])
def test_a_path_that_is_no_study_is_one_message(words, capsys):
    assert main(["study", *words]) == 2
    assert "nowhere" in capsys.readouterr().err
