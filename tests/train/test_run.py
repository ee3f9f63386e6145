"""Whole runs: their folder, resuming, and independence of the world size."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from robust_dist.checkpoint import verify
from tests.train.launching import (
    finish,
    kill_after,
    metrics,
    newest_step,
    ranks_of,
    start,
    train,
    wait_for_step,
)

KEYS = {"epoch", "step", "train_loss", "eval_accuracy", "eval_loss", "eval_samples", "lr", "weight_decay"}
KEYS |= {"eval_top5_accuracy", "eval_mean_class_accuracy", "eval_class_accuracy"}


def last_weights(run_dir):
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_at_a_random_step_then_stopped_by_a_signal_equals_an_undisturbed_run(tmp_path, world_size):
    words = ["--checkpoint.every_steps", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = train(world_size, *words, "--run_dir", str(whole))
    assert code == 0, output
    rows = metrics(whole)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [12, 24, 36]
    assert {row["eval_samples"] for row in rows} == {359}
    assert set(rows[0]) == KEYS
    assert [row["weight_decay"] for row in rows] == [0.01, 0.01, 0.0]

    step = random.randrange(1, 24)
    process = start(world_size, *words, "--run_dir", str(killed))
    kill_after(process, killed, step)
    process = start(world_size, *words, "--run_dir", str(killed))
    # All ranks stop when one of them is asked to; a launcher turns their status 75 into 1.
    wait_for_step(process, killed, newest_step(killed) + 1)
    rank = ranks_of(process)[-1]
    os.kill(rank, signal.SIGHUP if world_size == 2 else signal.SIGINT)
    code, output = finish(process)
    assert code == (75 if world_size == 1 else 1), output
    assert f"stopped by {'SIGHUP' if world_size == 2 else 'SIGINT'} at step" in output
    note = json.loads((killed / "stopped.json").read_text())
    assert note["step"] == newest_step(killed)
    assert Path(note["checkpoint"]).is_dir()
    code, output = train(world_size, *words, "--run_dir", str(killed))
    assert code == 0, output
    assert f"resuming {note['checkpoint']} at step {note['step']} of 36" in output
    assert not (killed / "stopped.json").exists()
    assert metrics(killed) == rows, f"killed after step {step}, stopped at {note['step']}"
    newest = verify(sorted((killed / "checkpoints").glob("step-*"))[-1])
    assert newest.metadata["eval_accuracy"] == rows[-1]["eval_accuracy"]
    ours, theirs = last_weights(killed), last_weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    before = (killed / "metrics.jsonl").read_bytes()
    code, output = train(world_size, *words, "--run_dir", str(killed))
    assert code == 0, output
    assert (killed / "metrics.jsonl").read_bytes() == before
    assert (killed / "curves.png").stat().st_size > 10_000


def test_ranks_and_accumulation_do_not_change_the_run(tmp_path):
    # A model without batch normalisation: with it, statistics are each rank's own. 1438 = 11 * 128 + 30 is uneven.
    model = ["--model.name", "timm/test_vit", "--model.options", "{img_size: 32, patch_size: 8}"]
    words = [*model, "--epochs", "2", "--optimizer.clip_norm", "1.0", "--data.block", "4"]
    runs = {"one": (1, "1"), "two": (2, "1"), "accumulated": (2, "2")}
    for name, (world_size, accumulation) in runs.items():
        run_dir = ["--run_dir", str(tmp_path / name), "--accumulation", accumulation]
        code, output = train(world_size, *words, *run_dir)
        assert code == 0, output
    one = metrics(tmp_path / "one")
    for name in ("two", "accumulated"):
        for row, other in zip(one, metrics(tmp_path / name), strict=True):
            assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)
            assert other["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-3)
            assert (other["step"], other["lr"], other["weight_decay"]) == (row["step"], row["lr"], row["weight_decay"])


def test_options_of_the_recipe_run_together(tmp_path):
    words = ["--ema_decay", "0.9", "--label_smoothing", "0.1", "--optimizer.clip_norm", "1", "--epochs", "2"]
    words += ["--model.channels_last", "true", "--optimizer.no_decay", "[bias, norm]", "--schedule.warmup_steps", "5"]
    words += ["--augment.cutmix_mode", "batch", "--tracking.trackers", "[tensorboard]", "--data.drop_last", "true"]
    words += ["--checkpoint.every_steps", "3", "--accumulation", "2", "--run_dir", str(tmp_path / "a")]
    code, output = train(1, *words)
    assert code == 0, output
    rows = metrics(tmp_path / "a")
    assert [row["step"] for row in rows] == [11, 22]
    assert list((tmp_path / "a" / "trackers").rglob("events.out*"))

    words[-1] = str(tmp_path / "b")
    process = start(1, *words)
    kill_after(process, tmp_path / "b", 12)
    assert train(1, *words)[0] == 0
    assert metrics(tmp_path / "b") == rows


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    words = ["--checkpoint.every_steps", "4", "--run_dir", str(tmp_path)]
    words += ["--micro_batch_size", "64", "--data.drop_last", "true"]
    process = start(2, *words)
    kill_after(process, tmp_path, 16)
    code, output = train(1, *words)
    assert code == 0, output
    assert "the run had 2 ranks and now has 1" in output
    assert "the global batch stays 128 images; accumulation 1 -> 2, a rank holds at most 64 -> 64 images" in output
    assert "batch normalisation" in output
    assert [row["step"] for row in metrics(tmp_path)] == [11, 22, 33]


def test_a_live_run_s_folder_is_refused_on_every_rank_and_nothing_is_touched(tmp_path):
    process = start(1, "--epochs", "200", "--run_dir", str(tmp_path))
    try:
        while not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path):
            assert process.poll() is None
        code, output = train(2, "--epochs", "200", "--run_dir", str(tmp_path))
        assert code != 0
        assert f"run_dir='{tmp_path}' is in use by a live run" in output
        assert process.poll() is None
    finally:
        process.kill()
        finish(process)


def test_a_diverged_run_stops_and_names_its_settings(tmp_path):
    words = ["--optimizer.lr", "1e30", "--checkpoint.every_steps", "1", "--run_dir", str(tmp_path)]
    code, output = train(1, *words)
    assert code == 3
    assert "optimizer.lr=1e+30" in output
    assert "nothing was saved after it went bad" in output
