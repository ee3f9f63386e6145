"""Agreement with the other ranks that schedule the same optimizer: when they compare values and vote."""

import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from robust_dist.ranks.talk import taking_part
from robust_dist.schedule.comparison import Comparison, RankDisagreementError, Report
from robust_dist.schedule.hooks import shape_on_every_rank

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Seconds within which a rank that has started to decide, with two calls of the store, must finish.
_DECIDING = 30.0
# Seconds for which a save waits for votes that are about to be cast.
_PATIENCE = 5.0
# Follows the number of a call in which a rank votes yes, until the vote is cast.
_VOTING = 1
# Steps after which votes without a decision are deleted.
_KEPT = 1024
# Consecutive calls of a schedule without an optimizer step after which the calls are counted instead (CUDA graphs).
_IDLE = 8
_NAMESPACE = "robust_dist"
# Timeout in seconds of a call on our own connection to the store.
_TIMEOUT = 30.0
_opened: "tuple[weakref.ref[Any], Store | None] | None" = None
_begun: "Counter[str]" = Counter()
_peers: "weakref.WeakKeyDictionary[Optimizer, Peers]" = weakref.WeakKeyDictionary()


class Vote:
    """One rank's part in deciding, through a store, from which call on all ranks switch.

    Every rank votes in each of its calls, which have the same numbers on all ranks. A decision takes effect from the
    call after the one reached by the foremost rank. No rank can have passed that call: each rank notes its call before
    it looks for a decision, and the deciding rank announces that it is deciding before it reads these notes. If ranks
    are in step, this is the call after the first with enough votes.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._since = 0
        self._number = 1
        self._voted: list[str] = []
        self._known = False

    def forget(self) -> None:
        """Ignore the decisions made so far, e.g. after a load."""
        self._since = self.calls

    def cast(self, wish: bool, needed: int, rank: int, store: "Store") -> int | None:
        """Cast a rank's vote in this call, in which `needed` yes votes decide; returns the result of `decided`."""
        store.set(f"call of/{rank}", f"{self.calls} {_VOTING}" if wish else str(self.calls))
        if not self._known:
            self._known = True
            store.append("voters", f"{rank} ")  # type: ignore[attr-defined]
        if wish:
            if self._add(store) >= needed:
                self._decide(rank, store)
            store.set(f"call of/{rank}", str(self.calls))
        return self.decided(store)

    def decided(self, store: "Store") -> int | None:
        """The call from which the decision takes effect; None while there is none. A single rank may call this."""
        while store.check([f"{self._number}/decider"]):
            store.wait([f"{self._number}/decision"], timedelta(seconds=_DECIDING))
            made, since = map(int, store.get(f"{self._number}/decision").split())
            self._number += 1
            if made > self._since:
                return since
        return None

    def wait_for_voters(self, store: "Store", ranks: int) -> None:
        """Wait up to five seconds until the other voters have voted in this rank's last call, which may decide.

        The voters are known from the second call on; in the first they may be all `ranks`.
        """
        if not self._known:
            return
        wanted = ranks if self.calls == 1 else 1
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            notes = self._notes(store)
            if len(notes) >= wanted and all(call - len(voting) >= self.calls for call, *voting in notes):
                return
            time.sleep(0.01)

    def _notes(self, store: "Store") -> list[list[int]]:
        """The call reached by each voter, followed by `_VOTING` while its yes vote is pending."""
        keys = [f"call of/{voter}" for voter in store.get("voters").decode().split()]
        return [list(map(int, note.split())) for note in store.multi_get(keys)]

    def _add(self, store: "Store") -> int:
        key = f"votes/{self.calls}"
        votes = store.add(key, 1)
        if votes == 1:
            self._voted.append(key)
            if len(self._voted) > _KEPT:
                store.delete_key(self._voted.pop(0))
        return votes

    def _decide(self, rank: int, store: "Store") -> None:
        if store.compare_set(f"{self._number}/decider", "", str(rank)).decode() == str(rank):
            foremost = max(call for call, *_ in self._notes(store))
            store.set(f"{self._number}/decision", f"{self.calls} {foremost + 1}")


class Peers:
    """Agreement between the ranks that schedule the same optimizer.

    It outlives schedules, so that it detects a single rank that creates or loads a new one. If the ranks share no
    store, or the store's host has ended, nothing is compared. Methods take the `group` that must agree (None is the
    default one), the `report` with this rank's values at the step, and `closely`: whether to compare in any case.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.vote = Vote()
        self._kind = _kind_of(optimizer)
        # Not kept alive: the threads of a destroyed group end with it.
        self._world: Callable[[], Any] = lambda: None
        self._group: Callable[[], Any] = lambda: None
        self._ranks: list[int] = []
        self._store: Store | None = None
        self._comparison: Comparison | None = None
        self._begun = self._idle = 0
        self._counted = self._ever_counted = self._compiled = False
        optimizer.register_step_post_hook(self._compiled_hook())

    @staticmethod
    def of(optimizer: Optimizer) -> "Peers":
        """The `Peers` of an optimizer, created at the first call."""
        if optimizer not in _peers:
            _peers[optimizer] = Peers(optimizer)
        return _peers[optimizer]

    def before_step(self, group: dist.ProcessGroup | None, report: Callable[[], Report], closely: bool) -> None:
        """Count a step that the optimizer is about to take; called by its hook, which a compiled step does not run."""
        self._counted = self._ever_counted = True
        if self._bind(group):
            self._step(report, closely)

    def after_step(self, group: dist.ProcessGroup | None, report: Callable[[], Report], closely: bool) -> None:
        """Count a call of the schedule, as an optimizer step if the hook could not count it."""
        counted, compiled = self._counted, self._compiled
        self._counted = self._compiled = False
        self._idle = 0 if counted else self._idle + 1
        bound = self._bind(group)
        self.vote.calls += 1
        if bound and not counted and (compiled or not self._ever_counted or self._idle > _IDLE):
            self._step(report, closely)

    def cast(self, group: dist.ProcessGroup | None, wish: bool, reduce: str) -> int | None:
        """Vote in this call of the schedule; returns the call from which a decision takes effect, or None."""
        if not self._bind(group):
            return self.vote.calls + 1 if wish and not taking_part(group) else None
        voters = len(self._ranks)
        needed = {"any": 1, "all": voters, "majority": voters // 2 + 1}[reduce]
        return self._ask(lambda store: self.vote.cast(wish, needed, dist.get_rank(), store))

    def decided(self, group: dist.ProcessGroup | None, *, wait: bool = False) -> int | None:
        """Like `cast`, without a vote, also on a single rank; `wait` waits briefly for votes of this call."""
        # A process group is first used in a step, which all ranks take.
        begun = taking_part(group) and self._world() is dist.group.WORLD and self._store is not None
        if not begun:
            return None

        def question(store: "Store") -> int | None:
            if wait:
                self.vote.wait_for_voters(store, len(self._ranks))
            return self.vote.decided(store)

        return self._ask(question)

    def has_no_store(self, group: dist.ProcessGroup | None) -> bool:
        """Whether there are other ranks that cannot be reached."""
        return taking_part(group) and self._store is None

    def _step(self, report: Callable[[], Report], closely: bool) -> None:
        try:
            if self._comparison is not None:
                self._comparison.step(report, closely)
        except RankDisagreementError:
            self._begin()
            raise
        except RuntimeError:
            self._store = self._comparison = None

    def _ask(self, question: "Callable[[Store], int | None]") -> int | None:
        assert self._store is not None
        try:
            return question(_part_of(self._store, "vote"))
        except RuntimeError:
            self._store = self._comparison = None
            return None

    def _bind(self, group: dist.ProcessGroup | None) -> bool:
        """Whether there are other ranks that can be reached; a new process group starts everything again."""
        if not taking_part(group):
            return False
        world = dist.group.WORLD
        present = world if group is None else group
        assert present is not None
        if self._world() is not world or self._group() is not present:
            ranks = dist.get_process_group_ranks(present)
            if self._world() is not world or ranks != self._ranks:
                self._begin_in(present, ranks)
            self._world, self._group = weakref.ref(world), weakref.ref(present)
        return self._store is not None

    def _begin_in(self, group: dist.ProcessGroup, ranks: list[int]) -> None:
        self._ranks, self.vote = ranks, Vote()
        self._store = _store_of(self._kind, group)
        self._begin()

    def _begin(self) -> None:
        """Start a new comparison, with its own keys."""
        self._begun += 1
        self._comparison = None
        if self._store is not None:
            try:
                part = _part_of(self._store, f"comparison {self._begun}")
                self._comparison = Comparison(part, len(self._ranks))
            except RuntimeError:
                self._store = None

    def _compiled_hook(self) -> Callable[..., None]:
        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # A constant, never read here: a counter would recompile the step each time.
            if torch.compiler.is_compiling():
                self._compiled = True

        return stepped


def _kind_of(optimizer: Optimizer) -> str:
    """The optimizer's class and the shapes of its first two parameters, equal on ranks that share it."""
    shapes = [shape_on_every_rank(p) for group in optimizer.param_groups for p in group["params"]][:2]
    return f"{type(optimizer).__name__} {zlib.crc32(repr(shapes).encode()):x}"


def _store_of(kind: str, group: dist.ProcessGroup) -> "Store | None":
    """The part of the store for an optimizer that is about to take its first step in this group.

    Ranks share it if they take that step with an optimizer of the same kind after the same number of the group's
    collectives, even if a rank also trains something else. None if no store connects the ranks (MPI, torch's fake
    process group).
    """
    store = _training_store()
    if store is None:
        return None
    ranks = zlib.crc32(repr(dist.get_process_group_ranks(group)).encode())
    name = f"{ranks:x}/{kind}/{_collectives(group)}"
    _begun[name] += 1
    return _part_of(store, f"{name}/{_begun[name]}")


def _collectives(group: dist.ProcessGroup) -> int:
    """The number of collectives that the group has started, which distinguishes consecutive trainings in a process."""
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


def _part_of(store: "Store", name: str) -> "Store":
    """A store for the keys of `store` with the prefix `name`."""
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _training_store() -> "Store | None":
    global _opened
    world = dist.group.WORLD
    if _opened is None or _opened[0]() is not world:
        _begun.clear()
        _opened = weakref.ref(world), _open()
    return _opened[1]


def _open() -> "Store | None":
    try:
        # Private, but the only access to the ranks' common store without a collective; used only here.
        store = dist.distributed_c10d._get_default_store()
        # torch's FakeStore claims to have every key. If the host has ended, this raises; cloning would wait.
        if store.check([f"{_NAMESPACE}/no such key"]):
            return None
        if hasattr(store, "clone"):
            # Our own connection: waiting calls of the training block theirs.
            store = store.clone()
            store.set_timeout(timedelta(seconds=_TIMEOUT))
        # torchrun's store outlives a process group; each group created with it gets its own keys.
        count = store.add(f"{_NAMESPACE}/process groups of rank {dist.get_rank()}", 1)
        return _part_of(store, f"{_NAMESPACE}/{count}")
    except Exception:
        return None
