"""One host's part of a multi-host job: `accelerate launch`, configured from the environment.

SLURM, Kubernetes' training operator and launch/hosts.sh start this file once per host, with the arguments of
`train.py`: `NODES=2 NODE_RANK=0 MASTER_ADDR=node-a python launch/node.py --config configs/recipes/R.yaml`. The exit
status is that of this host's first failed rank (128 + N for signal N), which `accelerate launch` itself would turn into
1.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# For each setting, its variables; the first one set is used. RANK is a pod's number in a PyTorchJob.
SOURCES = {
    "nodes": ("NODES", "SLURM_JOB_NUM_NODES"),
    "rank": ("NODE_RANK", "SLURM_NODEID", "RANK"),
    "gpus": ("GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
    "address": ("MASTER_ADDR",),
    "port": ("MASTER_PORT",),
}
# For each number passed on: lowest, highest, default. Seconds: up to ten years.
LIMITS = {
    "JOIN_SECONDS": (1, 315_360_000, "600"),
    "RESTARTS": (0, 1_000_000, "0"),
    "GRACE_SECONDS": (0, 315_360_000, "300"),
}
MOST_HOSTS, MOST_RANKS = 100_000, 1_024
# Signals that ask a run to save and exit.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PACKAGES = ("robust_dist", "torch", "torchvision", "accelerate", "deepspeed", "numpy")


class PlaceError(ValueError):
    """The environment does not define this host's place in the job."""


@dataclass(frozen=True)
class Place:
    """This host's place in the job.

    Attributes:
        nodes: Hosts of the job.
        rank: This host's number, from 0.
        gpus: Ranks of each host.
        address: Host 0, as every host can reach it.
        port: A free TCP port of host 0.
    """

    nodes: int
    rank: int
    gpus: int
    address: str
    port: int


class _Reader:
    """Reads environment variables, and collects everything wrong with them for one message."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ, self.problems = environ, list[str]()

    def text(self, names: Sequence[str], default: str | None = None) -> tuple[str, str]:
        """The first variable of `names` that is set, and its value; the first name with the default if none is."""
        for name in names:
            if self.environ.get(name):
                return name, self.environ[name]
        if default is None:
            self.problems.append(f"none of {', '.join(names)} is set: say where this host stands in the job")
        return names[0], default or ""

    def number(self, names: Sequence[str], low: int, high: int, default: str | None = None) -> int:
        """A whole number from `low` to `high`."""
        name, text = self.text(names, default)
        if text.isascii() and text.isdigit() and low <= int(text[:20]) <= high:
            return int(text)
        if text:
            self.problems.append(f"{name}={text!r} is not valid: it must be a whole number from {low} to {high:,}")
        return low

    def check(self) -> None:
        """Raise a PlaceError with everything that is wrong."""
        if self.problems:
            raise PlaceError("\n  ".join(self.problems))


def place(environ: Mapping[str, str]) -> Place:
    """This host's place, from its environment.

    Raises:
        PlaceError: Names every variable that is missing or invalid.
    """
    read = _Reader(environ)
    nodes = read.number(SOURCES["nodes"], 1, MOST_HOSTS, "1")
    rank = read.number(SOURCES["rank"], 0, MOST_HOSTS, "0" if nodes == 1 else None)
    if rank >= nodes:
        name, _ = read.text(SOURCES["rank"])
        read.problems.append(f"{name}={rank} is not valid: a job of {nodes} hosts has 0 to {nodes - 1}")
    found = 0 if any(environ.get(name) for name in SOURCES["gpus"]) else count_gpus()
    gpus = read.number(SOURCES["gpus"], 1, MOST_RANKS, str(found) if found else None)
    _, address = read.text(SOURCES["address"], "127.0.0.1" if nodes == 1 else None)
    port = read.number(SOURCES["port"], 1, 65_535, "29500")
    for name, (low, high, default) in LIMITS.items():
        read.number((name,), low, high, default)
    read.check()
    return Place(nodes, rank, gpus, address, port)


def _limit(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or LIMITS[name][2]


def count_gpus() -> int:
    """GPUs of this host; 0 if there are none."""
    import torch

    return torch.cuda.device_count()


def options(here: Place, environ: Mapping[str, str]) -> list[str]:
    """The arguments of `accelerate launch` before the script.

    `same_network` and the rendezvous are ignored in Accelerate's YAML files, so they are given here.
    """
    engine = environ.get("ENGINE", "ddp")
    config = Path(engine) if engine.endswith((".yaml", ".yml")) else Path(f"configs/accelerate/multinode_{engine}.yaml")
    if not config.is_file():
        known = sorted(path.stem.removeprefix("multinode_") for path in Path("configs/accelerate").glob("multinode_*"))
        raise PlaceError(f"ENGINE={engine!r} is neither a YAML file nor one of {', '.join(known)}")
    ranks = here.nodes * here.gpus
    words = ["--config_file", str(config), "--num_machines", str(here.nodes), "--machine_rank", str(here.rank)]
    words += ["--num_processes", str(ranks), "--main_process_ip", here.address, "--main_process_port", str(here.port)]
    # If a host does not arrive, the others stop waiting after this many seconds.
    words += ["--same_network", "--rdzv_conf", f"timeout={_limit(environ, 'JOIN_SECONDS')}"]
    words += ["--max_restarts", _limit(environ, "RESTARTS")]
    if engine == "hsdp":
        words += ["--parallelism_config_dp_replicate_size", str(here.nodes)]
        words += ["--parallelism_config_dp_shard_size", str(here.gpus)]
    return words


def probe(address: str) -> dict[str, object]:
    """What must be equal on all hosts of a job, a free port here, and whether `address` is valid here."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    alike: dict[str, object] = {"commit": revision, "python": sys.version.split()[0], "gpus": count_gpus()}
    for name in PACKAGES:
        try:
            alike[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            alike[name] = "-"
    try:
        resolves = bool(socket.getaddrinfo(address, None))
    except OSError:
        resolves = False
    with socket.socket() as free:
        free.bind(("", 0))
        return {"alike": alike, "port": free.getsockname()[1], "resolves": resolves}


def _stop_ranks(number: int, grace: float) -> None:
    """Forward a signal to the ranks, which save and exit, and kill the rest later; without ranks, exit here."""
    import psutil

    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if number != signal.SIGKILL:
        timer = threading.Timer(grace, _stop_ranks, (signal.SIGKILL, 0.0))
        timer.daemon = True
        timer.start()


def _watch_signals(grace: float) -> None:
    """Forward stop signals to the ranks, also while this process waits for other hosts in C++."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # nohup and a shell's background jobs start this process with terminal signals ignored.
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda *_: None)

    def listen() -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in heard:
                    _stop_ranks(number, grace)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _watch_input(grace: float) -> None:
    """End this host's part when its standard input closes, as the connection that started it is gone."""

    def listen() -> None:
        while os.read(0, 4096):
            pass
        _stop_ranks(signal.SIGTERM, grace)

    threading.Thread(target=listen, name="input", daemon=True).start()


def launch(here: Place, words: Sequence[str]) -> int:
    """Start this host's ranks and wait for them.

    Args:
        here: This host's place.
        words: Arguments of `accelerate launch`.

    Returns:
        0, the exit status of the first rank here that failed, or 128 + N if signal N ended it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} on {socket.gethostname()} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except DistError as error:
        met = f"{here.nodes} hosts did not meet at {here.address}:{here.port} within JOIN_SECONDS"
        print(f"error: the {met}, or lost each other there: {error}", file=sys.stderr)
        return 1
    return 0


def main(words: Sequence[str] | None = None) -> None:
    """Run this host's part of the job, with the arguments of `train.py`; or answer `probe ADDRESS`."""
    words = sys.argv[1:] if words is None else words
    os.chdir(ROOT)
    if len(words) == 2 and words[0] == "probe":
        print("probe", json.dumps(probe(words[1]), sort_keys=True), flush=True)
        return
    try:
        here = place(os.environ)
        launched = [*options(here, os.environ), str(ROOT / "launch" / "train.py"), *words]
    except PlaceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # torchrun takes its defaults from them; all are removed except this one, which leaves signals to the listener here.
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    grace = float(_limit(os.environ, "GRACE_SECONDS"))
    _watch_signals(grace)
    if os.environ.get("END_WITH_INPUT"):
        _watch_input(grace)
    print(
        f"host {here.rank + 1} of {here.nodes}: {here.gpus} ranks, rendezvous at {here.address}:{here.port}", flush=True
    )
    sys.exit(launch(here, launched))


if __name__ == "__main__":
    main()
