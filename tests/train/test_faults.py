"""Outside faults of a run's processes and disk: it continues, or says why not, and loses nothing complete."""

import os
import signal
import threading
import time

import pytest

from robust_dist.checkpoint import verify
from robust_dist.train.stop import StopSignals
from tests.forked import CONTEXT, ensure_server, start_python
from tests.small_disk import can_mount, small_disk
from tests.train.launching import command, finish, metrics, ranks_of, train, wait_for_step


def whole_steps(run_dir):
    """The steps of the checkpoints, all of which must be complete, with nothing else beside them."""
    return [verify(path).step for path in sorted((run_dir / "checkpoints").iterdir())]


def test_a_killed_rank_is_restarted_by_the_launcher_and_the_run_ends_as_an_undisturbed_one(tmp_path):
    words = ["--checkpoint.every_steps", "2", "--epochs", "2"]
    code, output = train(2, *words, "--run_dir", str(tmp_path / "whole"))
    assert code == 0, output
    run = tmp_path / "run"
    words = command(2, *words, "--run_dir", str(run))
    at = words.index("--num_processes")
    process = start_python(*words[:at], "--max_restarts", "1", *words[at:], OMP_NUM_THREADS="1")
    wait_for_step(process, run, 4)
    # The first rank, which holds the run's folder.
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert "resuming" in output
    assert metrics(run) == metrics(tmp_path / "whole")
    assert whole_steps(run) == [22, 24]


@pytest.fixture
def disk(tmp_path):
    """A file system of 9 MiB, and a way to give it another size."""
    if not can_mount():
        pytest.skip("mounting needs root, and a container that allows it")
    with small_disk(tmp_path / "disk", "9m") as resize:
        yield tmp_path / "disk", resize


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_stops_the_run_with_one_error_and_costs_no_whole_checkpoint(tmp_path, disk, background):
    place, resize = disk
    words = ["--checkpoint.every_steps", "1", "--checkpoint.keep", "100", "--epochs", "2"]
    words += ["--checkpoint.background", background, "--run_dir", str(place / "run")]
    code, output = train(2 if background == "true" else 1, *words)
    assert code == (1 if background == "true" else 2), output
    assert "warning" in output
    assert "checkpoint.keep=100" in output
    # The launcher repeats it.
    assert output.partition("torch/distributed/elastic")[0].count("could not be written") == 1, output
    error = output[output.index("error:") :]
    assert "No space left on device" in error or "inline_container" in error or "os error 28" in error, output
    assert "are free there" in error
    # The launcher's own, if any, comes after it.
    assert "Traceback" not in output[: output.index("error:")]
    steps = whole_steps(place / "run")
    assert steps == [*range(1, steps[-1] + 1)]

    resize("40m")
    code, output = train(1, *words)
    assert code == 0, output
    assert f"at step {steps[-1]} of 24" in output
    assert whole_steps(place / "run") == [*range(1, 25)]


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(tmp_path, disk):
    place, resize = disk
    resize("1m")
    code, output = train(1, "--run_dir", str(place / "run"))
    assert code == 2
    assert "a checkpoint of this run takes about" in output
    assert metrics(place / "run") == []


def test_a_host_without_room_to_stage_saves_at_once_and_says_so_once(tmp_path, disk):
    place, resize = disk
    resize("1m")
    words = ["--checkpoint.staging", str(place), "--checkpoint.every_steps", "4", "--epochs", "1"]
    code, output = train(1, *words, "--run_dir", str(tmp_path / "run"))
    assert code == 0, output
    assert output.count("checkpoints cannot be staged") == 1
    assert whole_steps(tmp_path / "run") == [8, 12]
    assert list(place.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    code, output = train(1, "--run_dir", "/proc/nowhere/run")
    assert code == 2, output
    assert "run_dir='/proc/nowhere/run' is not writable" in output


def hang(number, seconds_ago):
    """Receive two signals while the main thread hangs in C code, as in a collective."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        while signals.received is None:
            time.sleep(0.01)
        signals._at -= seconds_ago
        threading.Thread(target=lambda: (os.kill(os.getpid(), number), time.sleep(1), os._exit(3))).start()
        lock = threading.Lock()
        with lock:
            lock.acquire()


def fork():
    """Have a child process, like a loader with workers, that is not signalled."""
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            os._exit(3)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.2)
        os._exit(0 if ended == -signal.SIGTERM and signals.received is None else 4)


def status_of(function, *args):
    ensure_server()
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    ("number", "seconds_ago", "status"),
    [
        (signal.SIGTERM, 0.0, 3),
        (signal.SIGTERM, 11.0, 143),
        # A launcher forwards Ctrl-C within moments; a person presses it again later.
        (signal.SIGINT, 0.0, 3),
        (signal.SIGINT, 1.5, 130),
    ],
)
def test_a_second_signal_is_an_echo_at_first_and_then_ends_a_rank_at_once(number, seconds_ago, status):
    assert status_of(hang, number, seconds_ago) == status


def heed():
    """Signals ignored because of nohup stay ignored; SIGTERM still works."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        while signals.received is None:
            time.sleep(0.01)
    os._exit(0 if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signals.received is signal.SIGTERM else 4)


def test_a_run_that_was_started_ignoring_the_terminal_s_end_goes_on_ignoring_it():
    assert status_of(heed) == 0


def test_a_forked_child_ends_by_the_signal_and_does_not_speak_for_its_parent():
    assert status_of(fork) == 0
