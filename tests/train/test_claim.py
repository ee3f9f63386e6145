"""One live run for a folder: on one host, on several, and with clocks that agree on nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from robust_dist.train import claim as module
from robust_dist.train.claim import Claim, FolderInUseError, FolderLostError, host_id

# A short beat, so that a test need not wait for the real one.
QUICK = {"beat": 0.1, "silence": 1.5}


def start(folder, host, code, locks=False):
    """A process with a `claim` on the folder as a host would make it whose locks do not reach this one."""
    # The file alone: the package would import torch.
    load = "import os, sys, time, importlib.util as u, pathlib; spec = u.spec_from_file_location('claim', {!r})\n"
    load += "m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
    load += "claim = m.Claim(pathlib.Path({!r}), host={!r}, locks={!r}, **{!r})\n"
    text = load.format(module.__file__, str(folder), host, locks, QUICK) + code
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)


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
        Claim(tmp_path, **QUICK).take()
    assert owners(tmp_path) == [".owner-000001"]


def test_a_dead_holder_on_another_host_is_outlasted_and_a_stopped_one_finds_its_folder_lost(tmp_path, elsewhere):
    os.kill(elsewhere.pid, signal.SIGSTOP)
    claim = Claim(tmp_path, **QUICK)
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
            Claim(tmp_path, **QUICK).take()


def test_a_holder_that_was_taken_for_dead_is_told_so(tmp_path):
    first, second = Claim(tmp_path, host="a", locks=False, beat=60.0), Claim(tmp_path, host="b", locks=False, **QUICK)
    first.take()
    first.check()
    second.take()
    with pytest.raises(FolderLostError, match="taken over by another run"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_of_two_starts_that_find_a_dead_holder_one_wins(tmp_path):
    dead = Claim(tmp_path, host="dead", locks=False, beat=60.0)
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
    claim = Claim(tmp_path, silence=1e9)
    claim.take()
    claim.release()
    end(holder)


def test_a_host_is_told_from_another_of_its_name(tmp_path):
    assert host_id() == host_id()
    assert len(host_id().partition("/")[2]) == 8
