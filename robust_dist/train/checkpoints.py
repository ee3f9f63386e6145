"""The checkpoints of a run: what each holds besides the engine's state, and how a start resumes from the newest."""

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
    """The training loss is no longer finite; nothing was saved after that."""


@dataclass
class Progress:
    """The position of a run on this rank, restored by a checkpoint.

    Attributes:
        step: Optimizer steps taken.
        loss_sum: 0-d float64: this rank's summed loss since the epoch began.
        lr: Learning rate of the last step.
        weight_decay: Weight decay of the last step.
        bad_images: This rank's unreadable images since the epoch began.
        forgiven: Bad images of the epoch, on all ranks, that stopped the run before.
        unfinished: Figures of an epoch that is trained but not yet recorded, as in `metrics.jsonl`.
        resumed_step: The step of the checkpoint from which this start resumed; -1 without one.
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
        """Reset what belongs to the recorded epoch."""
        self.unfinished = None
        self.loss_sum.zero_()
        self.bad_images = self.forgiven = 0


def check_finite(loss: float, step: int, settings: OptimizerConfig) -> None:
    """Raise a DivergedError that names the settings if the loss by optimizer step `step` is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training loss is {loss} by step {step} (optimizer.lr={settings.lr}, "
            f"optimizer.weight_decay={settings.weight_decay}, optimizer.clip_norm={settings.clip_norm}); nothing was "
            "saved after it went bad: try a smaller optimizer.lr or an optimizer.clip_norm"
        )


class RunCheckpoints:
    """Saves one run and resumes it; every rank makes the same calls.

    Args:
        recipe: All settings.
        accelerator: The engine, after `prepare`, which produced `model` and `optimizer`.
        folder: The run's folder.
        train_set: Training images.
        progress: The run's position; saving reads it, `take_up` sets it.
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
        """The writer of this start's checkpoints, in the background if the host has room."""
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
        """Load the newest usable checkpoint, or start at step 0 without one, and fit `metrics.jsonl` to it.

        Raises:
            CheckpointError: There are checkpoints, but none can be used.
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
        """Every rank's summed loss since the epoch began; a DivergedError if it is no longer finite."""
        losses: list[float] = self.accelerator.gather(self.progress.loss_sum.reshape(1)).tolist()
        check_finite(sum(losses), self.progress.step, self.recipe.optimizer)
        return losses

    def save(
        self, saver: Saver, losses: list[float], bad_images: int, accuracy: float | None, *, refused: bool = False
    ) -> None:
        """Save; the checkpoint counts once it is complete.

        Args:
            saver: This start's.
            losses: From `finite_losses`.
            bad_images: The epoch's so far, on all ranks.
            accuracy: From the evaluation at this step, if there was one.
            refused: Whether the run stops here because of unreadable images, in an epoch or after it.

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
        """Resume an epoch in which bad images stopped the run: they do not count again."""
        progress = self.progress
        progress.forgiven, progress.unfinished = metadata["bad_images"], metadata["unfinished"]
        if on_rank_0(lambda: any(row["step"] == progress.step for row in self.folder.metrics())):
            # A later start recorded the epoch and saved nothing after it.
            progress.begin_epoch()


@dataclass
class _Noted:
    """The part of a run's checkpoint metadata that is read back."""

    recipe: dict[str, Any]
    num_processes: int
    loss_sums: list[float]
    engine: str = UNNOTED
    bad_images: int = 0
    train_images: int | None = None


def load_newest(
    accelerator: Accelerator, recipe: Recipe, store: CheckpointStore, train_set: LabelledSet, folder: RunFolder
) -> Checkpoint | None:
    """Load the newest usable checkpoint into what the accelerator prepared; None if there are no checkpoints.

    Unfinished checkpoints of dead processes are removed; this process holds the run's folder.

    Raises:
        CheckpointError: On every rank: there are checkpoints, but none can be used; they are gone although epochs are
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
    """This rank's summed loss since the epoch began; at another world size the first rank carries all of it."""
    losses, before = found.metadata["loss_sums"], found.metadata["num_processes"]
    return float(losses[rank] if before == world_size else sum(losses) * (rank == 0))


def check_not_lost(recipe: Recipe, store: CheckpointStore, folder: RunFolder) -> None:
    """Refuse to start over beside the record of a run whose checkpoints were removed or hidden.

    Raises:
        CheckpointError: Epochs are recorded, but their checkpoints are gone or unreadable.
    """
    rows = folder.metrics()
    if not rows:
        return
    missing = _what_is_missing(store.folder)
    due = [row for row in rows if row["epoch"] % recipe.checkpoint.every_epochs == 0 or row["epoch"] == recipe.epochs]
    # The first checkpoint is complete before the second begins; a kill before that leaves none.
    if missing is None and (any(store.folder.iterdir()) or (len(due) < 3 and not folder.is_finished)):
        return
    raise CheckpointError(
        f"{folder.metrics_path} has {len(rows)} epochs, but {store.folder} {missing or 'holds no checkpoint'}: bring "
        "it back (is a file system not mounted?), or, to start over on purpose, choose another run_dir or move this "
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
            return f"not from a run ({error})"
        differing = conflicts(ours, checkpoint.metadata["recipe"], kind=type(recipe))
        return "from another recipe (" + "; ".join(differing) + ")" if differing else None

    found, rejected = store.newest(refuse)
    store.clean()
    shutil.rmtree(store.folder / _CONVERTED, ignore_errors=True)
    for reason in rejected:
        accelerator.print(f"skipping checkpoint {reason}")
    if found is None and rejected:
        raise CheckpointError(
            "no checkpoint of this run can be used, and starting over would overwrite them; move "
            f"{store.folder} away to start from the beginning:\n  " + "\n  ".join(rejected)
        )
    return found


def _check_same_set(found: Checkpoint, train_set: LabelledSet) -> None:
    before = found.metadata.get("train_images", len(train_set))
    if before != len(train_set):
        raise CheckpointError(
            f"{found.path} was written while training on {before} images, but {train_set.name} has {len(train_set)}: "
            "the order of an epoch would differ. Restore the old images, or choose another run_dir"
        )


def _fitting(accelerator: Accelerator, store: CheckpointStore, found: Checkpoint) -> Path:
    """The checkpoint, or a conversion of it if another engine, or ZeRO at another world size, wrote it."""
    engine, ranks = engine_of(accelerator), accelerator.num_processes
    same_ranks = ranks == found.metadata["num_processes"]
    if found.metadata.get("engine", UNNOTED) == engine.kind and (same_ranks or engine.loads_on_any_ranks):
        return found.path
    converted = store.folder / _CONVERTED
    whole = engine.saves_whole(accelerator)
    convert(found.path, converted, to=engine.kind, world_size=ranks, full_state_dict=whole)
    return converted


def changes(recipe: Recipe, num_processes: int, engine: str, before: dict[str, Any], model: nn.Module) -> list[str]:
    """Lines for the user if ranks, engine or micro-batches differ from the checkpoint's metadata, `before`.

    `recipe` is this start's after `fit_ranks`, `engine` the kind of this start's engine.
    """
    was_ranks, was = int(before["num_processes"]), before["recipe"].get("accumulation", 1)
    was_engine = before.get("engine", UNNOTED)
    lines = []
    if was_engine != engine:
        lines.append(f"the run was under {was_engine} and is now under {engine}: it continues, but not bit for bit")
    if (was_ranks, was) == (num_processes, recipe.accumulation):
        return lines
    old = replace(recipe, accumulation=was)
    if was_ranks != num_processes:
        lines.append(f"the run had {was_ranks} ranks and now has {num_processes}: it continues, but not bit for bit")
    lines.append(
        f"the global batch stays {recipe.batch_size} images; accumulation {was} -> {recipe.accumulation}, a rank holds "
        f"at most {largest_part(old, was_ranks)} -> {largest_part(recipe, num_processes)} images at once"
    )
    if any(isinstance(part, BATCH_NORMS) for part in model.modules()):
        lines.append("batch normalisation's statistics are over the images a rank holds at once, so they change too")
    return lines
