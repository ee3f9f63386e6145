"""Who trains what, between processes and, by the file system's clock, between machines."""

import json
import os
import subprocess
import sys
import time

import pytest

from robust_dist.study import claims
from robust_dist.study.parse import load_study
from robust_dist.study.queue import Queue
from tests.study.studies import write


def test_a_claim_is_one_s_until_it_is_released(tmp_path):
    path = tmp_path / "run"
    assert claims.look(path) is None
    ours = claims.take(path)
    assert claims.take(path) is None
    assert claims.look(path).pid == os.getpid()
    ours.release()
    assert claims.look(path) is None
    claims.take(path).release()


def test_a_claim_ends_when_the_last_process_that_inherited_it_is_killed(tmp_path):
    path = tmp_path / "run"
    code = (
        "import subprocess, sys; from pathlib import Path; from robust_dist.study import claims;"
        f"c = claims.take(Path({str(path)!r}));"
        "p = subprocess.Popen(['sleep', '60'], pass_fds=[c.fileno], stdout=subprocess.DEVNULL);"
        "print(p.pid, flush=True); p.wait()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    heir = int(holder.stdout.readline())
    try:
        assert claims.take(path) is None
        holder.kill()
        holder.communicate()
        assert claims.take(path) is None
    finally:
        os.kill(heir, 9)
    deadline = time.monotonic() + 60
    while (claim := claims.take(path)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.release()


@pytest.mark.parametrize(("age", "is_free"), [(0, False), (claims.STALE_SECONDS + 10, True)])
def test_another_machine_s_claim_is_left_alone_until_it_has_not_been_touched_for_long(tmp_path, age, is_free):
    path = tmp_path / "run"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "kernel": "another boot"}))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    assert (claims.look(path) is None) == is_free
    assert (claims.take(path) is not None) == is_free


def test_a_beat_keeps_a_claim_fresh(tmp_path):
    claim = claims.take(tmp_path / "run")
    os.utime(claim.path, (0, 0))
    claim.beat()
    assert claims._age(claim.path) < claims.STALE_SECONDS
    claim.release()


def test_a_loser_s_release_leaves_the_winner_s_claim_alone(tmp_path):
    claim = claims.take(tmp_path / "run")
    winner = json.dumps({"host": "elsewhere", "pid": 1, "kernel": "another boot"})
    claim.path.write_text(winner)
    claim.release()
    assert claim.path.read_text() == winner


@pytest.fixture
def study(tmp_path):
    return load_study(write(tmp_path / "s.yaml", axes={"optimizer.lr": [0.1, 0.2]}, seeds=[0, 1]))[0]


def names(entries):
    return [run.name for run, _ in entries]


def test_a_queued_run_is_given_to_one_worker(tmp_path, study):
    first, second = (Queue(tmp_path / "journal.log", study) for _ in range(2))
    first.fill([])
    assert names(second.waiting()) == ["0.1_seed0", "0.2_seed0", "0.1_seed1", "0.2_seed1"]
    trial = first.waiting()[0][1]
    assert first.start(trial)
    assert not second.start(trial)
    assert names(second.running()) == ["0.1_seed0"]
    assert second.start(second.waiting()[0][1])
    assert names(first.running()) == ["0.1_seed0", "0.2_seed0"]


def test_filling_again_queues_what_failed_and_nothing_else(tmp_path, study):
    queue = Queue(tmp_path / "journal.log", study)
    queue.fill(["0.2_seed1"])
    (_, good), (_, bad), (_, busy) = queue.waiting()
    for trial in (good, bad, busy):
        queue.start(trial)
    queue.finish(good, 0.9, diverged=False)
    assert queue.fail(bad)
    assert not queue.fail(bad)
    queue.fill(["0.2_seed1", "0.1_seed0"])
    assert names(queue.waiting()) == ["0.2_seed0"]
    assert names(queue.running()) == ["0.1_seed1"]
