"""launch/hosts.sh and launch/slurm.sbatch start real runs on two hosts, over stand-ins for ssh and srun."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.fakes import SCONTROL, SRUN, write
from tests.multinode.hosts import CABLE
from tests.multinode.jobs import PATIENCE, TIMEOUT, WORDS, Job, Part, same_run
from tests.train.launching import ROOT, TINY

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(1500)]


def reaching(hosts, words):
    """A script that runs `words` on the host that its first argument names, by name or number."""
    cases = [f"{place}|{host.name}) exec {shlex.join(host.command())} {words} ;;" for place, host in enumerate(hosts)]
    return "\n".join(["#!/bin/bash", 'to="$1"; shift', 'case "$to" in', *cases, "esac", ""])


class Scripts:
    """The launch scripts on two hosts.

    Args:
        cluster: The hosts.
        folder: Where the stand-ins lie.
    """

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.processes = []
        self.ssh, self.on_host = (reaching(cluster.hosts, words) for words in ('bash -c "$1"', '"$@"'))
        (folder / "bin").mkdir()
        write(folder / "bin" / "srun", SRUN)
        write(folder / "bin" / "scontrol", SCONTROL)
        self.env = os.environ | {
            "STATE": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "TASK_PREFIX": str(write(folder / "on-host", self.on_host)),
            "SSH": str(write(folder / "ssh", self.ssh)),
            "NODE_NAMES": " ".join(host.name for host in cluster.hosts),
            "REMOTE_PYTHON": sys.executable,
            "PYTHON": sys.executable,
            "PASS": "GLOO_SOCKET_IFNAME PYTHONPATH",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": CABLE,
            "GPUS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "JOIN_SECONDS": "200",
        }

    def start(self, script, *words, **env):
        run_dir = self.cluster.folder / f"run-of-{self.folder.name}"
        output = self.folder / f"output-{len(self.processes)}.txt"
        hosts = ["node-a,node-b"] if script == "hosts.sh" else []
        words = [*hosts, *TINY, *WORDS, "--run_dir", str(run_dir), *words]
        with output.open("w") as file:
            process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / script), *words],
                env=self.env | env,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)
        parts = [Part(host, process, output) for host in self.cluster.hosts]
        return Job(run_dir, output, parts[:1]), parts

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def scripts(cluster, tmp_path):
    made = Scripts(cluster, tmp_path)
    yield made
    made.end()
    for host in cluster.hosts:
        host.signal_all(signal.SIGKILL)


def test_ssh_hosts_train_together_and_start_again_after_a_lost_rank(scripts, reference):
    job, parts = scripts.start("hosts.sh", RETRIES="1")
    job.wait_for_checkpoint(8)
    os.kill(Job(job.run_dir, job.counts, parts).ranks(1)[0], signal.SIGKILL)
    assert job.statuses() == [0], job.output()
    output = job.output()
    assert "2 hosts, alike: {" in output
    assert "ended with status" in output
    assert "starting all hosts again" in output
    assert "[node-a] host 1 of 2: 1 ranks" in output
    assert "[node-b] host 2 of 2: 1 ranks" in output
    assert job.resumed_at() >= 8
    assert same_run(job.run_dir, reference), output


@pytest.mark.parametrize("place", [0, 1])
def test_a_host_whose_peer_never_comes_says_so_within_the_set_time(scripts, place):
    host = scripts.cluster.hosts[place]
    env = {"NODES": "2", "NODE_RANK": str(place), "MASTER_ADDR": "node-a", "JOIN_SECONDS": "10"}
    command = host.command(sys.executable, str(ROOT / "launch" / "node.py"), "--epochs", "1")
    done = subprocess.run(command, env=scripts.env | env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1, done.stderr
    assert "error: the 2 hosts did not meet at node-a:29500 within JOIN_SECONDS" in done.stderr


def test_a_users_mistake_on_ssh_hosts_ends_with_its_status_and_no_second_start(scripts):
    job, _ = scripts.start("hosts.sh", "--optimizer.lr", "-1", RETRIES="3")
    assert job.statuses() == [2], job.output()
    assert "optimizer.lr" in job.output()
    assert "starting all hosts again" not in job.output()


def test_the_end_of_the_script_ends_the_ranks_of_all_hosts(scripts):
    job, parts = scripts.start("hosts.sh", "--epochs", "400", GRACE_SECONDS="20")
    job.wait_for_checkpoint(4)
    scripts.processes[0].send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(part.host.pids() for part in parts):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.2)


def test_a_slurm_job_saves_before_its_time_limit_and_goes_on_when_it_is_queued_again(scripts, reference):
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT)}
    job, _ = scripts.start("slurm.sbatch", **slurm)
    job.wait_for_checkpoint(8)
    scripts.processes[0].send_signal(signal.SIGUSR1)
    assert job.statuses(patience=PATIENCE + TIMEOUT) == [75], job.output()
    asked = (scripts.folder / "scontrol").read_text().splitlines()
    assert asked == ["show hostnames node-[a-b]", "requeue 4711"]
    again, _ = scripts.start("slurm.sbatch", **slurm)
    assert again.statuses() == [0], again.output()
    assert "finished" in again.output()
    assert again.resumed_at() >= 8
    assert same_run(job.run_dir, reference), again.output()
    assert (scripts.folder / "scontrol").read_text().count("requeue") == 1
