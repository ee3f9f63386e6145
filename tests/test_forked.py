"""Forked processes are as real as started ones: own environment, own exit status, and no process left behind."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import robust_dist
from tests.forked import ROOT
from tests.ranks import run_ranks
from tests.train.launching import finish, start


def here():
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "given": os.environ.get("GIVEN"),
        "rank": os.environ["RANK"],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "code": robust_dist.__file__,
        "deepspeed": "deepspeed" in sys.modules,
        "draw": __import__("numpy").random.rand(),
    }


def test_ranks_have_the_callers_environment_and_folder_and_this_code_without_deepspeed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "once")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one, two = run_ranks(here, 2)
    assert one["pid"] != two["pid"]
    assert one["draw"] != two["draw"]
    for rank, found in enumerate((one, two)):
        assert (found["cwd"], found["given"], found["threads"]) == (str(tmp_path), "once", "7")
        assert (found["rank"], found["deepspeed"]) == (str(rank), False)
        assert found["code"] == str(ROOT / "robust_dist" / "__init__.py")
    monkeypatch.delenv("GIVEN")
    assert run_ranks(here, 1)[0]["given"] is None


def one_dies(folder, how):
    rank = dist.get_rank()
    Path(folder, str(rank)).write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1 and how == "raises":
        raise ValueError("of rank 1")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "dies":
        time.sleep(600)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("how", "said"), [("raises", "rank 1:\n(.|\n)*ValueError: of rank 1"), ("dies", "SIGKILL")])
def test_a_rank_that_fails_fails_the_caller_and_none_is_left(tmp_path, how, said):
    with pytest.raises(Exception, match=said):
        run_ranks(one_dies, 2, str(tmp_path), how)
    assert not any(is_alive(int(Path(tmp_path, str(rank)).read_text())) for rank in (0, 1))


def test_a_run_of_two_ranks_that_fails_or_is_terminated_says_so_and_leaves_none(tmp_path):
    code, output = finish(start(2, "--epochs", "0"))
    assert code == 1
    assert "error:" in output
    assert "epochs=0" in output
    process = start(2, "--epochs", "500", "--run_dir", str(tmp_path))
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert finish(process)[0] not in (0, None)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
