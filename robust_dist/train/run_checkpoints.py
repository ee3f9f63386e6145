"""The checkpoints of a run: what each holds beside the engine's state, and how a start takes one up."""

import secrets
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from robust_dist.checkpoint import CheckpointStore, note_parameters, save_state
from robust_dist.data.sets import LabelledSet
from robust_dist.engines.engine import engine_of
from robust_dist.private import hidden
from robust_dist.ranks.talk import on_rank_0
from robust_dist.train.elastic import changes
from robust_dist.train.folder import RunFolder
from robust_dist.train.progress import Progress, check_finite
from robust_dist.train.recipe import Recipe, recipe_dict
from robust_dist.train.resume import load_newest, loss_of
from robust_dist.train.saving import Saver, build_saver


class RunCheckpoints:
    """Saves and takes up one run; every rank makes the same calls.

    Args:
        recipe: All settings.
        accelerator: The engine, after `prepare`.
        folder: The run's.
        train_set: Training images.
        progress: Where the run stands; it is read by a save and set by `take_up`.
        model: What the engine made of the model.
        optimizer: What the engine made of the optimizer.
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
        return build_saver(self.accelerator, self.recipe, self.store, self.bare_model)

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
        """Every rank's summed loss since the epoch began.

        Raises:
            DivergedError: The loss is no longer finite.
        """
        losses: list[float] = self.accelerator.gather(self.progress.loss_sum.reshape(1)).tolist()
        check_finite(sum(losses), self.progress.step, self.recipe.optimizer)
        return losses

    def save(
        self, saver: Saver, losses: list[float], bad_images: int, accuracy: float | None, *, refused: bool = False
    ) -> None:
        """Save; the checkpoint counts once it is whole.

        Args:
            saver: Of this start.
            losses: What `finite_losses` gave.
            bad_images: The epoch's so far, on all ranks.
            accuracy: Of the evaluation at this step, where there was one.
            refused: Whether the run stops here over images that cannot be read, in an epoch or after it.

        Raises:
            CheckpointError: On every rank: this checkpoint or the one before could not be written.
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
            # Conversion to another engine wants names.
            note_parameters(folder, self.model, self.optimizer)

    def _take_up_refused(self, metadata: dict[str, Any]) -> None:
        """Go on with an epoch over whose images the run was stopped: they do not count again."""
        progress = self.progress
        progress.forgiven, progress.unfinished = metadata["bad_images"], metadata["unfinished"]
        if on_rank_0(lambda: any(row["step"] == progress.step for row in self.folder.metrics())):
            # Recorded since, by a start that saved nothing later.
            progress.begin_epoch()
