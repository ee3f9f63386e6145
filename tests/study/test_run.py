"""Studies that really train: workers share runs, die, are stopped; what failed and what diverged."""

import json
import signal
from pathlib import Path

import pytest

from robust_dist.cli import main
from robust_dist.study import claims
from robust_dist.study.folder import StudyFolder
from tests.study.studies import end, start, wait_until, write

GOOD = {"optimizer.lr": 0.05}
ROWS = {"good": GOOD, "wild": {"optimizer.lr": 1.0e30}, "broken": {"schedule.warmup_steps": 1000000}}


def results(folder: Path) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def starts(folder: Path, run: str) -> int:
    return len(json.loads((folder / "runs" / run / "environment.json").read_text())["starts"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A study of three cells, one of which cannot start and one of which diverges, after two commands at a time."""
    folder = tmp_path_factory.mktemp("shared")
    config = write(folder / "rows.yaml", axes={"row": ROWS})
    commands = [start(config, folder / "study") for _ in range(2)]
    outputs = [command.communicate(timeout=500)[0] for command in commands]
    return config, folder / "study", [command.returncode for command in commands], outputs


def test_two_commands_share_the_runs_and_each_is_trained_once(shared):
    _, folder, codes, outputs = shared
    assert set(results(folder)) == {"good_seed0", "wild_seed0"}, outputs
    assert starts(folder, "good_seed0") == starts(folder, "wild_seed0") == 1
    told = [line for output in outputs for line in output.splitlines() if line.startswith("[")]
    assert len(told) == 3, outputs
    assert codes == [1, 1]  # one run has no result


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_reported_with_its_log(shared):
    _, folder, _, outputs = shared
    wild = results(folder)["wild_seed0"]
    assert (wild["accuracy"], wild["diverged"]) == (None, "the training loss was no longer finite")
    failure = json.loads((folder / "failed" / "broken_seed0.json").read_text())
    assert failure["status"] == 2
    assert "warmup_steps=1000000" in failure["log"]
    assert any("FAILED with status 2" in output and "warmup_steps=1000000" in output for output in outputs)
    report = (folder / "report" / "report.md").read_text()
    assert "Unfinished: 2 of 3 runs have a result; 1 failed" in report
    assert "| accuracy | " in report
    assert "| diverged | - |" in report


def test_status_names_what_diverged_and_what_failed(shared, capsys):
    _, folder, _, _ = shared
    assert main(["study", "status", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "3 runs, 1 finished, 1 diverged, 1 failed, 0 running, 0 waiting" in output
    assert "broken, seed 0: failed with status 2" in output


def test_a_worker_stopped_once_and_killed_twice_ends_with_the_result_of_an_undisturbed_one(shared, tmp_path, capsys):
    _, undisturbed, _, _ = shared
    config, folder = write(tmp_path / "rows.yaml", axes={"row": {"good": GOOD}}), tmp_path / "study"
    claim, checkpoints = folder / "claims" / "good_seed0", folder / "runs" / "good_seed0" / "checkpoints"

    def is_claimed() -> bool:
        return claims.look(claim) is not None

    process = start(config, folder)
    wait_until(is_claimed, process)
    code, output = end(process, signal.SIGINT)
    assert code == 130, output
    assert "the same command goes on" in output
    assert not is_claimed()  # the training process, which holds the lock too, has ended

    for is_time in (is_claimed, lambda: any(checkpoints.glob("step-*"))):
        process = start(config, folder)
        wait_until(is_time, process)
        end(process)

    assert main(["study", "run", str(config), "--dir", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "good, seed 0: its worker died; going on with it" in output
    ours, theirs = (results(one)["good_seed0"] for one in (folder, undisturbed))
    exact = ("accuracy", "train_loss", "epochs", "steps", "eval_samples", "diverged", "recipe")
    assert {key: ours[key] for key in exact} == {key: theirs[key] for key in exact}
    assert "resuming" in (folder / "logs" / "good_seed0.log").read_text()

    # A finished study is not run again.
    before, trained = (folder / "results" / "good_seed0.json").read_bytes(), starts(folder, "good_seed0")
    assert main(["study", "run", str(config), "--dir", str(folder)]) == 0
    assert "All 1 runs are finished." in capsys.readouterr().out
    assert starts(folder, "good_seed0") == trained
    assert (folder / "results" / "good_seed0.json").read_bytes() == before


def test_a_folder_of_another_study_is_refused_with_what_differs(shared, tmp_path, capsys):
    _, folder, _, _ = shared
    other = write(tmp_path / "rows.yaml", axes={"row": ROWS | {"good": {"optimizer.lr": 0.1}}}, seeds=[0, 1])
    assert main(["study", "run", str(other), "--dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "axes.row" in error
    assert "seeds: [0, 1] here, [0] in the folder" in error
    assert StudyFolder(folder).study().seeds == (0,)


def test_a_folder_of_other_files_is_refused(tmp_path, capsys):
    config = write(tmp_path / "rows.yaml", axes={"row": {"good": GOOD}})
    assert main(["study", "run", str(config), "--dir", str(tmp_path)]) == 2
    assert "no study.yaml" in capsys.readouterr().err
