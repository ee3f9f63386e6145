"""User errors give one clear message, on every rank, before the first step."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from robust_dist.engines.accelerate import EngineError, check_mesh
from tests.forked import python
from tests.train.launching import train
from tests.train.under_engines import ROOT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.name", "imagenet22k"], "imagenet22k"),
        (["--model.name", "resnet57"], "resnet57"),
        (["--num_processes", "2"], "2"),
        (["--data.block", "64", "--accumulation", "4"], "block"),
        (["--schedule.warmup_steps", "100000"], "warmup_steps"),
        (["--data.name", "cifar10", "--data.download", "false", "--data.root", "nowhere"], "nowhere"),
        (["--model.sync_batchnorm", "true"], "model.sync_batchnorm"),
        (["--micro_batch_size", "64", "--accumulation", "4"], "accumulation=4 contradicts micro_batch_size=64"),
    ],
)
def test_a_setting_that_cannot_work_is_named(tmp_path, words, message):
    code, output = train(1, *words, "--run_dir", str(tmp_path / "run"))
    assert code == 2, output
    assert message in output[output.index("error:") :]
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_recipe_names_and_cannot_be_used_is_one_message_before_the_data_is_opened(tmp_path):
    (tmp_path / "s.yaml").write_text("epochs: 1\n")
    words = ["--run_dir", str(tmp_path / "s.yaml"), "--model.name", "resnet57", "--model.weights", "gone/w.pt"]
    words += ["--tracking.trackers", "[tensorbord]", "--optimizer.name", "adam"]
    code, output = train(1, *words, "--data.name", "cifar10", "--data.root", str(tmp_path / "nowhere"))
    assert code == 2, output
    said = output[output.index("error:") :]
    told = (
        "s.yaml' is a file",
        "unknown model 'resnet57'",
        "gone/w.pt': there is no such file",
        "'tensorboard'",
        "name='adam'",
    )
    assert all(part in said for part in told)
    assert "nowhere" not in output
    assert (tmp_path / "s.yaml").read_text() == "epochs: 1\n"


SAVING = ["--epochs", "1", "--checkpoint.every_steps", "6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with checkpoints at its steps 6 and 12."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    code, output = train(1, *SAVING, "--run_dir", str(folder))
    assert code == 0, output
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(run):
    """All files except the lock, which names the last process that looked."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_checkpoints_that_cannot_be_used_are_named_and_left_alone(run):
    for path in (run / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"torn")
    before = names(run)
    code, output = train(1, *SAVING, "--run_dir", str(run))
    assert code == 2
    assert "model.safetensors" in output
    assert "move" in output
    assert names(run) == before


def test_a_torn_newest_checkpoint_is_passed_over_for_the_one_before(run):
    (run / "checkpoints" / "step-00000012" / "optimizer.bin").write_bytes(b"torn")
    code, output = train(1, *SAVING, "--run_dir", str(run))
    assert code == 0, output
    assert "skipping checkpoint" in output
    assert "step 6 of 12" in output


def test_a_checkpoint_of_another_recipe_is_named_and_not_used(run):
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("\nseed: 0", "\nseed: 5"))
    before = names(run)
    code, output = train(1, *SAVING, "--seed", "5", "--run_dir", str(run))
    assert code == 2
    assert "from another recipe (seed: 5 here, 0 in the folder)" in output
    assert names(run) == before


def test_a_folder_of_another_run_is_refused_before_anything_is_written(run):
    before = contents(run)
    code, output = train(1, *SAVING, "--optimizer.lr", "0.3", "--run_dir", str(run))
    assert code == 2
    assert "optimizer.lr: 0.3 here, 0.05 in the folder" in output
    assert contents(run) == before


# MULTI_CPU: Accelerate before 1.13.
NO_FSDP = r"error: FSDP was requested \(ACCELERATE_USE_FSDP=true\), but the engine is (NO|MULTI_CPU): Accelerate"
MESH = "error: parallelism_config: dp_replicate_size=2 x dp_shard_size=2 is a mesh of 4 ranks, but 2 were launched"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Accelerate's FSDP runs here")
@pytest.mark.parametrize(
    ("name", "ranks", "message"), [("fsdp1", 1, NO_FSDP), ("fsdp2", 2, NO_FSDP), ("hsdp", 2, MESH)]
)
def test_an_engine_that_the_machine_or_the_ranks_cannot_be_is_one_message(tmp_path, name, ranks, message):
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "--num_processes", str(ranks)]
    recipe = ["--config", str(ROOT / "configs" / "recipes" / "quickstart.yaml")]
    script = [str(ROOT / "launch" / "train.py"), *recipe, "--run_dir", str(tmp_path / "run")]
    code, said = python("-m", "accelerate.commands.accelerate_cli", "launch", *words, *script)
    assert code != 0
    assert re.search(message, said)
    # The launcher's own traceback is there.
    assert "train/build.py" not in said
    assert not (tmp_path / "run").exists()


MESHES = [("DP_SHARD", 2, True), ("DP_SHARD", 1, True), ("TP", 4, False), ("SP", 4, True)]


@pytest.mark.parametrize(("name", "size", "fits"), MESHES)
def test_a_mesh_that_accelerate_takes_is_not_refused(monkeypatch, name, size, fits):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    refused = pytest.raises(EngineError, match="tp_size=4 is a mesh of 4 ranks, but 2 were launched")
    with contextlib.nullcontext() if fits else refused:
        check_mesh()
