"""A run's folder is taken by one live run, and by the run whose settings it holds."""

import json
import subprocess
import sys

import pytest

from robust_dist.train.folder import RunFolder, RunFolderError
from robust_dist.train.recipe import OptimizerConfig, Recipe


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
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(RunFolderError, match=r"optimizer\.lr: 0\.5 here, 0\.01 in the folder"):
        RunFolder(tmp_path).claim(Recipe(optimizer=OptimizerConfig(lr=0.5)), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before
    RunFolder(tmp_path).claim(Recipe(), {})


def test_a_folder_with_other_files_is_no_run_s(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="no run's folder"):
        RunFolder(tmp_path).claim(Recipe(), {})
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").claim(Recipe(), {})


def test_rewind_forgets_later_epochs_and_a_torn_last_line(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.append({"step": step})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4')
    folder.rewind(20)
    assert folder.metrics_path.read_text() == '{"step": 10}\n{"step": 20}\n'
