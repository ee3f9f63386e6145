"""One live run per folder, one live worker per study run: on one host or several, whatever their clocks say."""

import json
import os
import signal
import time

import pytest

from robust_dist.ranks.claim import (
    STALE_SECONDS,
    FolderClaim,
    FolderInUseError,
    FolderLostError,
    RunClaim,
    age,
    host_id,
)
from tests.forked import start_python

# A short beat, so that tests need not wait for the real one.
QUICK = {"beat": 0.1, "silence": 1.5}


def start(folder, host, code, locks=False):
    """A process that holds a `claim` on the folder as if on a host whose locks are not visible here."""
    load = "import os, pathlib, time; from robust_dist.ranks import claim as m\n"
    load += "claim = m.FolderClaim(pathlib.Path({!r}), host={!r}, locks={!r}, **{!r})\n"
    text = load.format(str(folder), host, locks, QUICK) + code
    return start_python("-c", text)


def end(*processes):
    for process in processes:
        process.kill()
        process.communicate()


HOLD = "claim.take(); print('held', flush=True); time.sleep(120)"


@pytest.fixture
def elsewhere(tmp_path):
    process = start(tmp_path, "elsewhere/1", HOLD)
    assert process.stdout.readline() == "held\n"
    yield process
    end(process)


def owners(folder):
    return sorted(path.name for path in folder.glob(".owner-*"))


def test_a_live_holder_on_a_host_whose_locks_do_not_reach_here_is_seen_by_its_beat(tmp_path, elsewhere):
    with pytest.raises(FolderInUseError, match=rf"in use by a live run \(pid {elsewhere.pid} on elsewhere\)"):
        FolderClaim(tmp_path, **QUICK).take()
    assert owners(tmp_path) == [".owner-000001"]


def test_a_dead_holder_on_another_host_is_outlasted_and_a_stopped_one_finds_its_folder_lost(tmp_path, elsewhere):
    os.kill(elsewhere.pid, signal.SIGSTOP)
    claim = FolderClaim(tmp_path, **QUICK)
    claim.take()
    assert owners(tmp_path) == [".owner-000002"]
    os.kill(elsewhere.pid, signal.SIGCONT)
    time.sleep(5 * QUICK["beat"])
    # It beats again, but into nothing.
    assert owners(tmp_path) == [".owner-000002"]
    claim.check()
    claim.release()
    assert owners(tmp_path) == []


def test_the_times_of_the_files_mean_nothing(tmp_path, elsewhere):
    hour = 3600.0
    for shift in (-hour, hour):
        os.utime(tmp_path / ".owner-000001", (time.time() + shift,) * 2)
        with pytest.raises(FolderInUseError):
            FolderClaim(tmp_path, **QUICK).take()


def test_a_holder_that_was_taken_for_dead_is_told_so(tmp_path):
    first, second = (
        FolderClaim(tmp_path, host="a", locks=False, beat=60.0),
        FolderClaim(tmp_path, host="b", locks=False, **QUICK),
    )
    first.take()
    first.check()
    second.take()
    with pytest.raises(FolderLostError, match="taken over by another run"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_of_two_starts_that_find_a_dead_holder_one_wins(tmp_path):
    dead = FolderClaim(tmp_path, host="dead", locks=False, beat=60.0)
    dead.take()
    code = (
        "try: claim.take()\nexcept m.FolderInUseError: print('refused', flush=True)\nelse: print('taken', flush=True)\n"
    )
    starts = [start(tmp_path, f"host{n}", code + "time.sleep(120)") for n in range(3)]
    try:
        outcomes = sorted(next(line for line in one.stdout if " " not in line) for one in starts)
    finally:
        end(*starts)
    assert outcomes == ["refused\n", "refused\n", "taken\n"]


def test_a_killed_holder_on_this_host_blocks_nobody_though_a_child_of_it_still_holds_the_lock(tmp_path):
    code = "claim.take()\nif os.fork() == 0: time.sleep(2); os._exit(0)\nprint('held', flush=True); time.sleep(120)"
    holder = start(tmp_path, host_id(), code, locks=True)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    claim = FolderClaim(tmp_path, silence=1e9)
    claim.take()
    claim.release()
    end(holder)


def test_a_host_is_told_from_another_of_its_name(tmp_path):
    assert host_id() == host_id()
    assert len(host_id().partition("/")[2]) == 8


def test_a_folder_that_0_6_0_held_is_outlasted_and_what_is_written_is_what_it_reads(tmp_path):
    note = {"host": "elsewhere/1", "pid": 1, "token": "0123456789abcdef", "beats": 7}
    (tmp_path / ".owner-000041").write_bytes(json.dumps(note).ljust(512).encode())
    (tmp_path / ".lock").touch()
    claim = FolderClaim(tmp_path, **QUICK)
    claim.take()
    assert owners(tmp_path) == [".owner-000042"]
    written = (tmp_path / ".owner-000042").read_bytes()
    assert len(written) == 512
    assert {name: type(value) for name, value in json.loads(written).items()} == {k: type(v) for k, v in note.items()}
    claim.release()


def test_a_runs_claim_is_written_as_0_6_0_reads_it(tmp_path):
    claim = RunClaim.take(tmp_path / "run")
    written = json.loads(claim.path.read_text())
    assert sorted(written) == ["host", "kernel", "pid"]
    assert written["pid"] == os.getpid()
    claim.release()


def test_a_claim_is_one_s_until_it_is_released(tmp_path):
    path = tmp_path / "run"
    assert RunClaim.worker_of(path) is None
    ours = RunClaim.take(path)
    assert RunClaim.take(path) is None
    assert RunClaim.worker_of(path).pid == os.getpid()
    ours.release()
    assert RunClaim.worker_of(path) is None
    RunClaim.take(path).release()


def test_a_claim_ends_when_the_last_process_that_inherited_it_is_killed(tmp_path):
    path = tmp_path / "run"
    code = (
        "import subprocess, sys; from pathlib import Path; from robust_dist.ranks.claim import RunClaim;"
        f"c = RunClaim.take(Path({str(path)!r}));"
        "n = subprocess.DEVNULL; p = subprocess.Popen(['sleep', '60'], pass_fds=[c.fileno], stdout=n, stderr=n);"
        "print(p.pid, flush=True); p.wait()"
    )
    holder = start_python("-c", code)
    heir = int(holder.stdout.readline())
    try:
        assert RunClaim.take(path) is None
        holder.kill()
        holder.communicate()
        assert RunClaim.take(path) is None
    finally:
        os.kill(heir, 9)
    deadline = time.monotonic() + 60
    while (claim := RunClaim.take(path)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    claim.release()


@pytest.mark.parametrize(("age", "is_free"), [(0, False), (STALE_SECONDS + 10, True)])
def test_another_machine_s_claim_is_left_alone_until_it_has_not_been_touched_for_long(tmp_path, age, is_free):
    path = tmp_path / "run"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "kernel": "another boot"}))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    assert (RunClaim.worker_of(path) is None) == is_free
    assert (RunClaim.take(path) is not None) == is_free


def test_a_beat_keeps_a_claim_fresh(tmp_path):
    claim = RunClaim.take(tmp_path / "run")
    os.utime(claim.path, (0, 0))
    claim.beat()
    assert age(claim.path) < STALE_SECONDS
    claim.release()


def test_a_loser_s_release_leaves_the_winner_s_claim_alone(tmp_path):
    claim = RunClaim.take(tmp_path / "run")
    winner = json.dumps({"host": "elsewhere", "pid": 1, "kernel": "another boot"})
    claim.path.write_text(winner)
    claim.release()
    assert claim.path.read_text() == winner
