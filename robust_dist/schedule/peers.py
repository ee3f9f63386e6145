"""The other ranks that schedule the same optimizer: what is compared and voted with them, and when."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from robust_dist.schedule.agreement import RankDisagreementError, Report, taking_part
from robust_dist.schedule.comparison import Comparison
from robust_dist.schedule.store import kind_of, part_of, store_of
from robust_dist.schedule.vote import Vote

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Calls of a schedule in a row without an optimizer step after which these calls are what is counted (CUDA graphs).
_IDLE = 8

_peers: "weakref.WeakKeyDictionary[Optimizer, Peers]" = weakref.WeakKeyDictionary()


class Peers:
    """What the schedules of one optimizer, of which the newest is in charge, have to do with other ranks.

    It outlives them, so that a rank that makes or loads its schedule anew by itself is found. Where the ranks share no
    store, or the store's host has ended, nothing is asked.

    Args:
        optimizer: A torch optimizer, unwrapped.
        group: At each call, the ranks to agree with; None is the default group.
        report: At each call, what this rank has at the step.
        closely: At each call, whether a step that matters is near.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.vote = Vote()
        self._kind = kind_of(optimizer)
        # Not kept alive by this: a destroyed one's threads end with it.
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
        """This optimizer's, made when first asked for."""
        if optimizer not in _peers:
            _peers[optimizer] = Peers(optimizer)
        return _peers[optimizer]

    def before_step(self, group: dist.ProcessGroup | None, report: Callable[[], Report], closely: bool) -> None:
        """Note that the optimizer is about to step; called by its hook, which a compiled step does not run.

        Raises:
            RankDisagreementError: The ranks differed at an earlier step.
        """
        self._counted = self._ever_counted = True
        if self._bind(group):
            self._step(report, closely)

    def after_step(self, group: dist.ProcessGroup | None, report: Callable[[], Report], closely: bool) -> None:
        """Note a call of the schedule; it counts as an optimizer step where that could not be noted.

        Raises:
            RankDisagreementError: The ranks differed at an earlier step.
        """
        counted, compiled = self._counted, self._compiled
        self._counted = self._compiled = False
        self._idle = 0 if counted else self._idle + 1
        bound = self._bind(group)
        self.vote.calls += 1
        if bound and not counted and (compiled or not self._ever_counted or self._idle > _IDLE):
            self._step(report, closely)

    def cast(self, group: dist.ProcessGroup | None, wish: bool, reduce: str) -> int | None:
        """Vote in this call of the schedule; returns from which call on the ranks' decision holds, None without one."""
        if not self._bind(group):
            return self.vote.calls + 1 if wish and not taking_part(group) else None
        voters = len(self._ranks)
        needed = {"any": 1, "all": voters, "majority": voters // 2 + 1}[reduce]
        return self._ask(lambda store: self.vote.cast(wish, needed, dist.get_rank(), store))

    def decided(self, group: dist.ProcessGroup | None, *, settle: bool = False) -> int | None:
        """As `cast`, without a vote; for one rank alone, too. `settle` waits a little for votes of this call."""
        # To begin with a process group is for a step, which all ranks make.
        begun = taking_part(group) and self._world() is dist.group.WORLD and self._store is not None
        if not begun:
            return None

        def question(store: "Store") -> int | None:
            if settle:
                self.vote.settle(store, len(self._ranks))
            return self.vote.decided(store)

        return self._ask(question)

    def out_of_reach(self, group: dist.ProcessGroup | None) -> bool:
        """Whether there are other ranks that cannot be asked."""
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
            return question(part_of(self._store, "vote"))
        except RuntimeError:
            self._store = self._comparison = None
            return None

    def _bind(self, group: dist.ProcessGroup | None) -> bool:
        """Whether there are other ranks that can be asked; a process group that is new begins everything anew."""
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
        self._store = store_of(self._kind, group)
        self._begin()

    def _begin(self) -> None:
        """Compare from the start, by keys of its own."""
        self._begun += 1
        self._comparison = None
        if self._store is not None:
            try:
                part = part_of(self._store, f"comparison {self._begun}")
                self._comparison = Comparison(part, len(self._ranks))
            except RuntimeError:
                self._store = None

    def _compiled_hook(self) -> Callable[..., None]:
        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # A constant, and never read here: a count would have the step compiled anew each time.
            if torch.compiler.is_compiling():
                self._compiled = True

        return stepped
