"""What goes wrong between hosts: the run ends with an error in bounded time and goes on as if nothing had been.

Every test brings one fault about in the middle of a run, and fills a row of launch/NODES.md's table.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.multinode.jobs import EVERY, PATIENCE, TIMEOUT, same_run
from tests.train.launching import ROOT

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(1500)]
FAULT_AT = 8
# What a rank says of a peer that is gone or does not answer.
LOST = r"rank \d+ on node-[ab]: (lost another rank|waited in vain for the other ranks)"


class Fault:
    """One fault on one run: what was lost, how long it took, and whether the run is the undisturbed one after it.

    Args:
        cluster: The hosts.
        reference: The folder of an undisturbed run.
        record: pytest's `record_property`.
    """

    def __init__(self, cluster, reference, record):
        self.cluster, self.reference, self.record = cluster, reference, record
        self.job = None
        self.at = self.done = 0

    def start(self, run, *words, **how):
        """Start the run that is to be disturbed, and wait until it is half-way between two checkpoints."""
        self.job = self.cluster.launch(run, *words, **how)
        self.job.wait_for_checkpoint(FAULT_AT)
        self.job.wait_until(lambda: self.job.steps()[-1][0] % EVERY == EVERY // 2, "a step between checkpoints")
        return self.job

    def strikes(self):
        """Now."""
        self.at = time.monotonic()

    def ends_with_error(self, *parts, said=LOST, patience=4 * TIMEOUT + 60):
        """Every launcher (or those named) ends by itself with an error that says what is the matter."""
        statuses = self.job.statuses(patience, parts or None)
        assert 0 not in statuses, self.job.output()
        assert re.search(said, self.job.output()), self.job.output()
        self.record("seconds to end", time.monotonic() - self.at)
        self.done = self.job.steps()[-1][0]

    def goes_on(self, outcome, **how):
        """The same command trains on from the newest whole checkpoint to the undisturbed run's end."""
        again = self.cluster.finish(self.job.run_dir, **how)
        self.is_as_undisturbed(again)
        self.record("outcome", outcome)
        self.record("steps lost", self.done - again.resumed_at())
        self.record("seconds to go on", again.steps()[0][1] - self.at)
        return again

    def is_as_undisturbed(self, job):
        assert same_run(job.run_dir, self.reference), job.output()
        leftovers = [path.name for path in (job.run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not leftovers


@pytest.fixture
def fault(cluster, reference, record_property):
    return Fault(cluster, reference, record_property)


@pytest.mark.fault("a rank is killed (SIGKILL)")
def test_a_killed_rank_ends_the_job_and_it_goes_on(fault):
    job = fault.start("rank-killed")
    fault.strikes()
    os.kill(job.ranks(1)[0], signal.SIGKILL)
    fault.ends_with_error()
    fault.goes_on("both hosts end with an error; the same command goes on, bit for bit")


@pytest.mark.fault("a rank is killed, RESTARTS=1")
def test_the_launchers_restart_a_killed_rank_by_themselves(fault):
    restarts = ["--same_network", "--max_restarts", "1", "--rdzv_conf", "timeout=120"]
    job = fault.start("rank-restarted", options=restarts)
    fault.strikes()
    (killed,) = job.ranks(0)
    done = job.steps()[-1][0]
    os.kill(killed, signal.SIGKILL)
    assert job.statuses() == [0, 0], job.output()
    fault.is_as_undisturbed(job)
    fault.record("outcome", "the launchers start the ranks again, which go on, bit for bit")
    fault.record("steps lost", done - job.resumed_at())
    fault.record("seconds to go on", job.steps()[0][1] - fault.at)


@pytest.mark.fault("a host is lost")
def test_a_lost_host_ends_the_job_and_it_goes_on(fault):
    fault.start("host-lost")
    fault.strikes()
    fault.cluster.hosts[1].signal_all(signal.SIGKILL)
    fault.ends_with_error(0)
    fault.goes_on("the other host ends with an error; the same command goes on, bit for bit")


@pytest.mark.fault("a host is lost, RESTARTS=1")
def test_restarts_do_not_wait_for_ever_for_a_lost_host(fault):
    restarts = ["--same_network", "--max_restarts", "1", "--rdzv_conf", f"timeout={TIMEOUT}"]
    fault.start("host-lost-restarts", options=restarts)
    fault.strikes()
    fault.cluster.hosts[1].signal_all(signal.SIGKILL)
    # Two endings, and the start between them.
    fault.ends_with_error(0, patience=PATIENCE)
    fault.goes_on("the other host starts its ranks again, which wait in vain and end with an error; the same command "
                  "goes on, bit for bit")  # fmt: skip


@pytest.mark.fault("a host is lost while a checkpoint is written")
def test_a_host_lost_in_the_middle_of_a_checkpoint_leaves_no_half_of_one(fault):
    job = fault.start("lost-in-save")
    partial = job.run_dir / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(partial.glob(".step-*.partial")):
        assert time.monotonic() < deadline, job.output()
    fault.strikes()
    fault.cluster.hosts[0].signal_all(signal.SIGKILL)
    fault.ends_with_error(1)
    fault.goes_on("the other host ends with an error; the run goes on from the checkpoint before, bit for bit")


@pytest.mark.fault("a link is cut")
def test_a_cut_link_ends_both_hosts_within_the_timeout(fault):
    fault.start("link-cut")
    fault.strikes()
    fault.cluster.hosts[1].link(up=False)
    fault.ends_with_error()
    fault.cluster.hosts[1].link(up=True)
    fault.goes_on("both hosts end with an error after `timeout_seconds`; the same command goes on, bit for bit")


@pytest.mark.fault("a link is down for seconds, again and again")
def test_a_flapping_link_only_delays_the_run(fault):
    job = fault.start("link-flaps")
    for _ in range(4):
        for up in (False, True):
            fault.cluster.hosts[1].link(up=up)
            time.sleep(1.5)
    assert job.statuses() == [0, 0], job.output()
    fault.is_as_undisturbed(job)
    fault.record("outcome", "goes on by itself, bit for bit")
    fault.record("steps lost", 0)


@pytest.mark.fault("a slow link")
def test_a_slow_link_only_delays_the_run(fault):
    for host in fault.cluster.hosts:
        host.limit("8mbit")
    job = fault.cluster.finish("link-slow", pace=0.0)
    fault.is_as_undisturbed(job)
    fault.record("outcome", "goes on by itself, slower, bit for bit")
    fault.record("steps lost", 0)


@pytest.mark.fault("a link too slow for the timeout")
def test_a_link_that_is_too_slow_is_an_error_within_the_timeout(fault):
    fault.start("link-too-slow")
    fault.strikes()
    for host in fault.cluster.hosts:
        # gloo counts the timeout from one piece to the next: at 40 kbit a step takes a minute, and is no error.
        host.limit("8kbit")
    fault.ends_with_error()
    for host in fault.cluster.hosts:
        host.limit(None)
    fault.goes_on("both hosts end with an error after `timeout_seconds`; the same command goes on, bit for bit")


@pytest.mark.fault("a host hangs (SIGSTOP)")
def test_the_run_goes_on_elsewhere_while_a_host_hangs_and_the_host_ends_when_it_wakes(fault):
    job = fault.start("host-hangs")
    hung = fault.cluster.hosts[1].pids()
    fault.strikes()
    fault.cluster.hosts[1].signal_all(signal.SIGSTOP)
    fault.ends_with_error(0)
    fault.goes_on(
        "the other host ends with an error after `timeout_seconds`; the run goes on without the host, bit for bit; "
        "the host ends with an error when it wakes",
        places=[0],
        machines=1,
        ranks=2,
        options=(),
    )
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    assert 0 not in job.statuses(parts=[1]), job.output()
    fault.is_as_undisturbed(job)


@pytest.mark.fault("the host of rank 0 hangs (SIGSTOP)")
def test_a_run_whose_first_host_hangs_is_not_taken_up_until_that_host_has_let_go(fault):
    job = fault.start("first-hangs")
    hung = fault.cluster.hosts[0].pids()
    fault.strikes()
    fault.cluster.hosts[0].signal_all(signal.SIGSTOP)
    fault.ends_with_error(1)
    # The first rank watches the silent holder for less than a minute; the other one must not give up before.
    patient = ["--timeout_seconds", "120"]
    refused = fault.cluster.launch(job.run_dir, *patient, places=[1], machines=1, ranks=2, options=())
    assert 0 not in refused.statuses(), refused.output()
    assert re.search(r"in use by a live run \(.*node-a", refused.output()), refused.output()
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    assert 0 not in job.statuses(parts=[0]), job.output()
    fault.goes_on(
        "the other host ends with an error after `timeout_seconds`; a new start says that the folder is held by the "
        "first host until that wakes or is gone, then goes on, bit for bit"
    )


@pytest.mark.fault("a host never comes")
def test_a_host_that_never_comes_is_an_error_within_the_set_time(fault):
    options = ["--same_network", "--rdzv_conf", f"timeout={TIMEOUT}"]
    fault.job = fault.cluster.launch("alone", places=[0], options=options)
    fault.strikes()
    assert 0 not in fault.job.statuses(patience=4 * TIMEOUT + 60), fault.job.output()
    assert re.search(r"1/2 clients joined|[Tt]imed out", fault.job.output()), fault.job.output()
    assert not fault.job.run_dir.exists()
    fault.record("outcome", "the hosts that came end with an error after JOIN_SECONDS; nothing was begun")
    fault.record("steps lost", 0)
    fault.record("seconds to end", time.monotonic() - fault.at)


@pytest.fixture
def small_disk(cluster):
    """A file system of 24 MB under the cluster's folder."""
    folder = cluster.folder / "small-disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True, timeout=30)
    yield folder
    cluster.clear()
    subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def fill(folder):
    """Take all of a file system but some kB."""
    with (folder / "filler").open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, max(0, shutil.disk_usage(folder).free - 64 * 1024))


@pytest.mark.fault("the disk is full while a checkpoint is written")
def test_a_full_disk_ends_the_job_and_keeps_the_checkpoints_that_were_there(fault, small_disk):
    job = fault.start(small_disk / "disk-full")
    fault.strikes()
    fill(small_disk)
    there = job.checkpoints()
    fault.ends_with_error(said=r"No space left on device|PytorchStreamWriter failed|disk")
    assert set(there) <= set(job.checkpoints()) or max(job.checkpoints()) >= max(there)
    (small_disk / "filler").unlink()
    fault.goes_on("both hosts end with an error that names it; with room again it goes on, bit for bit")


@pytest.mark.fault("the newest checkpoint is torn")
def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(fault):
    job = fault.start("torn")
    fault.strikes()
    fault.done = job.steps()[-1][0]
    job.end()
    newest = max(job.checkpoints())
    weights = job.run_dir / "checkpoints" / f"step-{newest:08d}" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    again = fault.goes_on("it is named and passed over; the run goes on from the one before, bit for bit")
    assert re.search(rf"skipping checkpoint.*step-{newest:08d}/model.safetensors", again.output()), again.output()
    assert again.resumed_at() == newest - EVERY


@pytest.mark.fault("a second job on the run's folder, from another host")
def test_a_second_job_is_refused_and_the_first_is_not_disturbed(fault, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    # The first job rests at the gate for as long as the second one takes to start.
    job = fault.cluster.launch("shared", "--timeout_seconds", "240", env={"REST_WHILE": str(gate)})
    job.wait_until(lambda: bool(job.steps()), "the first step")
    fault.strikes()
    second = fault.cluster.launch(job.run_dir, places=[1], machines=1, options=())
    assert 0 not in second.statuses(), second.output()
    assert re.search(r"in use by a live run \(.*node-a", second.output()), second.output()
    fault.record("seconds to end", time.monotonic() - fault.at)
    gate.unlink()
    assert job.statuses() == [0, 0], job.output()
    fault.is_as_undisturbed(job)
    fault.record("outcome", "the second is refused by the name of the first one's host; the first is as undisturbed")
    fault.record("steps lost", 0)


@pytest.mark.fault("clocks an hour apart")
def test_clocks_an_hour_apart_change_nothing(fault):
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    path = f"PYTHONPATH={Path(__file__).with_name('fast_clock')}:{ROOT}"
    fast = {1: ["env", path, "DONT_FAKE_MONOTONIC=1", "faketime", "-f", "+1h"]}
    job = fault.start("clocks", before=fast)
    fault.done = job.steps()[-1][0]
    fault.strikes()
    job.end()
    # The host with the fast clock is now the first one, which writes.
    outcome = "both hosts train and go on, whichever writes, bit for bit"
    fault.goes_on(outcome, places=[1, 0], before=fast)
