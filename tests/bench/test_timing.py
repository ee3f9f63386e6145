"""Contenders take turns, and one that fails does not end the run."""

import math
import os

import pytest
import torch

from robust_dist.bench import timing
from robust_dist.bench.timing import interleaved, pick_device, reason, thread_count


def failing_from(turn):
    calls = []

    def call():
        calls.append(1)
        if len(calls) >= turn:
            raise RuntimeError("no kernel\nfor this device")

    return call


def test_everyone_takes_a_turn_in_every_round():
    order = []
    names = ("a", "b", "c")
    times = interleaved({n: lambda n=n: order.append(n) for n in names}, rounds=3, min_seconds=0, warmup=2)
    assert order == ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + list("abcabcabc")
    assert all(0 <= times[n].low <= times[n].median <= times[n].high for n in names)
    assert all(times[n].cpu >= 0 and times[n].host is None for n in names)


@pytest.mark.parametrize("turn", [1, 3])
def test_one_that_fails_becomes_a_line_whenever_it_fails(turn):
    failures = {}
    calls = {"bad": failing_from(turn), "good": lambda: None}
    assert list(interleaved(calls, rounds=3, min_seconds=0, failures=failures)) == ["good"]
    assert failures == {"bad": "RuntimeError: no kernel"}
    with pytest.raises(RuntimeError, match="no kernel"):
        interleaved({"bad": failing_from(turn)}, rounds=3, min_seconds=0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("No module named 'x.y'", name="x"), "x is not installed"),
        (ImportError("libx.so: no such file"), "cannot be imported: libx.so: no such file"),
        (ValueError("fused=True: not here"), "fused=True: not here"),
        (RuntimeError(), "RuntimeError: no reason given"),
        (KeyError("a" * 300), "KeyError: '" + "a" * 156 + "..."),
    ],
)
def test_a_reason_is_one_line(error, text):
    assert reason(error) == text


def test_threads_hold_for_libraries_too_and_go_back():
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    with thread_count(1):
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == (before, variable)


def test_wrong_devices_and_threads_are_refused_by_name():
    with pytest.raises(ValueError, match="device='gpu0'"):
        pick_device("gpu0")
    with pytest.raises(ValueError, match="threads=0 is below 1"), thread_count(0):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            pick_device("cuda")


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_the_host_by_the_return():
    x = torch.ones(50_000_000, device="cuda")
    times = interleaved({"copy": x.clone}, rounds=3, min_seconds=0.01, device=x.device)["copy"]
    assert times.host is not None
    assert 0 < times.host < times.median
    # 400 MB cannot move faster than at 10 TB/s.
    assert 4e-5 < times.median < 1e-2
    assert not math.isnan(times.cpu)


def test_the_module_names_the_machine():
    assert f"torch {torch.__version__}" in timing.machine()
