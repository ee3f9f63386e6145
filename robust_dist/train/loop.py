"""The training loop: small enough to read in one sitting."""

import secrets
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robust_dist.checkpoint import CheckpointStore, note_parameters
from robust_dist.checkpoint.dcp_metadata import plain_failures
from robust_dist.data import Batch
from robust_dist.data.sets import LabelledSet
from robust_dist.engines.accelerate import check
from robust_dist.private import hidden
from robust_dist.train.agree import attempt
from robust_dist.train.bad_images import BadImages, is_time_to_settle
from robust_dist.train.build import build_augment, build_classifier, build_loader, build_optimizer, build_schedule
from robust_dist.train.display import Display
from robust_dist.train.elastic import changes
from robust_dist.train.engine import check_model, engine_kind, forward_is_collective
from robust_dist.train.evaluate import average_buffers, broadcast_buffers, evaluate
from robust_dist.train.folder import RunFolder
from robust_dist.train.meter import Figures, build_meter, measured
from robust_dist.train.profiling import Profiling
from robust_dist.train.progress import Progress, check_finite
from robust_dist.train.recipe import Recipe, recipe_dict
from robust_dist.train.resume import load_newest, loss_of
from robust_dist.train.saving import build_saver
from robust_dist.train.schedule_free import use_averaged_weights
from robust_dist.train.step import TrainStep
from robust_dist.train.stop import Stopper
from robust_dist.train.trackers import Trackers
from robust_dist.train.watchdog import tick


class Trainer:
    """One run of a recipe on this rank.

    Args:
        recipe: All settings.
        accelerator: The engine.
        folder: The run's folder, claimed by the main process.
        train_set: Training images.
        test_set: Evaluation images.

    Raises:
        ValueError: A setting that cannot work, before the first step.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, folder: RunFolder, train_set: LabelledSet, test_set: LabelledSet
    ) -> None:
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        self.train_set, self.test_set = train_set, test_set
        self.trackers = Trackers(recipe, accelerator, folder.path)
        kept = recipe.checkpoint
        token = secrets.token_hex(4)
        self.store = CheckpointStore(
            folder.checkpoints, kept.keep, keep_best=kept.keep_best, token=token, guard=folder.check
        )
        self.loader = build_loader(recipe, accelerator, train_set)
        self.total_steps = recipe.epochs * self.loader.steps_per_epoch
        bad_images = folder.path / "bad_images.txt"
        self.bad = BadImages(accelerator, bad_images, recipe.data.max_bad_share) if recipe.data.streamed else None
        classes = len(train_set.classes)
        self.augment = build_augment(recipe, classes).to(accelerator.device)
        self.eval_augment = build_augment(recipe, classes, evaluation=True).to(accelerator.device)
        sharded = engine_kind(accelerator) != "ddp"
        model = build_classifier(recipe, classes, train_set.channels, sharded=sharded)
        check_model(accelerator, recipe, model)
        optimizer = build_optimizer(recipe, model, self.total_steps)
        schedule = build_schedule(recipe, optimizer, self.total_steps)
        self.meter = build_meter(recipe, accelerator, model, self.augment.image_shape)
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        check(
            accelerator,
            self.optimizer,
            num_processes=recipe.num_processes,
            schedule=self.schedule,
            total_steps=self.total_steps,
            optimizer_class=type(optimizer),
        )
        self.bare_model: nn.Module = accelerator.unwrap_model(self.model)
        # DDP gives every rank the first one's buffers before a step; other engines leave each rank its own.
        self.broadcasts = not isinstance(self.model, DistributedDataParallel)
        # Equal weights on all ranks, but dropout masks of each rank's own.
        set_seed(recipe.seed % 2**31, device_specific=True)
        self.ema = self._build_ema()
        self.progress = Progress(0, torch.zeros((), dtype=torch.float64, device=accelerator.device))
        self.step = TrainStep(
            recipe,
            accelerator,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            pipeline=torch.compile(self.augment, fullgraph=True) if recipe.augment.compile else self.augment,
            loss_sum=self.progress.loss_sum,
            full_size=min(recipe.batch_size, len(train_set)),
        )

    def fit(self) -> list[dict[str, Any]]:
        """Train from where the folder's newest checkpoint stands to the last epoch.

        Returns:
            The rows of `metrics.jsonl`, oldest first.

        Raises:
            CheckpointError: Checkpoints are there, but none can be used, or one cannot be written.
            DivergedError: The loss is no longer finite.
            Stopped: A signal asked for it; all is saved.
        """
        tick("taking up the run", patient=True)
        self._resume()
        steps_per_epoch, done = self.loader.steps_per_epoch, self.progress.step
        self.trackers.start(done)
        # The first step compiles, tunes and connects.
        tick("the first step", patient=True)
        with (
            build_saver(self.accelerator, self.recipe, self.store, self.bare_model) as self.saver,
            Stopper(self.accelerator, self.saver) as self.stopper,
            Display(self.recipe, self.accelerator, self.total_steps, done, self.meter) as display,
            Profiling(self.recipe, self.accelerator, self.folder.path, self.total_steps, done) as profiling,
        ):
            while self.progress.step < self.total_steps:
                epoch, start = divmod(self.progress.step, steps_per_epoch)
                figures = self._train_epoch(epoch, start, display, profiling)
                row = self._finish_epoch(epoch, figures)
                display.epoch(row)
                if self.stopper.stop and self.progress.step < self.total_steps:
                    self._leave()
            tick("the last checkpoint", patient=True)
            self.saver.settle()
        if self.saver.count:
            self.accelerator.print(self.saver.summary())
        return self.folder.metrics()

    def _train_epoch(self, epoch: int, start: int, display: Display, profiling: Profiling) -> Figures:
        """The rest of an epoch; returns what was measured in it."""
        every = self.recipe.checkpoint.every_steps
        self.model.train()
        self.optimizer.train()
        self.meter.begin()
        for parts in self.meter.fetch(self.loader.epoch(epoch, start)):
            self._train_step(parts)
            self._note_bad_images()
            self.meter.count(parts[0].global_size)
            display.step()
            profiling.step()
            at_end = self.progress.step % self.loader.steps_per_epoch == 0
            if every and self.progress.step % every == 0 and not at_end:
                self._save()
            if self.stopper.ask() and not at_end:
                self._leave()
            tick(f"step {self.progress.step + 1}")
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return self.meter.epoch()

    def _train_step(self, parts: list[Batch]) -> None:
        """One optimizer step: the mean loss over the global batch, however it is cut up."""
        group = max(self.optimizer.param_groups, key=lambda group: float(group["weight_decay"]))
        self.progress.lr, self.progress.weight_decay = float(group["lr"]), float(group["weight_decay"])
        if self.broadcasts:
            broadcast_buffers(self.bare_model)
        self.step(parts)
        if self.ema is not None:
            self.ema.update_parameters(self.bare_model)
        self.progress.step += 1

    def _note_bad_images(self) -> None:
        """Count the last step's bad images; now and then the ranks tell each other."""
        if self.bad is not None:
            found = self.loader.take_bad()
            self.progress.bad_images += len(found)
            self.bad.note(found)
            if is_time_to_settle((self.progress.step - 1) % self.loader.steps_per_epoch + 1):
                self._settle_bad_images()

    def _settle_bad_images(self) -> int:
        """The epoch's bad images so far, on all ranks; too many are an error on each."""
        if self.bad is None:
            return 0
        return self.bad.settle(self.progress.bad_images, self.loader.samples_per_epoch, self.train_set.name)

    def _finish_epoch(self, epoch: int, figures: Figures) -> dict[str, Any]:
        """Evaluate, record, save."""
        tick(f"the end of epoch {epoch + 1}")
        use_averaged_weights(self.optimizer, self.model, self.loader, epoch, lambda batch: self.step.inputs(batch)[0])
        average_buffers(self.bare_model)
        bad_images = self._settle_bad_images()
        total_loss = self.accelerator.reduce(self.progress.loss_sum.clone(), "sum").item()
        train_loss = total_loss / (self.loader.samples_per_epoch - bad_images)
        check_finite(train_loss, self.progress.step, self.recipe.optimizer)
        whole = self.ema.module if self.ema is not None else self.bare_model
        score = evaluate(
            self.model if forward_is_collective(self.accelerator) else whole,
            self.test_set,
            self.eval_augment,
            batch_size=self.recipe.data.eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            dtype=self.step.input_dtype,
        )
        row = {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "train_loss": train_loss,
            "eval_accuracy": score.accuracy,
            "eval_loss": score.loss,
            "eval_samples": score.samples,
            "lr": self.progress.lr,
            "weight_decay": self.progress.weight_decay,
        } | measured(self.meter, figures, self.accelerator)
        row["checkpoint_seconds"] = self.saver.take_seconds()
        if self.bad is not None:
            row["bad_images"] = bad_images
            row["eval_bad_images"] = self._settle_bad_eval()
        attempt(self.accelerator, lambda: self.folder.append(row), here=self.accelerator.is_main_process)
        self.trackers.log(row)
        self.progress.loss_sum.zero_()
        self.progress.bad_images = 0
        due = (epoch + 1) % self.recipe.checkpoint.every_epochs == 0 or epoch + 1 == self.recipe.epochs
        if due or self.stopper.stop:
            self._save(score.accuracy)
        tick(f"step {self.progress.step + 1}")
        return row

    def _settle_bad_eval(self) -> int:
        assert self.bad is not None
        found = self.test_set.take_bad()
        self.bad.note(found)
        return self.bad.settle(len(found), len(self.test_set), self.test_set.name)

    def _build_ema(self) -> AveragedModel | None:
        if self.recipe.ema_decay is None:
            return None
        average = get_ema_multi_avg_fn(self.recipe.ema_decay)
        ema = AveragedModel(self.bare_model, multi_avg_fn=average, use_buffers=True)
        self.accelerator.register_for_checkpointing(ema)
        return ema

    def _save(self, accuracy: float | None = None) -> None:
        """Save; the checkpoint counts once it is whole."""
        tick(f"the checkpoint of step {self.progress.step}")
        losses = self.accelerator.gather(self.progress.loss_sum.reshape(1)).tolist()
        check_finite(sum(losses), self.progress.step, self.recipe.optimizer)
        bad_images = self._settle_bad_images()
        if self.broadcasts:
            # A sharded checkpoint takes a buffer from any rank; the next step begins with the first one's.
            broadcast_buffers(self.bare_model)
        metadata = {
            "recipe": hidden(recipe_dict(self.recipe)),
            "engine": engine_kind(self.accelerator),
            "num_processes": self.accelerator.num_processes,
            "loss_sums": losses,
            "bad_images": bad_images,
            "eval_accuracy": accuracy,
            "train_images": len(self.train_set),
        }
        self.saver.save(self.progress.step, self._write_state, metadata)

    def _write_state(self, folder: Path) -> None:
        with plain_failures(folder):
            self.accelerator.save_state(str(folder))
        if engine_kind(self.accelerator) == "ddp":
            # Its optimizer file has numbers for the parameters; conversion to another engine wants names.
            note_parameters(folder, self.model, self.optimizer)

    def _leave(self) -> None:
        if self.saver.saved != self.progress.step:
            self._save()
        tick("the last checkpoint", patient=True)
        self.saver.settle()
        self.stopper.leave(self.folder, self.progress.step, self.total_steps)

    def _resume(self) -> None:
        """Take up the newest usable checkpoint, or start at step 0 where there is none."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        found = load_newest(accelerator, self.recipe, self.store, self.train_set)
        if found is not None:
            self.progress.step = found.step
            self.progress.loss_sum.fill_(loss_of(found, accelerator.process_index, world))
            self.progress.bad_images = found.metadata.get("bad_images", 0) * accelerator.is_main_process
            accelerator.print(f"resuming {found.path} at step {found.step} of {self.total_steps}")
            for line in changes(self.recipe, world, engine_kind(accelerator), found.metadata, self.bare_model):
                accelerator.print(line)
        step, each = self.progress.step, self.loader.steps_per_epoch
        for line in (
            attempt(accelerator, lambda: self.folder.rewind(step, each), here=accelerator.is_main_process) or ()
        ):
            accelerator.print(f"warning: {line}")
