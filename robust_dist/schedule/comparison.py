"""Compares the ranks at the same optimizer step, without making any of them wait."""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from robust_dist.ranks.talk import differences

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TRIGGERS = ("at a step", "any rank's", "all ranks'", "the majority's")
# Base decays listed in a message.
_SHOWN = 26
# Seconds between comparisons, which is about the time to detect a difference; more with thousands of ranks.
_PAUSE = 1.0
_RANKS_A_SECOND = 1000
# Steps after a comparison in which every step checks whether another rank has found a difference.
_WATCHED = 4
# Steps for which an unconfirmed difference prevents others from being raised.
_OPEN = 64
# Comparisons whose reports are remembered and whose keys stay in the store.
_KEPT = 32
# Seconds that ranks wait for each other to raise together, and the number of rounds.
_PATIENCE, _ROUNDS = 1.0, 8


class RankDisagreementError(RuntimeError):
    """The ranks' schedules differ; the message lists every rank's values."""


@dataclass(frozen=True)
class Report:
    """The values that must be equal on all ranks at the same optimizer step."""

    total_steps: int
    off_at: float
    step: int
    trigger: str
    decay_is_off: bool
    base_weight_decay: tuple[float, ...]

    def encode(self) -> str:
        """JSON of strings by name, equal for equal reports; decays after the 26th are in a checksum."""
        decays = self.base_weight_decay
        rest = decays[_SHOWN:]
        checksum = f" and {len(rest)} more (checksum {zlib.crc32(repr(rest).encode())})" if rest else ""
        values = {
            "total_steps": self.total_steps,
            "off_at": self.off_at,
            "step": self.step,
            "trigger": self.trigger,
            "weight_decay": "off" if self.decay_is_off else "on",
            "num_groups": len(decays),
            "base_weight_decay": f"{list(decays[:_SHOWN])}{checksum}",
        }
        return json.dumps({name: str(value) for name, value in values.items()})


class Comparison:
    """One rank's part in comparing reports step by step, through its own part of the store.

    The first rank to reach a step posts its report under the step's number, with the number of the next step to
    compare; the others find it there. A rank that finds a different report opens a dispute: every rank that sees it
    publishes its report of the disputed step, and the dispute is confirmed once two of them differ. So the report of a
    rank that has ended since is not enough to raise.

    Ranks raise together, so that none hangs in a collective that another has left: a rank that sees a confirmed dispute
    continues to its next step and meets the others there. Gradients are averaged between two steps, so by then all
    ranks know. If they do not, it waits a second, continues for a step and tries again; after `_ROUNDS` rounds it
    raises alone. Every method raises RuntimeError if the store's host has ended.
    """

    def __init__(self, store: "Store", num_ranks: int) -> None:
        self._store, self._rank = store, dist.get_rank()
        self._pause = max(_PAUSE, num_ranks / _RANKS_A_SECOND)
        self._step = self._due = 0
        self._compared = self._checked = time.monotonic()
        self._last = 0
        self._reports: dict[int, str] = {}
        self._posted: list[str] = []
        self._dispute: int | None = None
        self._published: int | None = None
        self._confirmed: tuple[int, float] | None = None
        self._rounds = 0
        store.add("members", 1)

    def step(self, report: Callable[[], Report], closely: bool) -> None:
        """Count an optimizer step, and compare it if it is due.

        Args:
            report: Returns this rank's values at the step.
            closely: Whether to compare even if it is not due.

        Raises:
            RankDisagreementError: Ranks differed at an earlier step.
        """
        if self._check_is_due():
            self._check_for_dispute()
        if self._is_time_to_meet() and self._all_met():
            raise self._error()
        if closely or self._step in (self._due, self._dispute):
            self._compare(report().encode())
        self._step += 1

    def _compare(self, mine: str) -> None:
        step, is_due = self._step, self._step == self._due
        self._reports[step] = mine
        post = f"{self._next_due() if is_due else self._due} {mine}"
        found = self._store.compare_set(f"step/{step}", "", post).decode()
        due, theirs = found.split(" ", 1)
        if is_due:
            self._due = int(due)
        self._last, self._compared = step, time.monotonic()
        if theirs != mine:
            self._open_dispute()
        elif step == self._dispute:
            self._publish()
        self._clean(f"step/{step}" if found == post else None)

    def _next_due(self) -> int:
        """The step about a pause from now; the first steps are compared more often."""
        seconds = max(time.monotonic() - self._compared, 1e-6)
        in_a_pause = int((self._step - self._last) / seconds * self._pause)
        return self._step + max(1, min(in_a_pause, self._step + 1))

    def _clean(self, posted: str | None) -> None:
        """Drop old reports, and delete this rank's keys; those of the first step are kept for late ranks."""
        if len(self._reports) > _KEPT:
            del self._reports[list(self._reports)[1]]
        if posted is not None:
            self._posted.append(posted)
            if len(self._posted) > _KEPT:
                self._store.delete_key(self._posted.pop(1))

    def _check_is_due(self) -> bool:
        is_open = self._dispute is not None and self._step <= self._dispute + _OPEN
        is_watched = 0 < self._step <= self._last + _WATCHED
        return is_open or is_watched or time.monotonic() - self._checked > self._pause / 2

    def _check_for_dispute(self) -> None:
        self._checked = time.monotonic()
        if not self._store.check(["dispute"]):
            return
        self._join(int(self._store.get("dispute")))
        key = f"{self._dispute}/confirmed"
        if self._confirmed is None and self._store.check([key]):
            self._confirmed = int(self._store.get(key)), time.monotonic()

    def _open_dispute(self) -> None:
        known = self._dispute
        if known is None or self._step > known + _OPEN:
            expected = "" if known is None else str(known)
            self._join(int(self._store.compare_set("dispute", expected, str(self._step))))

    def _join(self, dispute: int) -> None:
        if dispute != self._dispute:
            self._dispute, self._confirmed = dispute, None
        self._publish()

    def _publish(self) -> None:
        """Publish, once, this rank's report of the disputed step; the second different report confirms the dispute."""
        at = self._dispute
        if at == self._published or at not in self._reports:
            return
        self._published = at
        mine = self._reports[at]
        digest = f"{zlib.crc32(mine.encode()):x}"
        self._store.compare_set(f"{at}/report/{digest}", "", mine)
        self._store.append(f"{at}/who", f"{self._rank} {digest} ")  # type: ignore[attr-defined]
        if self._store.add(f"{at}/count/{digest}", 1) == 1 and self._store.add(f"{at}/kinds", 1) == 2:
            self._store.set(f"{at}/confirmed", str(self._step))
            self._confirmed = self._step, time.monotonic()

    def _is_time_to_meet(self) -> bool:
        if self._confirmed is None:
            return False
        step, seen = self._confirmed
        return self._step > step or time.monotonic() - seen > _PATIENCE

    def _all_met(self) -> bool:
        """Whether all participating ranks have arrived, or this one has waited long enough."""
        here, done = f"{self._dispute}/here", f"{self._dispute}/all here"
        end = time.monotonic() + _PATIENCE
        members = self._store.add("members", 0)
        complete = self._store.add(here, 1) >= members
        while not complete and time.monotonic() < end:
            complete = self._store.check([done])
            time.sleep(0.01)
        if not complete:
            self._rounds += 1
            # The last rank may have arrived as this one left.
            complete = self._store.add(here, -1) >= members - 1 or self._rounds == _ROUNDS
        if complete:
            self._store.set(done, "1")
        return complete

    def _error(self) -> RankDisagreementError:
        words = self._store.get(f"{self._dispute}/who").decode().split()
        texts = {digest: self._store.get(f"{self._dispute}/report/{digest}").decode() for digest in set(words[1::2])}
        reports = {int(rank): texts[digest] for rank, digest in zip(words[::2], words[1::2], strict=True)}
        return disagreement(reports, "during the run" if self._dispute else "at the start")


def disagreement(reports: Mapping[int, str], when: str) -> RankDisagreementError:
    """The error for differing reports, given as texts by global rank, "at the start" or "during the run"."""
    lines = differences({rank: json.loads(text) for rank, text in reports.items()})
    return RankDisagreementError(
        f"the ranks' schedules differ {when}; give every rank the same settings, param groups and checkpoint, and call "
        "step() after every optimizer step on every rank (or pass process_group, if not all ranks share a schedule):"
        "\n  " + "\n  ".join(lines)
    )
