"""A run's folder is taken by one live run, and by the run whose settings it holds."""

import json
import subprocess
import sys

import pytest

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.train.claim import FolderLostError
from robust_dist.train.failures import record_failure
from robust_dist.train.folder import RunFolder, RunFolderError
from robust_dist.train.recipe import OptimizerConfig, Recipe
from robust_dist.train.resume import check_not_lost
from robust_dist.train.whereabouts import Rank


def test_claim_writes_the_recipe_and_notes_every_start(tmp_path):
    for _ in range(2):
        folder = RunFolder(tmp_path / "run")
        folder.claim(Recipe(), {"python": "3"})
        folder.release()
    assert "epochs: 300" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]) == 2


def test_a_folder_of_a_live_run_is_refused_and_named(tmp_path):
    holder = f"""
import sys, time
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import Recipe
folder = RunFolder({str(tmp_path)!r})
folder.claim(Recipe(), {{}})
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=rf"in use by a live run \(pid {process.pid} "):
            RunFolder(tmp_path).claim(Recipe(), {})
        process.kill()
    RunFolder(tmp_path).claim(Recipe(), {})


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_was(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(Recipe(), {})
    folder.release()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(RunFolderError, match=r"optimizer\.lr: 0\.5 here, 0\.01 in the folder"):
        RunFolder(tmp_path).claim(Recipe(optimizer=OptimizerConfig(lr=0.5)), {})
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"}
    assert after == before
    RunFolder(tmp_path).claim(Recipe(), {})


def test_a_folder_with_other_files_is_no_run_s(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="no run's folder"):
        RunFolder(tmp_path).claim(Recipe(), {})
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").claim(Recipe(), {})


ROW = {"epoch": 1, "step": 10}


def recorded(tmp_path, epochs):
    folder = RunFolder(tmp_path)
    folder.claim(Recipe(), {})
    folder.metrics_path.write_text("".join(json.dumps(ROW | {"epoch": 1 + n}) + "\n" for n in range(epochs)))
    return folder


def spoil(folder, how):
    folder.checkpoints.rmdir()
    if how == "a file":
        folder.checkpoints.write_text("")
    elif how == "a link to nothing":
        folder.checkpoints.symlink_to("unmounted")


@pytest.mark.parametrize("how", ["missing", "a file", "a link to nothing"])
def test_recorded_epochs_without_their_checkpoints_folder_are_no_new_run(tmp_path, how):
    folder = recorded(tmp_path, 1)
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=r"has 1 epochs, but .*checkpoints .*choose another run_dir"):
        check_not_lost(Recipe(), CheckpointStore(folder.checkpoints), folder)
    assert len(folder.metrics()) == 1


def test_a_run_killed_before_its_first_checkpoint_begins_anew_and_an_emptied_one_does_not(tmp_path):
    folder = recorded(tmp_path, 2)
    store = CheckpointStore(folder.checkpoints)
    check_not_lost(Recipe(), store, folder)
    (tmp_path / "curves.png").write_text("drawn at the end")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        check_not_lost(Recipe(), store, folder)


def test_a_folder_that_is_renamed_while_a_run_trains_is_not_made_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(Recipe(), {})
    store = CheckpointStore(folder.checkpoints, guard=folder.check)
    (tmp_path / "run").rename(tmp_path / "kept")
    for write in (lambda: folder.append(ROW), lambda: store.begin(1)):
        with pytest.raises(FolderLostError, match="run is gone: it was deleted or renamed"):
            write()
    record_failure(FolderLostError("gone"), Rank(0, 1, "host", folder.path))
    folder.release()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_rewind_forgets_later_epochs_and_a_torn_last_line(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.append({"step": step})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4')
    folder.rewind(20)
    assert folder.metrics_path.read_text() == '{"step": 10}\n{"step": 20}\n'
