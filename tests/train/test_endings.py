"""A rank that hangs or fails is named, also by the ranks it takes down; the others end within the timeout."""

import json

import pytest

from robust_dist.train.failures import Rank, Record, explain_loss, kind_of, read_records, record_failure, set_aside
from robust_dist.train.watchdog import HANG_STATUS
from tests.train.ending import STEP, run_faults

HANGING = ["--timeout_seconds", "12"]
FAULTS = {"sleeps": HANGING, "stops": HANGING, "raises": [], "is killed": [], "full disk": []}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    return run_faults(tmp_path_factory.mktemp("endings"), FAULTS)


def elastic(ending, rank):
    return json.loads((ending.folder / f"elastic-{rank}.json").read_text())["message"]


def test_a_rank_that_hangs_outside_of_a_collective_is_ended_and_named(endings):
    ending = endings["sleeps"]
    assert ending.codes == [1, HANG_STATUS], ending.outputs
    assert f"since the start of step {STEP + 1}; it is in sleep_for_ever" in ending.outputs[1]
    assert "stopped, because rank 1" in ending.outputs[0]
    assert "sleep_for_ever" in ending.outputs[0].splitlines()[-1]


@pytest.mark.parametrize("fault", ["sleeps", "stops"])
def test_every_rank_that_runs_dumps_its_stacks_before_the_collectives_give_up(endings, fault):
    ending = endings[fault]
    dumps = {path.stem: path.read_text() for path in (ending.run / "stacks").glob("rank-*.txt")}
    assert set(dumps) == ({"rank-0", "rank-1"} if fault == "sleeps" else {"rank-0"})
    assert f"step {STEP + 1}, for " in dumps["rank-0"]
    assert "in train_step" in dumps["rank-0"]
    assert "watchdog" in dumps["rank-0"]
    assert fault == "stops" or "in sleep_for_ever" in dumps["rank-1"]
    said = ending.outputs[0]
    assert said.index("the stacks of its threads are in") < said.rindex("rank 0 on ")


def test_a_stopped_rank_is_named_by_those_that_waited_for_it(endings):
    ending = endings["stops"]
    assert ending.codes == [1, None]
    assert "waited in vain for the other ranks; rank 1 left no record: stopped, stuck" in ending.outputs[0]
    assert "Traceback" not in ending.outputs[0]


def test_an_error_comes_out_once_and_the_ranks_it_takes_along_say_one_line(endings):
    ending = endings["raises"]
    assert ending.codes == [1, 1]
    assert ending.outputs[1].count("RuntimeError: a transistor is loose") == 1
    assert "Traceback" in ending.outputs[1]
    line = ending.outputs[0].strip().splitlines()[-1]
    assert "because rank 1 on " in line
    assert "failed: RuntimeError: a transistor is loose" in line
    assert "Traceback" not in ending.outputs[0]
    assert [(record.rank, record.kind) for record in read_records(ending.run)] == [(1, "failed"), (0, "lost")]


def test_the_launcher_takes_the_first_cause_for_the_root_cause(endings):
    first, second = (elastic(endings["raises"], rank) for rank in (1, 0))
    assert int(first["extraInfo"]["timestamp"]) < int(second["extraInfo"]["timestamp"])
    assert "fail_alone" in first["extraInfo"]["py_callstack"]
    assert "because rank 1" in second["message"]


def test_a_killed_rank_is_named_by_the_survivors(endings):
    ending = endings["is killed"]
    assert ending.codes == [1, -9]
    line = ending.outputs[0].strip().splitlines()[-1]
    assert "lost another rank; rank 1 left no record: killed (out of memory?)" in line


def test_an_error_that_all_ranks_share_is_told_by_the_rank_it_came_from(endings):
    ending = endings["full disk"]
    assert ending.codes == [1, 1]
    assert ending.outputs[1].count("No space left on device") == 2  # its line in the traceback, and the error
    assert "Traceback" not in ending.outputs[0]
    records = read_records(ending.run)
    assert [(record.rank, record.type) for record in records] == [(1, "OSError")]
    assert "in write" in records[0].traceback


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[../pair.cc:561] Connection closed by peer [10.0.0.2]:27522"), "lost"),
        (
            RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited or there was a network error"),
            "lost",
        ),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), "waited"),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"), "waited"),
        (RuntimeError("CUDA out of memory"), "failed"),
        (RuntimeError("The client socket has timed out after 60000ms while trying to connect to (a, 1)"), "waited"),
        (RuntimeError("NCCL error in: NCCLUtils.cpp:94, invalid usage\nDuplicate GPU detected"), "failed"),
        (ConnectionResetError(104, "Connection reset by peer"), "failed"),
        (OSError(28, "No space left on device"), "failed"),
        (OSError("hub: Connection reset by peer"), "failed"),
        (ValueError("Connection closed by peer"), "failed"),
    ],
)
def test_an_error_is_known_by_what_it_says(error, kind):
    assert kind_of(error) == kind


def record(rank, kind, time):
    return Record(rank, "host", kind, "RuntimeError", "it broke", "", time)


def test_the_first_cause_comes_first_whatever_the_clocks_say(tmp_path):
    folder = tmp_path / "errors"
    folder.mkdir()
    # The cause's clock is an hour ahead.
    for one in (record(0, "lost", "T01:00"), record(1, "waited", "T01:00"), record(2, "failed", "T02:00")):
        (folder / f"rank-{one.rank}.json").write_text(json.dumps(vars(one)))
    (folder / "rank-3.json").write_text("{torn")
    assert [one.rank for one in read_records(tmp_path)] == [2, 0, 1]
    assert "rank 2 on host failed: RuntimeError: it broke" in explain_loss(
        Rank(0, 4, "host", tmp_path), record(0, "lost", "T01:00"), seconds=0
    )


def test_an_earlier_start_s_errors_are_kept_but_not_taken_for_this_one_s(tmp_path):
    record_failure(RuntimeError("before"), Rank(1, 2, "host", tmp_path))
    set_aside(tmp_path)
    assert read_records(tmp_path) == []
    kept = list((tmp_path / "errors").glob("before-*/rank-1.json"))
    assert "before" in kept[0].read_text()
    lost = record_failure(RuntimeError("Connection closed by peer"), Rank(0, 2, "host", tmp_path))
    assert "rank 1 left no record" in explain_loss(Rank(0, 2, "host", tmp_path), lost, seconds=0)


def test_where_every_rank_lost_its_peers_the_network_is_named(tmp_path):
    ranks = [Rank(number, 2, "host", tmp_path) for number in range(2)]
    records = [record_failure(RuntimeError("Connection reset by peer"), rank) for rank in ranks]
    assert "check the network" in explain_loss(ranks[0], records[0])
