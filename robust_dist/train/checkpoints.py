"""The checkpoints of a run: what each holds beside the engine's state, and how a start takes the newest one up."""

import math
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from robust_dist.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    convert,
    load_state,
    note_parameters,
    save_state,
)
from robust_dist.checkpoint.background import checkpoint_bytes
from robust_dist.data.sets import LabelledSet
from robust_dist.documents import DocumentError, typed
from robust_dist.engines.engine import BATCH_NORMS, UNNOTED, engine_of
from robust_dist.private import hidden
from robust_dist.ranks.talk import on_rank_0, raise_together, rank, world_size
from robust_dist.schedule import base_optimizer
from robust_dist.train.build import largest_part
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import OptimizerConfig, Recipe, conflicts, recipe_dict
from robust_dist.train.saving import Saver

_CONVERTED = ".converted"


class DivergedError(RuntimeError):
    """The training loss is no longer finite; nothing was saved after it."""


@dataclass
class Progress:
    """The position of a run on this rank; a checkpoint restores it.

    Attributes:
        step: Optimizer steps done.
        loss_sum: 0-d float64: this rank's summed loss since the epoch began.
        lr: Learning rate of the last step.
        weight_decay: Weight decay of the last step.
        bad_images: This rank's images since the epoch began that could not be read.
        forgiven: Bad images of the epoch, on all ranks, over which the run was stopped before.
        unfinished: Figures of an epoch that is trained and not yet recorded, as `metrics.jsonl` has them.
        resumed_step: The step of the checkpoint that this start took up; -1 without one.
    """

    step: int
    loss_sum: Tensor
    lr: float = 0.0
    weight_decay: float = 0.0
    bad_images: int = 0
    forgiven: int = 0
    unfinished: dict[str, Any] | None = None
    resumed_step: int = -1

    def begin_epoch(self) -> None:
        """Forget the epoch that was recorded."""
        self.unfinished = None
        self.loss_sum.zero_()
        self.bad_images = self.forgiven = 0


def check_finite(loss: float, step: int, settings: OptimizerConfig) -> None:
    """Raise a DivergedError that names the settings where the loss by optimizer step `step` is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training loss is {loss} by step {step} (optimizer.lr={settings.lr}, "
            f"optimizer.weight_decay={settings.weight_decay}, optimizer.clip_norm={settings.clip_norm}); nothing was "
            "saved after it went bad: try a smaller optimizer.lr or an optimizer.clip_norm"
        )


class RunCheckpoints:
    """Saves and takes up one run; every rank makes the same calls.

    Args:
        recipe: All settings.
        accelerator: The engine, after `prepare`, which made `model` and `optimizer` what they are here.
        folder: The run's.
        train_set: Training images.
        progress: The run's position; a save reads it, `take_up` sets it.
        model: See `accelerator`.
        optimizer: See `accelerator`.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        train_set: LabelledSet,
        progress: Progress,
        model: nn.Module,
        optimizer: Any,
    ) -> None:
        self.recipe, self.accelerator, self.folder, self.train_set = recipe, accelerator, folder, train_set
        self.progress, self.model, self.optimizer = progress, model, optimizer
        self.bare_model: nn.Module = accelerator.unwrap_model(model)
        self.engine = engine_of(accelerator)
        kept, token = recipe.checkpoint, secrets.token_hex(4)
        self.store = CheckpointStore(
            folder.checkpoints, kept.keep, keep_best=kept.keep_best, token=token, guard=folder.check
        )

    def saver(self) -> Saver:
        """The writer of this start's checkpoints, in the background where the host has room."""
        need = checkpoint_bytes(
            self.engine,
            self.bare_model,
            rank=rank(),
            world_size=world_size(),
            whole=self.engine.saves_whole(self.accelerator),
            averaged=self.recipe.ema_decay is not None,
            fast_weights=getattr(base_optimizer(self.optimizer), "averages_weights", False),
        )
        return Saver(self.store, self.recipe.checkpoint, need=need, timeout=self.recipe.timeout_seconds)

    def take_up(self, total_steps: int, steps_per_epoch: int) -> None:
        """Load the newest usable checkpoint, or start at step 0 where there is none, and fit `metrics.jsonl` to it.

        Raises:
            CheckpointError: Checkpoints are there, but none can be used.
        """
        accelerator, progress, world = self.accelerator, self.progress, self.accelerator.num_processes
        found = load_newest(accelerator, self.recipe, self.store, self.train_set, self.folder)
        if found is not None:
            progress.step = progress.resumed_step = found.step
            progress.loss_sum.fill_(loss_of(found, accelerator.process_index, world))
            progress.bad_images = found.metadata.get("bad_images", 0) * accelerator.is_main_process
            if found.metadata.get("refused"):
                self._take_up_refused(found.metadata)
            accelerator.print(f"resuming {found.path} at step {found.step} of {total_steps}")
            for line in changes(self.recipe, world, self.engine.kind, found.metadata, self.bare_model):
                accelerator.print(line)
        for line in on_rank_0(lambda: self.folder.rewind(progress.step, steps_per_epoch)):
            accelerator.print(f"warning: {line}")

    def finite_losses(self) -> list[float]:
        """Every rank's summed loss since the epoch began; a DivergedError where it is no longer finite."""
        losses: list[float] = self.accelerator.gather(self.progress.loss_sum.reshape(1)).tolist()
        check_finite(sum(losses), self.progress.step, self.recipe.optimizer)
        return losses

    def save(
        self, saver: Saver, losses: list[float], bad_images: int, accuracy: float | None, *, refused: bool = False
    ) -> None:
        """Save; the checkpoint counts once it is whole.

        Args:
            saver: Of this start.
            losses: Of `finite_losses`.
            bad_images: The epoch's so far, on all ranks.
            accuracy: Of the evaluation at this step, if there was one.
            refused: Whether the run stops here over images that cannot be read, in an epoch or after it.

        Raises:
            CheckpointError: On every rank: this checkpoint or the previous one could not be written.
        """
        metadata = {
            "recipe": hidden(recipe_dict(self.recipe)),
            "engine": self.engine.kind,
            "num_processes": self.accelerator.num_processes,
            "loss_sums": losses,
            "bad_images": bad_images,
            "eval_accuracy": accuracy,
            "train_images": len(self.train_set),
        } | ({"refused": True, "unfinished": self.progress.unfinished} if refused else {})
        saver.save(self.progress.step, self._write_state, metadata)

    def _write_state(self, folder: Path) -> None:
        save_state(self.accelerator, folder)
        if not self.engine.names_parameters:
            # Conversion to another engine needs the names.
            note_parameters(folder, self.model, self.optimizer)

    def _take_up_refused(self, metadata: dict[str, Any]) -> None:
        """Go on with an epoch over whose images the run was stopped: they do not count again."""
        progress = self.progress
        progress.forgiven, progress.unfinished = metadata["bad_images"], metadata["unfinished"]
        if on_rank_0(lambda: any(row["step"] == progress.step for row in self.folder.metrics())):
            # A later start recorded the epoch and saved nothing after it.
            progress.begin_epoch()


@dataclass
class _Noted:
    """The metadata of a run's checkpoint, as far as it is read again."""

    recipe: dict[str, Any]
    num_processes: int
    loss_sums: list[float]
    engine: str = UNNOTED
    bad_images: int = 0
    train_images: int | None = None


def load_newest(
    accelerator: Accelerator, recipe: Recipe, store: CheckpointStore, train_set: LabelledSet, folder: RunFolder
) -> Checkpoint | None:
    """Load the newest usable checkpoint into what the accelerator prepared; None where there is none at all.

    What dead processes left unfinished beside the checkpoints is removed; this process holds the run's folder.

    Raises:
        CheckpointError: On every rank: checkpoints are there, but none can be used; they are gone though epochs are
            recorded; or the newest was written while training on another number of images.
    """
    on_rank_0(lambda: check_not_lost(recipe, store, folder))
    found = on_rank_0(lambda: _find(accelerator, recipe, store))
    if found is None:
        return None
    on_rank_0(lambda: _check_same_set(found, train_set))
    path = on_rank_0(lambda: _fitting(accelerator, store, found))
    error: Exception | None = None
    try:
        load_state(accelerator, path)
    except Exception as caught:
        error = CheckpointError(f"{found.path} could not be loaded: {caught}")
    raise_together(error)
    if path != found.path and accelerator.is_main_process:
        shutil.rmtree(path)
    return found


def loss_of(found: Checkpoint, rank: int, world_size: int) -> float:
    """This rank's summed loss since the epoch began; at another world size the first one carries all of it."""
    losses, before = found.metadata["loss_sums"], found.metadata["num_processes"]
    return float(losses[rank] if before == world_size else sum(losses) * (rank == 0))


def check_not_lost(recipe: Recipe, store: CheckpointStore, folder: RunFolder) -> None:
    """Refuse to begin anew beside the record of a run whose checkpoints were taken away, or hidden.

    Raises:
        CheckpointError: Epochs are recorded, and their checkpoints are gone or cannot be read.
    """
    rows = folder.metrics()
    if not rows:
        return
    missing = _what_is_missing(store.folder)
    due = [row for row in rows if row["epoch"] % recipe.checkpoint.every_epochs == 0 or row["epoch"] == recipe.epochs]
    # The first one is complete before the second begins; a kill before that leaves none.
    if missing is None and (any(store.folder.iterdir()) or (len(due) < 3 and not folder.is_finished)):
        return
    raise CheckpointError(
        f"{folder.metrics_path} has {len(rows)} epochs, but {store.folder} {missing or 'holds no checkpoint'}: bring "
        "it back (is a file system not mounted?), or, to begin anew on purpose, choose another run_dir or move this "
        "one away"
    )


def _what_is_missing(folder: Path) -> str | None:
    try:
        os.listdir(folder)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _find(accelerator: Accelerator, recipe: Recipe, store: CheckpointStore) -> Checkpoint | None:
    ours = recipe_dict(recipe)

    def refuse(checkpoint: Checkpoint) -> str | None:
        try:
            typed(checkpoint.metadata, _Noted, "its metadata")
        except DocumentError as error:
            return f"of no run ({error})"
        differing = conflicts(ours, checkpoint.metadata["recipe"], kind=type(recipe))
        return "of another recipe (" + "; ".join(differing) + ")" if differing else None

    found, rejected = store.newest(refuse)
    store.clean()
    shutil.rmtree(store.folder / _CONVERTED, ignore_errors=True)
    for reason in rejected:
        accelerator.print(f"checkpoint passed over: {reason}")
    if found is None and rejected:
        raise CheckpointError(
            "no checkpoint of this run can be used, and starting again would write over them; move "
            f"{store.folder} away to start from the beginning:\n  " + "\n  ".join(rejected)
        )
    return found


def _check_same_set(found: Checkpoint, train_set: LabelledSet) -> None:
    before = found.metadata.get("train_images", len(train_set))
    if before != len(train_set):
        raise CheckpointError(
            f"{found.path} was written while training on {before} images, and {train_set.name} has {len(train_set)}: "
            "the order of an epoch would be different. Bring the old images back, or choose another run_dir"
        )


def _fitting(accelerator: Accelerator, store: CheckpointStore, found: Checkpoint) -> Path:
    """The checkpoint, or a conversion of it where another engine, or ZeRO at another world size, wrote it."""
    engine, ranks = engine_of(accelerator), accelerator.num_processes
    same_ranks = ranks == found.metadata["num_processes"]
    if found.metadata.get("engine", UNNOTED) == engine.kind and (same_ranks or engine.loads_on_any_ranks):
        return found.path
    converted = store.folder / _CONVERTED
    whole = engine.saves_whole(accelerator)
    convert(found.path, converted, to=engine.kind, world_size=ranks, full_state_dict=whole)
    return converted


def changes(recipe: Recipe, num_processes: int, engine: str, before: dict[str, Any], model: nn.Module) -> list[str]:
    """Lines for the user where ranks, engine or the parts of a batch differ from the checkpoint's metadata, `before`.

    `recipe` is that of this start after `fit_ranks`, `engine` the kind of this start's engine.
    """
    was_ranks, was = int(before["num_processes"]), before["recipe"].get("accumulation", 1)
    was_engine = before.get("engine", UNNOTED)
    lines = []
    if was_engine != engine:
        lines.append(f"the run was under {was_engine} and is under {engine}: it goes on, but not bit for bit")
    if (was_ranks, was) == (num_processes, recipe.accumulation):
        return lines
    old = replace(recipe, accumulation=was)
    if was_ranks != num_processes:
        lines.append(f"the run had {was_ranks} ranks and has {num_processes}: it goes on, but not bit for bit")
    lines.append(
        f"the global batch stays {recipe.batch_size} images; accumulation {was} -> {recipe.accumulation}, a rank holds "
        f"at most {largest_part(old, was_ranks)} -> {largest_part(recipe, num_processes)} images at once"
    )
    if any(isinstance(part, BATCH_NORMS) for part in model.modules()):
        lines.append("batch normalisation takes its statistics over what a rank holds at once, so these change, too")
    return lines
