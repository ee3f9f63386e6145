"""Worker processes: the same batches as without, and their ends: killed, signalled, or abandoned by their rank."""

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from robust_dist.data.errors import WorkersLostError
from tests.data.coloured import Coloured, Deadly, Failing, Mislabelled, processes, stream_loader
from tests.data.test_stream import same_batches
from tests.forked import ensure_server

GROUPS = (11, 30, 2, 20, 12)
OPTIONS = {"batch_size": 8, "seed": 5, "block": 2}


@pytest.fixture
def loader():
    """Creates loaders with two workers, which end with the test."""
    ensure_server()
    made = []

    def make(source, **options):
        made.append(stream_loader(source, **(OPTIONS | {"workers": 2} | options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_workers_give_the_batches_of_one_process_epoch_after_epoch_also_after_one_that_was_left(loader):
    source = Coloured(*GROUPS, bad=[3, 50])
    reading, alone = loader(source, accumulation=2), stream_loader(source, accumulation=2, **OPTIONS)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for epoch, start, steps in ((0, 0, None), (1, 0, 3), (1, 3, None), (2, 0, 1), (0, 0, None)):
        ours = list(islice(reading.epoch(epoch, start), steps))
        theirs = list(islice(alone.epoch(epoch, start), steps))
        for step, twin in zip(ours, theirs, strict=True):
            same_batches(step, twin)
        assert reading.take_bad() == alone.take_bad()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_killed_worker_is_an_error_that_says_what_to_do_and_no_hang(loader):
    with pytest.raises(WorkersLostError, match=r"worker process .* is gone .*set fewer data.workers or a smaller"):
        list(loader(Deadly(*GROUPS)).epoch(0))


def test_an_error_in_a_worker_keeps_its_type_and_text(loader):
    with pytest.raises(ValueError, match=r"sample \d+ has label 7, outside the 7 classes of coloured"):
        next(loader(Mislabelled(*GROUPS)).epoch(0))
    with pytest.raises(RuntimeError, match=r"the archive of sample \d+ exited unexpectedly") as caught:
        next(loader(Failing(*GROUPS)).epoch(0))
    assert caught.type is RuntimeError


# Its own server, from which no other test's processes come.
RANK = """
import sys, time
from tests.data.coloured import Telling, stream_loader
from tests.data.test_workers import GROUPS, OPTIONS
epoch = stream_loader(Telling(*GROUPS, log=sys.argv[1]), workers=2, prefetch=1, **OPTIONS).epoch(0)
# One of each worker: both have begun.
next(epoch), next(epoch)
print("reading", flush=True)
sys.stdin.readline()
print(len(list(epoch)), "more", flush=True)
time.sleep(600)
"""


def test_workers_ignore_signals_that_are_meant_for_ranks_and_end_with_a_rank_that_is_killed(tmp_path):
    command = [sys.executable, "-c", RANK, str(tmp_path / "log")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rank = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)
    assert rank.stdout.readline() == "reading\n"
    workers, servers = processes(tmp_path / "log")
    assert rank.pid not in workers | servers
    for name in ("INT", "TERM", "HUP", "USR1", "USR2"):
        # From a process that is not their rank.
        subprocess.run(["kill", "-s", name, *map(str, workers | servers)], check=True)
    rank.stdin.write("go on\n")
    rank.stdin.flush()
    assert rank.stdout.readline() == "8 more\n"
    assert processes(tmp_path / "log") == (workers, servers)
    rank.kill()
    rank.communicate()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers | servers):
        assert time.monotonic() < deadline, "the workers of a killed rank live on"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
