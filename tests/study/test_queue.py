"""The queue of a study's runs, shared by workers."""

import pytest

from robust_dist.study.parse import load_study
from robust_dist.study.queue import Queue
from tests.study.studies import write


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
