"""Trainer's checkpoints are read, reported and written under its own names; test_transformers.py resumes from them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from robust_dist.checkpoint import CheckpointError, convert, read
from robust_dist.cli import main
from tests.checkpoint.test_convert import assert_same_state
from tests.checkpoint.test_inspect import line, save

STATE = {"global_step": 2, "max_steps": 8, "epoch": 0.25, "train_batch_size": 4, "stateful_callbacks": {}}


def as_trainer(folder, weights="model.safetensors"):
    """The output of save(), in the form Trainer writes on two ranks, with a user's tokenizer."""
    (folder / "optimizer.bin").rename(folder / "optimizer.pt")
    (folder / "scheduler.bin").rename(folder / "scheduler.pt")
    model = torch.load(folder / "pytorch_model.bin")
    if weights != "pytorch_model.bin":
        (folder / "pytorch_model.bin").unlink()
    if weights == "model.safetensors":
        save_file(model, folder / weights)
    if weights == "model.safetensors.index.json":
        names = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(model)}
        (folder / weights).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        for file in set(names.values()):
            save_file({name: tensor for name, tensor in model.items() if names[name] == file}, folder / file)
    for name in ("rng_state_0.pth", "rng_state_1.pth", "training_args.bin"):
        (folder / name).write_bytes(name.encode())
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return as_trainer(save(tmp_path / "run" / "checkpoint-2", 2))


def report_of(folder, capsys):
    status = main(["inspect", str(folder)])
    return capsys.readouterr().out, status


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_report_says_what_lies_in_a_healthy_folder_and_calls_it_whole(tmp_path, capsys, weights):
    report, status = report_of(as_trainer(save(tmp_path / "checkpoint-2", 2), weights), capsys)
    assert status == 0
    found = [line(report, name) for name in ("layout", "whole", "world size", "step", "Trainer")]
    assert found == ["Trainer folder (DDP)", "yes", "2", "2 (optimizer's state: 2)", "step 2 of 8, epoch 0.25"]
    shards = ", 2 shards of weights" if weights.endswith("index.json") else ""
    files = sorted([weights, "config.json", "optimizer.pt", "parameters.json", "scheduler.pt", "tokenizer/"])
    beside = ["trainer_state.json", "training_args.bin"]
    assert line(report, "files") == ", ".join([*files, *beside]) + f"{shards}, rng_state of 2 ranks"


def test_a_report_names_the_switch_of_the_callback(checkpoint, capsys):
    switch = {"step": 2, "total_steps": 8, "off_at": 0.75, "switch_step": None, "base_weight_decay": [0.25, 0.0]}
    callbacks = {"RobustTrainerCallback": {"args": {}, "attributes": {"switch_state": switch}}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(STATE | {"stateful_callbacks": callbacks}))
    torch.save({"last_epoch": 2, "base_lrs": [0.5, 0.5]}, checkpoint / "scheduler.pt")
    report, _ = report_of(checkpoint, capsys)
    assert line(report, "schedule") == "step 2; weight decay on, off from step 6 of 8 (off_at 0.75)"
    assert line(report, "Trainer").endswith("state of RobustTrainerCallback")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("optimizer.pt", None, "optimizer.pt: missing: torn, or saved with save_only_model=True"),
        ("scheduler.pt", None, "scheduler.pt: missing: Trainer would silently load only the weights"),
        ("model.safetensors", None, "is not a checkpoint"),
        ("optimizer.pt", "torn", "optimizer.pt: torn"),
        ("scheduler.pt", "torn", "scheduler.pt: torn"),
        ("trainer_state.json", "{", "trainer_state.json: torn, or not from Trainer"),
        ("trainer_state.json", "{}", "trainer_state.json: torn, or not from Trainer"),
    ],
)
def test_a_torn_folder_is_reported_with_its_file(checkpoint, file, text, message):
    (checkpoint / file).unlink()
    if text is not None:
        (checkpoint / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)


TARGETS = {
    "ddp": {"optimizer.pt", "scheduler.pt"},
    "fsdp": {"pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt", "model.safetensors"},
    "zero2": {"global_step2", "latest", "scheduler.pt", "model.safetensors"},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("to", TARGETS)
def test_what_was_trainers_becomes_trainers_again_with_all_that_lies_beside(tmp_path, checkpoint, capsys, to):
    notes = convert(checkpoint, tmp_path / "to", to, 1)
    assert "is from 2 ranks, not 1" in notes[-1]
    there = {path.name for path in (tmp_path / "to").iterdir()}
    assert there >= TARGETS[to] | {"trainer_state.json", "config.json", "tokenizer", "training_args.bin"}
    assert not there & {"optimizer.bin", "scheduler.bin", "rng_state_0.pth", "rng_state_1.pth", "pytorch_model"}
    report, status = report_of(tmp_path / "to", capsys)
    assert (status, line(report, "whole"), line(report, "engine")) == (0, "yes", to)
    assert line(report, "layout").startswith("Trainer folder (")
    convert(tmp_path / "to", tmp_path / "back", "ddp", 2)
    assert_same_state(read(tmp_path / "back"), read(checkpoint))


def test_the_random_states_of_the_ranks_that_will_be_go_along(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "more", "ddp", 3)
    assert {path.name for path in (tmp_path / "more").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert read(tmp_path / "more").world_size == 3


def test_the_other_form_is_written_where_it_is_asked_for(tmp_path, checkpoint):
    words = [str(checkpoint), str(tmp_path / "accelerate"), "--to", "zero1", "--world-size", "2"]
    assert main(["convert", *words, "--form", "accelerate"]) == 0
    assert (tmp_path / "accelerate" / "pytorch_model").is_dir()
    assert not (tmp_path / "accelerate" / "trainer_state.json").exists()
    convert(tmp_path / "accelerate", tmp_path / "trainer", "zero1", 2, form="trainer")
    assert (tmp_path / "trainer" / "latest").read_text() == "global_step2"
    assert json.loads((tmp_path / "trainer" / "trainer_state.json").read_text())["global_step"] == 2
    assert_same_state(read(tmp_path / "trainer"), read(checkpoint))
    with pytest.raises(CheckpointError, match="form='lightning' is not one of accelerate, trainer"):
        convert(checkpoint, tmp_path / "no", "ddp", 1, form="lightning")


def test_weights_beside_an_engines_own_files_are_an_export_and_no_second_checkpoint(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "zero", "zero2", 2, form="accelerate")
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "zero")
    assert_same_state(read(tmp_path / "zero"), read(checkpoint))


def test_a_runs_folder_is_answered_with_its_last_checkpoint(checkpoint):
    for step in (9, 10):
        shutil.copytree(checkpoint, checkpoint.with_name(f"checkpoint-{step}"))
    with pytest.raises(CheckpointError, match=r"name one, such as .*checkpoint-10"):
        read(checkpoint.parent)
