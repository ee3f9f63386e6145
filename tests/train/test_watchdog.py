"""The watchdog of one process: when it dumps, when it ends the process, and when it must not."""

import ctypes
import os
import signal
import sys
import threading
import time

import pytest

from robust_dist.train.failures import Rank
from robust_dist.train.watchdog import HANG_STATUS, Watchdog, describe, is_waiting, tick
from tests.forked import CONTEXT, ensure_server
from tests.train.ending import print_into

TIMEOUT = 2.0


def work():
    """Longer than the timeout, in steps that are shorter."""
    for step in range(8):
        tick(f"step {step}")
        time.sleep(TIMEOUT / 5)


def wait_patiently():
    tick("a download", may_be_slow=True)
    time.sleep(1.5 * TIMEOUT)


def hang():
    tick("step 7")
    time.sleep(60)


def hold_the_interpreter():
    tick("step 7")
    time.sleep(TIMEOUT / 2)
    # A function of a C library that does not release the lock.
    ctypes.PyDLL(None).sleep(int(2 * TIMEOUT))


def be_stopped():
    tick("step 7")
    child = os.fork()
    if child == 0:
        time.sleep(2 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, 0)


def be_without_a_disk():
    tick("step 7")
    time.sleep(60)


CASES = {one.__name__: one for one in (work, wait_patiently, hang, hold_the_interpreter, be_stopped, be_without_a_disk)}


def watched(name, folder):
    print_into(f"{folder}/{name}.out")
    place = folder / name
    if name == "be_without_a_disk":
        # Opening a pipe without a reader blocks forever, like a dead file system.
        (place / "stacks").mkdir(parents=True)
        os.mkfifo(place / "stacks" / "rank-0.txt")
    place.mkdir(exist_ok=True)
    with Watchdog(Rank(0, 1, "host", place), TIMEOUT, lambda reason: print(f"given up: {reason}")):
        CASES[name]()
    # Nothing of it is left to trigger.
    time.sleep(TIMEOUT)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit status, output and stacks of every case."""
    ensure_server()
    folder = tmp_path_factory.mktemp("watched")
    processes = {name: CONTEXT.Process(target=watched, args=(name, folder)) for name in CASES}
    for process in processes.values():
        process.start()
    found = {}
    for name, process in processes.items():
        process.join(60)
        stacks = folder / name / "stacks" / "rank-0.txt"
        dump = stacks.read_text() if stacks.is_file() else None
        found[name] = process.exitcode, (folder / f"{name}.out").read_text(), dump
    return found


def test_a_run_that_gets_on_is_left_alone_however_long_it_takes(outcomes):
    assert outcomes["work"] == (0, "", None)


def test_a_patient_phase_is_dumped_but_not_ended(outcomes):
    code, output, dump = outcomes["wait_patiently"]
    assert code == 0
    assert "since the start of a download" in output
    assert "in wait_patiently" in dump


def test_a_hang_is_dumped_then_ended_with_a_status_of_its_own(outcomes):
    code, output, dump = outcomes["hang"]
    assert code == HANG_STATUS
    assert output.index("the stacks of its threads") < output.index("given up: no progress for")
    assert "in hang" in dump
    assert "step 7" in dump


def test_a_thread_that_holds_the_interpreter_is_dumped_all_the_same(outcomes):
    code, output, _ = outcomes["hold_the_interpreter"]
    assert code == 0
    assert "Timeout (" in output
    assert "in hold_the_interpreter" in output


def test_time_in_which_the_process_was_stopped_does_not_count(outcomes):
    code, output, dump = outcomes["be_stopped"]
    assert code == 0
    assert dump is None
    assert "given up" not in output


def test_a_disk_that_hangs_keeps_nobody_from_dumping_and_ending(outcomes):
    code, output, _ = outcomes["be_without_a_disk"]
    assert code == HANG_STATUS
    assert "rank-0.txt cannot be written; the stacks:" in output
    assert "in be_without_a_disk" in output


def test_a_frame_is_described_by_the_code_that_led_to_it():
    stop = threading.Event()

    def wait_here():
        stop.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    while sys._current_frames()[thread.ident].f_code.co_name != "wait":
        time.sleep(0.01)
    frame = sys._current_frames()[thread.ident]
    said = describe(frame)
    stop.set()
    thread.join()
    assert said.startswith("wait (")
    assert ", called from wait_here (" in said
    assert not is_waiting(frame)
    assert describe(None) == "an unknown place"
