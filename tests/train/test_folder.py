"""A run's folder is held by one live run, and belongs to the run with its settings."""

import json
import os

import pytest
import torch
import yaml

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.private import hidden
from robust_dist.ranks.claim import FolderLostError
from robust_dist.train.checkpoints import check_not_lost
from robust_dist.train.failures import Rank, record_failure
from robust_dist.train.folder import RunFolder, RunFolderError, environment
from robust_dist.train.metrics import last_row
from robust_dist.train.recipe import DataConfig, OptimizerConfig, Recipe, parse_recipe, recipe_dict
from tests.forked import start_python


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
    process = start_python("-c", holder)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=rf"in use by a live run \(pid {process.pid} "):
        RunFolder(tmp_path).claim(Recipe(), {})
    process.kill()
    process.wait()
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
    thesis = tmp_path / "thesis.tex"
    for path, said in ((tmp_path, "not a run's folder"), (thesis, "is a file"), (thesis / "run", "is below")):
        for ask in (lambda folder: folder.claim(Recipe(), {}), lambda folder: folder.check_usable(Recipe())):
            with pytest.raises(RunFolderError, match=said):
                ask(RunFolder(path))
    assert list(tmp_path.iterdir()) == [thesis]


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


SECRET = "XYZ-0123"


def test_secrets_reach_no_file_and_files_with_options_are_the_owner_s_alone(tmp_path, monkeypatch):
    words = ["train.py", "--tracking.options.tensorboard.api_key", SECRET]
    monkeypatch.setattr("sys.argv", words)
    before = os.umask(0o022)
    try:
        for name, recipe in (("plain", Recipe()), ("private", parse_recipe(words[1:]))):
            folder = RunFolder(tmp_path / name)
            folder.claim(recipe, environment(1, torch.device("cpu"), "NO"))
            folder.release()
            store = CheckpointStore(folder.checkpoints)
            store.begin(1)
            store.commit(1, {"recipe": hidden(recipe_dict(recipe))})
            # The same command resumes.
            folder.claim(recipe, {})
            folder.release()
            files = [path for path in folder.path.rglob("*") if path.is_file()]
            assert not [path for path in files if SECRET in path.read_text()]
            written = [path for path in files if path.suffix in (".yaml", ".json")]
            assert len(written) == 3
            assert {path.stat().st_mode & 0o077 for path in written} == {0 if name == "private" else 0o044}
    finally:
        os.umask(before)


@pytest.mark.parametrize("left", [".recipe.yaml.partial", "errors", ".lock"])
def test_a_folder_in_which_a_start_died_is_taken_by_the_next(tmp_path, left):
    (tmp_path / left).mkdir() if left == "errors" else (tmp_path / left).write_text("half")
    RunFolder(tmp_path).claim(Recipe(), {})
    assert "epochs: 300" in (tmp_path / "recipe.yaml").read_text()


def test_a_damaged_recipe_refuses_the_folder_and_a_damaged_note_of_starts_is_kept(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.claim(Recipe(), {"python": "3"})
    folder.release()
    (tmp_path / "environment.json").write_text('{"starts": [')
    folder.claim(Recipe(), {"python": "4"})
    folder.release()
    assert folder.starts() == [{"python": "4"}]
    assert (tmp_path / "environment.damaged.json").read_text() == '{"starts": ['
    assert "environment.damaged.json" in capsys.readouterr().out
    for text in ("epochs: 300\nepochs: 3\n", "- a\n", "", "a: [1\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RunFolderError, match=r"recipe\.yaml"):
            folder.claim(Recipe(), {})
        assert (tmp_path / "recipe.yaml").read_text() == text


def test_a_recipe_of_an_earlier_version_that_left_words_unquoted_is_the_same_run(tmp_path):
    recipe = Recipe(data=DataConfig(name="hub", path="1e10", revision="1e5"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe), sort_keys=False))
    RunFolder(tmp_path).claim(recipe, {})


def row(epoch, step=None, **more):
    return json.dumps(
        {"epoch": epoch, "step": 10 * epoch if step is None else step, "eval_accuracy": epoch / 10} | more
    )


@pytest.mark.parametrize(
    ("lines", "step", "kept", "said"),
    [
        ([row(1), row(2), row(3)], 20, [1, 2], []),
        ([row(1), row(3)], 30, [1, 3], ["has no row for epoch 2, but the checkpoint is at step 30"]),
        ([row(1), row(2), row(2, eval_accuracy=0.9)], 20, [1, 2], ["step 20 has several rows"]),
        (
            [row(1), row(2, 19)],
            20,
            [1],
            ["a row of epoch 2 and step 19 is not at an epoch's end", "has no row for epoch 2"],
        ),
        ([row(2), row(1)], 20, [1, 2], []),
        ([row(1), "{torn", row(2)], 20, [1, 2], ["line 2 is not JSON"]),
        ([row(1), row(2, "20")], 20, [1], ["line 2: step='20' is not valid", "has no row for epoch 2"]),
        ([row(1, eval_accuracy="high"), row(2)], 20, [2], ["eval_accuracy='high'", "has no row for epoch 1"]),
        (
            ["[]", "7", '{"step": 1, "step": 2}'],
            0,
            [],
            ["line 1=[]", "line 2=7", "line 3: the key 'step' is given twice"],
        ),
        ([], 20, [], ["has no row for epoch 1, 2,"]),
    ],
)
def test_rows_are_compared_with_the_step_and_none_is_lost(tmp_path, lines, step, kept, said):
    folder = RunFolder(tmp_path)
    folder.metrics_path.write_text("".join(line + "\n" for line in lines))
    notes = "\n".join(folder.rewind(step, 10))
    assert [one["epoch"] for one in folder.metrics()] == kept
    assert all(words in notes for words in said), notes
    assert bool(notes) == bool(said)
    erased = tmp_path / "metrics.erased.jsonl"
    gone = erased.read_text().splitlines() if erased.exists() else []
    assert sorted([*gone, *folder.metrics_path.read_text().splitlines()]) == sorted(lines)


def test_only_the_last_epoch_s_own_row_tells_a_run_s_accuracy():
    rows = [{"epoch": 1, "eval_accuracy": 0.1}, {"epoch": 2, "eval_accuracy": 0.2}]
    assert last_row(rows, 2) == rows[1]
    assert last_row(rows, 3) is None
    assert last_row([], 3) is None
    assert last_row([{"epoch": 3}], 3) is None


def test_rewind_forgets_later_epochs_and_a_torn_last_line(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.append({"step": step})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4')
    folder.rewind(20)
    assert folder.metrics_path.read_text() == '{"step": 10}\n{"step": 20}\n'
