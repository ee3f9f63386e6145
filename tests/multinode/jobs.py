"""A training job on two hosts: one `accelerate launch` a host, every wait bounded, every output kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.multinode.hosts import CABLE, Host
from tests.train.launching import ROOT, TINY

# Nothing that waits for other ranks may wait for longer.
TIMEOUT = 25
PORT = 29400
# For a wait that ends by itself on an idle machine in a tenth of it.
PATIENCE = 300.0


@dataclass
class Launcher:
    """One host's launcher, and the file that holds what it and its ranks print."""

    host: Host | None
    process: subprocess.Popen
    path: Path

    def output(self) -> str:
        return self.path.read_text(errors="replace")


@dataclass
class Job:
    """The launchers of one start of a run."""

    run_dir: Path
    launchers: list[Launcher] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def output(self) -> str:
        return "\n".join(f"--- {one.path.name}\n{one.output()}" for one in self.launchers)

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that have their final name."""
        names = [path.name for path in (self.run_dir / "checkpoints").glob("step-*")]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def wait_until(self, what: Callable[[], bool], name: str, patience: float = PATIENCE) -> None:
        """Poll until `what` holds; fail with all output where it does not in time, or where a launcher has ended."""
        deadline = time.monotonic() + patience
        while not what():
            ended = [one.path.name for one in self.launchers if one.process.poll() is not None]
            assert not ended, f"{ended} ended before {name}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {patience:.0f} s: {name}\n{self.output()}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until the checkpoint of `step`, or a later one, is whole."""
        self.wait_until(lambda: max(self.checkpoints(), default=0) >= step, f"a checkpoint of step {step}")

    def statuses(self, patience: float = PATIENCE) -> list[int]:
        """Wait for every launcher; its exit status. A job that hangs fails the test with its output."""
        deadline = time.monotonic() + patience
        for one in self.launchers:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"hangs: {one.path.name} after {patience:.0f} s\n{self.output()}") from None
        return [one.process.returncode for one in self.launchers]

    def ranks(self, host: Host) -> list[int]:
        """The training processes on a host, without the launcher and without helpers of theirs."""
        return [pid for pid in host.pids() if _is_rank(pid)]

    def end(self) -> None:
        """Whatever still runs is killed."""
        for one in self.launchers:
            if one.process.poll() is None:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
        for host in {one.host for one in self.launchers if one.host is not None}:
            host.signal_all(signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return b"LOCAL_RANK=" in environment and b"LOCAL_RANK=" not in Path(f"/proc/{parent}/environ").read_bytes()
    except (OSError, IndexError):
        return False


def launch_words(machine: int, machines: int, ranks: int, address: str, config: str, *options: str) -> list[str]:
    """`accelerate launch` for one of the machines."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / config)]
    words += ["--num_machines", str(machines), "--machine_rank", str(machine), "--num_processes", str(ranks)]
    words += ["--main_process_ip", address, "--main_process_port", str(PORT)]
    return [sys.executable, *words, *options]


def launch(
    hosts: Sequence[Host],
    run_dir: Path,
    *words: str,
    config: str = "cpu.yaml",
    options: Sequence[str] = (),
    before: dict[int, list[str]] | None = None,
    machines: int = 2,
    ranks_per_host: int = 1,
    script: Sequence[str] = (str(ROOT / "launch" / "train.py"),),
) -> Job:
    """Start a run on the hosts, one launcher each; they share the run's folder.

    Args:
        hosts: The hosts that come; the first one's address is the rendezvous.
        run_dir: The run's folder.
        words: Further words for `train.py`.
        config: A file of configs/accelerate.
        options: Further options of `accelerate launch`.
        before: Words to put before a host's command, by its place.
        machines: How many hosts the job is told of.
        ranks_per_host: Ranks on each host.
        script: What is launched.
    """
    job = Job(run_dir)
    logs = run_dir.with_name(run_dir.name + "-output")
    logs.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}
    for place, host in enumerate(hosts):
        command = launch_words(place, machines, machines * ranks_per_host, hosts[0].address, config, *options)
        command += [*script, *TINY, "--timeout_seconds", str(TIMEOUT), "--run_dir", str(run_dir), *words]
        path = logs / f"{len(list(logs.iterdir()))}-{host.name}.txt"
        with path.open("w") as file:
            process = subprocess.Popen(
                host.command(*(before or {}).get(place, []), *command),
                env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        job.launchers.append(Launcher(host, process, path))
    return job
