"""A rank of the run, and the report of its end: every error once, and the first cause before its consequences.

A rank that fails writes RUN/errors/rank-N.json. Ranks that then lose it raise connection errors of their own; these are
recognised by their text, not by clocks, which differ between hosts, and each of these ranks prints one line naming the
rank that failed first, or those that left no record.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from robust_dist.checkpoint import write_atomically
from robust_dist.documents import read_json
from robust_dist.private import hidden_text
from robust_dist.ranks.talk import Origin, ranks_text

# "failed": on its own. "hang": ended by its watchdog. "lost": lost a peer. "waited": for a peer, until the timeout.
Kind = Literal["failed", "hang", "lost", "waited"]
_CAUSES: tuple[Kind, ...] = ("failed", "hang")
SECONDS_FOR_WORD = 3.0
_WAITED = re.compile(
    r"Timed out waiting \d+ ?ms|timed out after waiting|wait timeout after|socket has timed out|Socket Timeout"
    r"|waiting for clients|Application timeout caused pair closure"
    r"|Watchdog caught collective operation timeout|ran for \d+ milliseconds before timing out",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection closed|Connection refused|Connection was likely closed|Broken pipe"
    r"|recvValue failed|failed to recv, got 0 bytes|Failed to (connect|recv|send)|connectFullMesh failed"
    r"|ncclRemoteError|remote process exited|NCCL communicator (was )?aborted",
    re.IGNORECASE,
)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


@dataclass
class Rank:
    """One rank of the run, as given by its launcher's environment before there is a process group.

    Attributes:
        number: 0 to world_size - 1.
        world_size: Number of ranks.
        host: The machine's name.
        folder: The run's folder, None until it is claimed.
    """

    number: int = field(default_factory=lambda: _number("RANK", 0))
    world_size: int = field(default_factory=lambda: _number("WORLD_SIZE", 1))
    host: str = field(default_factory=socket.gethostname)
    folder: Path | None = None

    def claimed(self, folder: Path) -> None:
        """Called once the run's folder belongs to this run."""
        self.folder = folder

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"


@dataclass(frozen=True)
class Record:
    """The content of RUN/errors/rank-N.json.

    Attributes:
        rank: The rank that wrote it.
        host: Its machine.
        kind: Whether the error is a cause or follows from another rank's.
        type: The exception's type.
        message: The exception's message.
        traceback: The rank's own, or empty.
        time: ISO 8601, by the host's clock.
    """

    rank: int
    host: str
    kind: Kind
    type: str
    message: str
    traceback: str
    time: str

    @property
    def summary(self) -> str:
        """One line."""
        message = self.message.strip().partition("\n")[0]
        what = {"hang": "hangs", "failed": f"failed: {self.type}"}.get(self.kind, "lost another rank")
        return f"rank {self.rank} on {self.host} {what}: {message}"


def kind_of(error: BaseException) -> Kind:
    """Whether an error says that another rank is gone or silent, or is this rank's own."""
    # Torch's transports raise RuntimeErrors; an OSError about a connection comes from a file system or a Hub.
    if not isinstance(error, RuntimeError) or type(error).__module__.startswith("robust_dist"):
        return "failed"
    text = str(error)
    return "waited" if _WAITED.search(text) else "lost" if _LOST.search(text) else "failed"


def record_failure(error: BaseException, rank: Rank, kind: Kind | None = None, origin: Origin | None = None) -> Record:
    """Record why this rank ends, for other ranks and later readers; never raises because of the disk."""
    own = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    record = Record(
        rank=rank.number,
        host=rank.host,
        kind=kind or kind_of(error),
        type=type(error).__name__,
        message=hidden_text(str(error)),
        traceback=hidden_text(own if origin is None else origin.traceback),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    if rank.folder is not None:
        with contextlib.suppress(OSError):
            folder = rank.folder / "errors"
            # Do not recreate a run folder that was removed.
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"rank-{rank.number}.json", json.dumps(asdict(record), indent=1) + "\n")
    return record


def read_records(run_dir: str | Path) -> list[Record]:
    """The records of a run's last start, first cause first; unreadable files are skipped."""
    records: list[Record] = []
    for path in sorted(Path(run_dir, "errors").glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            records.append(read_json(path, Record))
    order = ("failed", "hang", "lost", "waited")
    return sorted(records, key=lambda record: (order.index(record.kind), record.time, record.rank))


def set_aside(run_dir: str | Path) -> None:
    """Move an earlier start's records into a folder of their own, so that none is taken for one of this start."""
    folder = Path(run_dir, "errors")
    old = sorted(folder.glob("rank-*.json"))
    if old:
        aside = folder / time.strftime("before-%Y%m%d-%H%M%S")
        aside.mkdir(exist_ok=True)
        for path in old:
            path.replace(aside / path.name)


def explain_loss(rank: Rank, loss: Record, seconds: float = SECONDS_FOR_WORD) -> str:
    """One line from a rank that lost the others: the cause.

    `loss` is the rank's own record; it waits `seconds` for the record of a rank that failed on its own.
    """
    cause = _await_cause(rank, seconds)
    if cause is not None:
        return f"{rank}: stopped, because {cause.summary} (see errors/rank-{cause.rank}.json)"
    said = f"{loss.message.strip().splitlines()[0]} (see errors/rank-{rank.number}.json)"
    begun = "waited in vain for the other ranks" if loss.kind == "waited" else "lost another rank"
    if rank.folder is None:
        return f"{rank}: {begun} before the run began: {loss.message.strip()}"
    heard = {record.rank for record in read_records(rank.folder)}
    silent = [number for number in range(rank.world_size) if number not in heard]
    if not silent:
        return f"{rank}: {begun}, as did every rank: check the network between the hosts: {said}"
    why = "stopped, stuck, or cut off" if loss.kind == "waited" else "killed (out of memory?), or cut off"
    return f"{rank}: {begun}; {ranks_text(silent)} left no record: {why}. The error: {said}"


def _await_cause(rank: Rank, seconds: float) -> Record | None:
    deadline = time.monotonic() + seconds
    while rank.folder is not None:
        records = [record for record in read_records(rank.folder) if record.rank != rank.number]
        if records and records[0].kind in _CAUSES:
            return records[0]
        if time.monotonic() >= deadline or len(records) == rank.world_size - 1:
            return None
        time.sleep(0.1)
    return None


def tell_launcher(summary: str, details: str, *, cause: bool = True) -> None:
    """Write the file from which torchrun and `accelerate launch` build their summary, if they asked for one.

    `summary` is one line, `details` are shown with it; `cause=False` means that another rank's error caused this one.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    summary, details = hidden_text(summary), hidden_text(details)
    if path:
        # In whole seconds; the earliest is taken as the root cause, and the lowest rank among equals.
        extra = {"py_callstack": details, "timestamp": str(int(time.time()) + (not cause))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": summary, "extraInfo": extra}}), encoding="utf-8")


def report_shared(error: BaseException, origin: Origin, rank: Rank) -> None:
    """Report once why all ranks end with the same error; its rank of origin does so."""
    if rank.number == origin.rank:
        record_failure(error, rank, "failed", origin)
        said = hidden_text(origin.traceback)
        print(f"\n{rank} failed, and with it the run:\n{said}", end="", file=sys.stderr, flush=True)
    summary = f"rank {origin.rank} on {origin.host} failed: {type(error).__name__}: {error}"
    here = rank.number == origin.rank
    tell_launcher(summary, origin.traceback if here else summary, cause=here)


def report_failure(error: BaseException, rank: Rank) -> None:
    """Report on this rank's stderr why it ends: a traceback if the error is its own, else one line."""
    record = record_failure(error, rank)
    if record.kind in _CAUSES:
        place = "" if rank.folder is None else f" (also in {rank.folder / 'errors' / f'rank-{rank.number}.json'})"
        print(f"\n{rank} failed{place}:\n{record.traceback}", end="", file=sys.stderr, flush=True)
        tell_launcher(record.summary, record.traceback)
        return
    # The launcher may end this process while it waits for the others' reports.
    tell_launcher(record.summary, record.summary, cause=False)
    line = explain_loss(rank, record)
    print(line, file=sys.stderr, flush=True)
    tell_launcher(line, line, cause=False)
