"""Votes between ranks that no step waits for."""

import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Seconds in which a rank that has begun to decide, two calls of the store, must have done so.
_DECIDING = 30.0
# Seconds for which a save waits for votes that are about to be cast.
_PATIENCE = 5.0
# Stands behind the number of a call in which a rank has a wish, until that is cast.
_VOTING = 1
# Steps after which votes that decided nothing are deleted.
_KEPT = 1024


class Vote:
    """One rank's part in deciding, through a store, from which call on all ranks do something.

    Every rank votes at each of its calls, which are numbered alike. A decision holds from the call after the one that
    the foremost rank has reached. No rank can have passed that call: each notes its call before it looks for a
    decision, and the deciding rank says that it is deciding before it reads these notes. Where ranks keep step that is
    the call after the one whose votes sufficed.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._since = 0
        self._number = 1
        self._voted: list[str] = []
        self._known = False

    def forget(self) -> None:
        """Let decisions that were made up to now be none, as after a load."""
        self._since = self.calls

    def cast(self, wish: bool, needed: int, rank: int, store: "Store") -> int | None:
        """Vote in this call, the `calls`-th.

        Args:
            wish: This rank's.
            needed: How many wishes in one call decide.
            rank: This rank's number.
            store: This vote's alone.

        Returns:
            As `decided`.
        """
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
        """The call from which on it is so; None while that is not decided. May be asked on one rank alone."""
        while store.check([f"{self._number}/decider"]):
            store.wait([f"{self._number}/decision"], timedelta(seconds=_DECIDING))
            made, since = map(int, store.get(f"{self._number}/decision").split())
            self._number += 1
            if made > self._since:
                return since
        return None

    def wait_for_voters(self, store: "Store", ranks: int) -> None:
        """Wait, five seconds at most, until the other voters have voted in this rank's last call: it may decide.

        Who votes is known from the second call on; at the first it may be all of these many ranks.
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

    def _calls(self, store: "Store") -> list[int]:
        """The call that each voter has reached."""
        return [call for call, *_ in self._notes(store)]

    def _notes(self, store: "Store") -> list[list[int]]:
        """The call that each voter has reached, and `_VOTING` behind it while its wish is on the way."""
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
            store.set(f"{self._number}/decision", f"{self.calls} {max(self._calls(store)) + 1}")
