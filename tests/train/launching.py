"""Runs of `launch/train.py` in processes of their own.

`start` forks them from a server that has done the imports, with the environment that `accelerate launch` would make;
`start_by_command` is the user's command itself, which costs seconds more a rank.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch.multiprocessing as mp

from robust_dist.train.metrics import without_measured
from tests.forked import CONTEXT, ROOT, begin, ensure_server
from tests.ranks import rank_environment
from tests.train.under_engines import environment

SCRIPT = str(ROOT / "launch" / "train.py")
# Small enough for a test: 12 optimizer steps an epoch.
TINY = ["--model.name", "resnet8", "--batch_size", "128", "--epochs", "3", "--optimizer.lr", "0.05"]
TINY += ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]


def command(world_size: int, *words: str) -> list[str]:
    """What a user types."""
    train = [SCRIPT, *TINY, *words]
    if world_size == 1:
        return [sys.executable, *train]
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(world_size)]
    return [sys.executable, *launch, *train]


def start_by_command(world_size: int, *words: str) -> subprocess.Popen:
    """The command in a process group of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(world_size, *words), env=env, start_new_session=True, **pipe)


def _script(rank: int, words: list[str], env: dict[str, str]) -> None:
    begin(env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in env else {}))
    # As in a terminal, wherever the tests run: nohup and a background job ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = [SCRIPT, *words]
    runpy.run_path(SCRIPT, run_name="__main__")


def _lead(world_size: int, words: list[str], env: dict[str, str], output: Connection) -> None:
    """Be the process group's first: the only rank, or what starts the ranks and ends all when one of them fails."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    if world_size == 1:
        return _script(0, words, env)
    ranks = mp.start_processes(_script, (words, env), world_size, join=False, start_method="fork")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [os.kill(pid, number) for pid in ranks.pids()])
    while not ranks.join(grace_period=10):
        pass


class Run:
    """A started run, with what `subprocess.Popen` has of methods."""

    def __init__(self, world_size: int, words: list[str], env: dict[str, str]) -> None:
        ensure_server()
        output, theirs = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_lead, args=(world_size, words, env, theirs))
        self._process.start()
        theirs.close()
        # Otherwise `multiprocessing` would wait for it at exit.
        atexit.register(self._end)
        self.args, self.pid = words, self._process.pid
        self.stdout = open(os.dup(output.fileno()), encoding="utf-8")  # noqa: SIM115
        output.close()
        self._text: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def _end(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> None:
        self._text.append(self.stdout.read())
        self.stdout.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until no process of the run can print any more; returns what they printed."""
        if not self._reader.ident:
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait()
        return self._text[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(world_size: int, *words: str) -> Run:
    """The same run as the command's, in processes as real as its: one group, each killable."""
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        env |= environment("cpu") | rank_environment(world_size)
    return Run(world_size, [*TINY, *words], env)


def finish(process: Run | subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Its exit status and what it printed; a run that takes longer is ended."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def train(world_size: int, *words: str) -> tuple[int, str]:
    return finish(start(world_size, *words))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_step(process: Run | subprocess.Popen, run_dir: Path, step: int, timeout: float = 120) -> None:
    """Wait until the checkpoint of `step`, or a later one, is there."""
    deadline = time.monotonic() + timeout
    while newest_step(run_dir) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {timeout} s"
        time.sleep(0.005)


def ranks_of(process: Run | subprocess.Popen) -> list[int]:
    """The pids of the run's ranks: the launcher's children, or the process where it is the only rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children] or [process.pid]


def kill_after(process: Run | subprocess.Popen, run_dir: Path, step: int, timeout: float = 120) -> None:
    """SIGKILL every process of the run once the checkpoint of `step`, or a later one, is there."""
    wait_for_step(process, run_dir, step, timeout)
    # The ranks of a launcher are in sessions of their own, and would train on without it.
    ranks = ranks_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    process.communicate()


def metrics(run_dir: Path) -> list[dict]:
    """The run's rows without the figures that are measured."""
    return [without_measured(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
