"""Saving by all ranks together: in the background if the host has room, otherwise at once."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robust_dist.checkpoint import CheckpointError, CheckpointStore
from robust_dist.checkpoint.background import (
    SHARED_MEMORY,
    Pending,
    Staging,
    free_bytes,
    room_for_staging,
    write_failure,
)
from robust_dist.measure.memory import text_of
from robust_dist.ranks.claim import host_id
from robust_dist.ranks.talk import attempt, gather, on_rank_0, raise_together, rank, world_size
from robust_dist.train.recipe import CheckpointConfig

Write = Callable[[Path], None]


class Saver:
    """Saves a run's checkpoints, one at a time; every rank makes the same calls.

    Args:
        store: The checkpoint store; only the first rank changes it.
        settings: The recipe's.
        need: An upper bound on the bytes that this rank writes for a checkpoint.
        timeout: Seconds that the first rank waits for another one that writes nothing.

    Attributes:
        saved: The step of the last save, complete or in progress; -1 before the first.
        count: Checkpoints saved by this start.
        seconds: Training time lost to them.
        waited: The part of it spent waiting for the previous checkpoint.
    """

    def __init__(self, store: CheckpointStore, settings: CheckpointConfig, *, need: int, timeout: float) -> None:
        self.store, self.settings, self.timeout = store, settings, timeout
        self.saved, self.count, self.seconds, self.waited, self.written = -1, 0, 0.0, 0.0, 0.0
        self._told, self._reported = False, 0.0
        self._pending: Pending | None = None
        self._staging: Staging | None = None
        needs = gather((host_id(), need))
        self.need = sum(count for _, count in needs)
        self._need_here = sum(count for host, count in needs if host == host_id())
        on_rank_0(self._check_room)
        self.background = settings.background and self._make_staging()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        """Complete the pending checkpoint as far as possible without other ranks, and remove staged files."""
        if self._pending is not None:
            self._pending.close()
            if self._pending.error is not None:
                print(f"the checkpoint of step {self._pending.step} is lost: {self._pending.error}", flush=True)
        if self._staging is not None:
            self._staging.close()

    def save(self, step: int, write: Write, metadata: dict[str, Any]) -> None:
        """Save once the previous checkpoint is complete.

        Args:
            step: Optimizer steps taken.
            write: Writes this rank's part of the engine's state into a folder; called on every rank.
            metadata: JSON values stored with the files.

        Raises:
            CheckpointError: On every rank: this checkpoint or the previous one could not be written.
        """
        self.wait()
        began = time.perf_counter()
        if not (self.background and self._stage(step, write, metadata)):
            self._write_now(step, write, metadata)
        self.saved, self.count = step, self.count + 1
        self.seconds += time.perf_counter() - began

    def has_failed(self) -> bool:
        """Whether this rank's part of the pending checkpoint has failed."""
        return self._pending is not None and self._pending.error is not None

    def wait(self) -> None:
        """Wait until the pending checkpoint is complete.

        Raises:
            CheckpointError: On every rank, if one of them could not write it; what was written is removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        try:
            raise_together(pending.wait_for_copy())
            on_rank_0(pending.result)
        except Exception:
            pending.abandon()
            raise
        waited = time.perf_counter() - began
        self.waited, self.seconds = self.waited + waited, self.seconds + waited
        self.written += pending.seconds

    def take_seconds(self) -> float:
        """Seconds lost since the last call."""
        since, self._reported = self.seconds - self._reported, self.seconds
        return since

    def summary(self) -> str:
        """The cost of checkpoints to this start, in one line; only after the first save."""
        each = f"{self.seconds / self.count:.3f} s"
        if not self.background:
            return f"checkpoints: {self.count}, training waited {each} for each"
        return (
            f"checkpoints: {self.count} in the background, training waited {each} for each ({self.waited:.3f} s in "
            f"total for the previous one to finish); writing took {self.written / self.count:.3f} s each"
        )

    def _check_room(self) -> None:
        """Reject a disk too small for one checkpoint; warn if it will not hold all that are to be kept."""
        free, folder = free_bytes(self.store.folder), self.store.folder
        if free < self.need:
            raise CheckpointError(
                f"{folder}: {text_of(free)} are free, but a checkpoint of this run takes about {text_of(self.need)}; "
                "make room, or choose another run_dir"
            )
        kept = self.settings.keep + self.settings.keep_best
        more = max(0, kept - len(list(folder.glob("step-*")))) + 1
        if free < more * self.need:
            print(
                f"warning: {folder} has {text_of(free)} free; checkpoint.keep={self.settings.keep} and keep_best="
                f"{self.settings.keep_best} will take about {text_of(more * self.need)} more, including the next one",
                flush=True,
            )

    def _root(self) -> Path:
        named = self.settings.staging
        return SHARED_MEMORY if named is None else Path(os.path.expandvars(named)).expanduser()

    def _make_staging(self) -> bool:
        """Whether all ranks have a place to stage in."""
        reason: str | None = None
        try:
            self._staging = Staging(self._root())
            reason = self._too_full()
        except OSError as error:
            reason = f"checkpoint.staging={str(self._root())!r}: {error}"
        return self._all_can(reason)

    def _too_full(self) -> str | None:
        room = room_for_staging(self._root())
        if room >= self._need_here:
            return None
        return f"{self._root()} on {host_id()} has room for {text_of(room)} of {text_of(self._need_here)}"

    def _all_can(self, reason: str | None) -> bool:
        reasons = [found for found in gather(reason) if found is not None]
        if reasons and not self._told:
            self._told = True
            if rank() == 0:
                print(
                    f"checkpoints cannot be staged ({reasons[0]}): training waits while they are written; "
                    "checkpoint.staging names another folder of the host"
                )
        return not reasons

    def _stage(self, step: int, write: Write, metadata: dict[str, Any]) -> bool:
        """Put the state where a thread can take it; False if there is no room this time."""
        if not self._all_can(self._too_full()):
            return False
        assert self._staging is not None
        partial = on_rank_0(lambda: self._begin(step))
        staged, reason = self._staging.folder(step), None
        try:
            write(staged)
        except Exception as error:
            reason = f"{staged}: {error}"
        if not self._all_can(reason):
            self._staging.folder(step)
            return False
        self._pending = Pending(
            self.store,
            staged,
            partial,
            step,
            metadata,
            rank=rank(),
            world_size=world_size(),
            patience=self.timeout,
        )
        return True

    def _write_now(self, step: int, write: Write, metadata: dict[str, Any]) -> None:
        partial = on_rank_0(lambda: self._begin(step))
        try:
            attempt(lambda: _explained(partial, lambda: write(partial)))
            on_rank_0(lambda: _explained(partial, lambda: self.store.commit(step, metadata)))
        except Exception:
            if rank() == 0:
                self.store.abandon(step)
            raise

    def _begin(self, step: int) -> Path:
        return _explained(self.store.folder, lambda: self.store.begin(step))


def _explained(path: Path, action: Callable[[], Any]) -> Any:
    """Call `action`, turning disk errors into ones that a person can act on."""
    try:
        return action()
    except OSError as error:
        raise write_failure(Path(error.filename or path), error) from None
    except Exception as error:
        # torch.save and safetensors have their own errors for a failed write.
        if type(error).__name__ in ("SafetensorError", "CheckpointException") or "inline_container" in str(error):
            raise write_failure(path, error) from None
        raise
