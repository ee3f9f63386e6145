"""Runs the parts one after another, each in its own processes, and reports what they found.

A part that dies or hangs does not stop the others.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import robust_dist
from robust_dist.measure.table import table
from robust_dist.ranks.talk import ranks_text
from robust_dist.verify.parts import PARTS, Part

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GRACE = 20.0  # seconds between the ranks' ends of a part
KEPT = 3000  # characters of a failed part's output in the report


@dataclass(frozen=True)
class Ranks:
    """The ranks of a verification, as this process sees them.

    Attributes:
        rank: This process; it starts the part's process of that rank.
        world_size: Number of ranks.
        here: The ranks whose processes this one starts: its own, or all where no launcher started the others.
        store: Shared by all of them.
        env: What their processes need to find each other.
    """

    rank: int
    world_size: int
    here: tuple[int, ...]
    store: "Store"
    env: dict[str, str]


@dataclass
class Outcome:
    """The outcome of a part.

    Attributes:
        part: Its name.
        state: "done", "failed", "hung", or "not run".
        seconds: Its duration.
        claims: In the order in which they were made; for a claim that the ranks share, each rank's, with a key "rank".
        log: The end of its processes' output, if it failed.
    """

    part: str
    state: str
    seconds: float = 0.0
    claims: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it failed, hung, or found something wrong."""
        return self.state in ("failed", "hung") or any(claim["verdict"] == "wrong" for claim in self.claims)

    @property
    def summary(self) -> str:
        """Its state, and the number of claims with each verdict."""
        counts = Counter(claim["verdict"] for claim in self.claims)
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return found if self.state == "done" and found else ", ".join(filter(None, (self.state, found)))


def find_ranks(asked: int | None) -> Ranks:
    """The launcher's ranks; without a launcher as many as asked for, all on this machine.

    Args:
        asked: Number of ranks; None takes one per GPU, or 2 on a machine without GPUs.

    Raises:
        ValueError: Another number than the launcher started.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=120)))
        if asked not in (None, world_size):
            raise ValueError(f"--ranks={asked} is not valid under a launcher, which started {world_size}; leave it out")
        return Ranks(rank, world_size, (rank,), store, {**_AS_CLIENTS})
    count = asked or torch.cuda.device_count() or 2
    hosted = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(hosted.port), "WORLD_SIZE": str(count), **_AS_CLIENTS}
    return Ranks(0, count, tuple(range(count)), hosted, {**env, "LOCAL_WORLD_SIZE": str(count)})


_OF_RANKS = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
_OF_RANKS |= {"MASTER_ADDR", "MASTER_PORT"}
# A part's processes come and go; the store is the launcher's, or this process's, and stays.
_AS_CLIENTS = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def verify(minutes: float, out: Path | None, ranks: Ranks, names: Sequence[str] = ()) -> tuple[int, Path]:
    """Run the parts within the time, and write the report after each.

    Args:
        minutes: For all parts; those left when the time is over are not run.
        out: The report's folder, new or empty; None makes one below runs/verify.
        ranks: From `find_ranks`.
        names: Parts to run; all if empty.

    Returns:
        0, or 1 if anything is wrong, the same on every rank; and the report's folder.

    Raises:
        ValueError: The folder holds something.
    """
    store = dist.PrefixStore("verify/outcomes", ranks.store)  # type: ignore[attr-defined]
    folder = _agreed_folder(store, ranks, out)
    about = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{socket.gethostname()}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs",
        "versions": f"robust_dist {robust_dist.__version__}, torch {torch.__version__}",
        "ranks": ranks.world_size,
    }
    end, outcomes = time.monotonic() + 60 * minutes, []
    for part in PARTS:
        if names and part.name not in names:
            continue
        left = end - time.monotonic()
        # Rank 0's clock decides; otherwise a rank could start a part that another skips.
        runs = _said(store, ranks, f"run/{part.name}", left > 5)
        outcome = Outcome(part.name, "not run")
        if runs:
            mine = _run(part, ranks, folder, min(part.seconds, max(left, 10)))
            outcome = _of_all(store, ranks, part, mine)
        outcomes.append(outcome)
        if ranks.rank == 0:
            write_report(folder, outcomes, about)
            mark = "WRONG" if outcome.is_wrong else "ok" if outcome.state == "done" else "-"
            print(f"{mark:5} {outcome.part}: {outcome.summary} ({outcome.seconds:.0f} s)", flush=True)
    wrong = _said(store, ranks, "wrong", any(outcome.is_wrong for outcome in outcomes))
    return int(wrong), folder


def _agreed_folder(store: "Store", ranks: Ranks, out: Path | None) -> Path:
    """Rank 0's folder, which it makes."""
    problem = folder = ""
    if ranks.rank == 0:
        folder = str((out or Path("runs", "verify", time.strftime("%Y%m%d-%H%M%S"))).expanduser().absolute())
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if any(Path(folder).iterdir()):
                problem = f"--out={folder} is not valid: it holds files already, which stay; name a new folder"
        except OSError as error:
            problem = f"--out={folder} is not valid: {error.strerror or error}"
    folder, problem = _said(store, ranks, "folder", [folder, problem])
    if problem:
        raise ValueError(problem)
    return Path(folder)


def _said(store: "Store", ranks: Ranks, key: str, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.rank == 0:
        store.set(key, json.dumps(value))
        return value
    store.wait([key], timedelta(seconds=max(part.seconds for part in PARTS) * 3))
    return json.loads(store.get(key))


def _run(part: Part, ranks: Ranks, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Run the part on the ranks of this process; returns the outcome of each."""
    if part.ranks == "first" and 0 not in ranks.here:
        return []
    here = (0,) if part.ranks == "first" else ranks.here
    shared = folder / "work" / part.name.replace(" ", "-")
    if part.ranks == "all":
        shared.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="robust-dist-verify-") as own:
        for phase in part.phases:
            states = _phase(part, phase, ranks, here, Path(own), shared, began + seconds)
            if any(state != "done" for state in states.values()):
                break
        found = [
            {
                "rank": rank,
                "state": states[rank],
                "seconds": time.monotonic() - began,
                "claims": _claims(Path(own, f"{rank}.jsonl")),
                "log": "" if states[rank] == "done" else Path(own, f"{rank}.log").read_text("utf-8", "replace")[-KEPT:],
            }
            for rank in here
        ]
    if ranks.rank == 0:
        shutil.rmtree(folder / "work", ignore_errors=True)
    return found


def _phase(
    part: Part, phase: str, ranks: Ranks, here: Sequence[int], own: Path, shared: Path, end: float
) -> dict[int, str]:
    """Start a process per rank, wait for all of them, and return their states."""
    started = {}
    for rank in here:
        env = _environment(part, ranks, rank)
        words = ["--part", part.name, "--phase", phase, "--local-rank", _local(ranks, rank)]
        words += ["--claims", str(own / f"{rank}.jsonl"), "--work", str(shared)]
        with (own / f"{rank}.log").open("ab") as log:
            started[rank] = subprocess.Popen(
                [sys.executable, "-m", "robust_dist.verify", *words],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    wanted = -signal.SIGKILL if phase in part.killed else 0
    with _ended_with_this(started.values()):
        return {rank: _state(process, wanted, end) for rank, process in started.items()}


def _local(ranks: Ranks, rank: int) -> str:
    """The rank's number on its host."""
    return str(rank) if len(ranks.here) > 1 else os.environ.get("LOCAL_RANK", "0")


def _environment(part: Part, ranks: Ranks, rank: int) -> dict[str, str]:
    """The environment of a rank's process in a part; a process that runs alone gets no rank."""
    env = dict(os.environ)
    if part.ranks == "all":
        return env | ranks.env | {"RANK": str(rank), "LOCAL_RANK": _local(ranks, rank)}
    for name in list(env):
        if name in _OF_RANKS or name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")):
            del env[name]
    return env


def _state(process: "subprocess.Popen[bytes]", wanted: int, end: float) -> str:
    try:
        return "done" if process.wait(max(0.1, end - time.monotonic())) == wanted else "failed"
    except subprocess.TimeoutExpired:
        return "hung"


@contextlib.contextmanager
def _ended_with_this(processes: Iterable["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Kill the remaining processes and their children, however the block ends."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _claims(path: Path) -> list[dict[str, Any]]:
    """The claims in a file, without a line that a dying part left incomplete."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _of_all(store: "Store", ranks: Ranks, part: Part, mine: list[dict[str, Any]]) -> Outcome:
    """The outcome of the part on all ranks, as rank 0 knows it."""
    if ranks.rank != 0:
        store.set(f"{part.name}/{ranks.rank}", json.dumps(mine))
        return Outcome(part.name, "done")
    found, silent = list(mine), []
    for rank in () if part.ranks == "first" else sorted({*range(ranks.world_size)} - {*ranks.here}):
        try:
            store.wait([f"{part.name}/{rank}"], timedelta(seconds=part.seconds + GRACE))
            found += json.loads(store.get(f"{part.name}/{rank}"))
        except (RuntimeError, ValueError):
            silent.append(rank)
    claims = [{**claim, "rank": run["rank"]} for run in found for claim in run["claims"]]
    states = {run["state"] for run in found}
    state = next((bad for bad in ("failed", "hung") if bad in states), "failed" if silent else "done")
    logs = [f"rank {run['rank']} {run['state']}:\n{run['log']}" for run in found if run["state"] != "done"]
    if silent:
        logs.append(f"{ranks_text(silent)} did not answer")
    return Outcome(part.name, state, max((run["seconds"] for run in found), default=0.0), claims, "\n".join(logs))


def write_report(folder: Path, outcomes: Sequence[Outcome], about: dict[str, Any]) -> None:
    """Rewrite report.md and report.json atomically; `about` says what was run, and where."""
    data = {**about, "parts": [{**asdict(outcome), "wrong": outcome.is_wrong} for outcome in outcomes]}
    _replace(folder / "report.json", json.dumps(data, indent=1) + "\n")
    _replace(folder / "report.md", _markdown(outcomes, about))


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _markdown(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    lines = ["# Verification", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    parts = [
        (outcome.part, "**wrong**: " * outcome.is_wrong + outcome.summary, f"{outcome.seconds:.0f}")
        for outcome in outcomes
    ]
    lines += [table(["part", "outcome", "s"], parts)]
    for outcome in outcomes:
        if not outcome.claims and not outcome.log:
            continue
        lines += ["", f"## {outcome.part}", ""]
        rows = (map(_cell, row) for row in _merged(outcome.claims))
        lines += [table(["claim", "expected", "measured", "verdict"], rows)]
        if outcome.log:
            lines += ["", "```", outcome.log.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _merged(claims: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: ranks with the same claim share a row, others are named."""
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for claim in claims:
        key = (claim["what"], claim["expected"], claim["measured"], claim["verdict"])
        rows.setdefault(key, []).append(claim.get("rank", 0))
    ranks = {claim.get("rank", 0) for claim in claims}

    def who(of: list[int]) -> str:
        return "" if set(of) == ranks else f" ({ranks_text(set(of))})"

    return [(what + who(of), expected, measured, verdict) for (what, expected, measured, verdict), of in rows.items()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
