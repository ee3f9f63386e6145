"""A training job on hosts of `tests.multinode.hosts`: one launcher a host, every wait bounded, every output kept."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.multinode.hosts import CABLE, Host
from tests.train.launching import ROOT, TINY, metrics

# No rank waits for longer for the others.
TIMEOUT = 25
PORT = 29400
# For waits that end by themselves in a tenth of it on an idle machine.
PATIENCE = 300.0
EPOCHS, STEPS, EVERY = 4, 48, 4
WORDS = ["--epochs", str(EPOCHS), "--checkpoint.every_steps", str(EVERY), "--timeout_seconds", str(TIMEOUT)]
TRAIN = str(ROOT / "launch" / "train.py")


@dataclass
class Part:
    """One host's launcher, and the file that holds what it and its ranks print."""

    host: Host
    process: subprocess.Popen
    path: Path

    def output(self) -> str:
        return self.path.read_text(errors="replace")


@dataclass
class Job:
    """One start of a run.

    Attributes:
        run_dir: The run's folder, which the hosts share.
        counts: Where the ranks note their steps, without the rank's number.
        parts: One a host.
    """

    run_dir: Path
    counts: Path
    parts: list[Part] = field(default_factory=list)

    def output(self) -> str:
        return "\n".join(f"--- {part.path.name}\n{part.output()}" for part in self.parts)

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that have their final name, oldest first."""
        names = [path.name for path in (self.run_dir / "checkpoints").glob("step-*")]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def wait_until(self, what: Callable[[], bool], name: str, patience: float = PATIENCE) -> None:
        """Poll until `what` holds; fail with all output where it does not in time, or where a launcher has failed."""
        deadline = time.monotonic() + patience
        while not what():
            failed = [part.path.name for part in self.parts if part.process.poll()]
            assert not failed, f"{failed} failed before {name}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {patience:.0f} s: {name}\n{self.output()}"
            time.sleep(0.05)

    def wait_for_checkpoint(self, step: int) -> None:
        """Until the checkpoint of `step`, or a later one, is whole."""
        self.wait_until(lambda: max(self.checkpoints(), default=0) >= step, f"a checkpoint of step {step}")

    def statuses(self, patience: float = PATIENCE, parts: Sequence[int] | None = None) -> list[int]:
        """Wait for launchers to end; a job that hangs fails the test with its output.

        Args:
            patience: Seconds for all of them.
            parts: Which ones; all where None.
        """
        deadline = time.monotonic() + patience
        chosen = self.parts if parts is None else [self.parts[place] for place in parts]
        for part in chosen:
            try:
                part.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"hangs: {part.path.name} after {patience:.0f} s\n{self.output()}") from None
        return [part.process.returncode for part in chosen]

    def ranks(self, place: int) -> list[int]:
        """The training processes of one host, without its launcher and without their own helpers."""
        return [pid for pid in self.parts[place].host.pids() if _is_rank(pid)]

    def steps(self, rank: int = 0) -> list[tuple[int, float]]:
        """(step, monotonic seconds) of every optimizer step of the rank's last process in this start."""
        path = Path(f"{self.counts}.{rank}")
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        began = self.resumed_at() or 0
        return [(began + int(count), float(at)) for pid, count, at in lines if pid == lines[-1][0]]

    def resumed_at(self) -> int | None:
        """The step from which this start (or its launcher's last restart) went on."""
        found = re.findall(r"resuming \S+ at step (\d+)", self.output())
        return int(found[-1]) if found else None

    def end(self) -> None:
        """Whatever still runs is killed."""
        for part in self.parts:
            if part.process.poll() is None:
                os.killpg(part.process.pid, signal.SIGKILL)
                part.process.wait()
        for host in {part.host for part in self.parts}:
            host.signal_all(signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        mine, its = (b"LOCAL_RANK=" in Path(f"/proc/{one}/environ").read_bytes() for one in (pid, parent))
    except (OSError, IndexError):
        return False
    return mine and not its


class Cluster:
    """Two hosts, and the jobs that were started on them.

    Args:
        hosts: The hosts.
        folder: Where run folders and outputs go.
    """

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.jobs: list[Job] = []
        self.starts = 0

    def launch(
        self,
        run: str | Path,
        *words: str,
        places: Sequence[int] = (0, 1),
        machines: int = 2,
        ranks: int = 1,
        config: str = "multinode_ddp.yaml",
        options: Sequence[str] = ("--same_network",),
        before: dict[int, Sequence[str]] | None = None,
        pace: float = 0.05,
        env: dict[str, str] | None = None,
    ) -> Job:
        """Start a run, one `accelerate launch` a host.

        Args:
            run: The run's folder, or its name under the cluster's folder.
            words: Further words for `train.py`.
            places: The hosts that take part; the first one's address is the rendezvous.
            machines: How many hosts the launchers are told of.
            ranks: Ranks on each host.
            config: A file of configs/accelerate.
            options: Further options of `accelerate launch`.
            before: Words to put before a host's command.
            pace: Seconds that every rank rests after a step.
            env: Further environment of all hosts.
        """
        run_dir = self.folder / run
        self.starts += 1
        mark = self.folder / f"output-{self.starts}-{run_dir.name}"
        job = Job(run_dir, mark.with_name(mark.name + "-steps"))
        self.jobs.append(job)
        address = self.hosts[places[0]].address
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}
        ours |= {"COUNT_TO": str(job.counts), "PACE": str(pace), **(env or {})}
        for rank, place in enumerate(places):
            host = self.hosts[place]
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(ROOT / "configs" / "accelerate" / config), *options]
            command += ["--num_machines", str(machines), "--machine_rank", str(rank)]
            command += ["--num_processes", str(machines * ranks), "--main_process_ip", address]
            command += ["--main_process_port", str(PORT), "-m", "tests.multinode.counted", TRAIN]
            command += [*TINY, *WORDS, "--run_dir", str(run_dir), *words]
            path = Path(f"{mark}-{host.name}.txt")
            with path.open("w") as file:
                process = subprocess.Popen(
                    host.command(*(before or {}).get(place, []), *command),
                    env=os.environ | ours,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=ROOT,
                )
            job.parts.append(Part(host, process, path))
        return job

    def finish(self, run: str | Path, *words: str, **how: object) -> Job:
        """Start a run and wait for its good end."""
        job = self.launch(run, *words, **how)  # type: ignore[arg-type]
        assert set(job.statuses()) == {0}, job.output()
        return job

    def clear(self) -> None:
        """End all jobs, and mend the cable."""
        for job in self.jobs:
            job.end()
        self.jobs.clear()
        for host in self.hosts:
            host.link(up=True)
            host.limit(None)


def weights_crc(run_dir: Path) -> int:
    """The CRC-32 of the last checkpoint's weights."""
    from robust_dist.checkpoint.store import file_crc32

    return file_crc32(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def same_run(run_dir: Path, reference: Path) -> bool:
    """Whether two finished runs recorded the same and ended with the same bits."""
    return metrics(run_dir) == metrics(reference) and weights_crc(run_dir) == weights_crc(reference)
