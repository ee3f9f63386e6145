"""The training loop, short enough to read in one sitting; and the same over random images, for measurements."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robust_dist.data import Batch, ImageSet
from robust_dist.data.sets import LabelledSet
from robust_dist.engines.accelerate import check
from robust_dist.engines.engine import engine_of
from robust_dist.optim.groups import reshard
from robust_dist.ranks.talk import on_rank_0
from robust_dist.train.bad_images import BadImages, TooManyBadImagesError, is_time_to_count
from robust_dist.train.build import (
    build_augment,
    build_classifier,
    build_optimizer,
    build_schedule,
    check_model,
    images_dtype,
)
from robust_dist.train.checkpoints import Progress, RunCheckpoints, check_finite
from robust_dist.train.display import Display, Figures, Profiling, build_meter, measured
from robust_dist.train.evaluate import Score, average_buffers, broadcast_buffers, evaluate, use_averaged_weights
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import require
from robust_dist.train.metrics import LEAST_FOR_TOP5, MOST_LISTED, early_stop
from robust_dist.train.recipe import Recipe
from robust_dist.train.sources import build_loader, preprocessing_of
from robust_dist.train.step import TrainStep
from robust_dist.train.stop import Stopper
from robust_dist.train.trackers import Trackers
from robust_dist.train.watchdog import tick
from robust_dist.train.weights import begin

# Longer than any measurement, so that the schedule does not end.
_EPOCHS = 10_000


class Trainer:
    """One run of a recipe on this rank, in a folder that the main process has claimed or will claim.

    Raises:
        ValueError: A setting cannot work; raised before the first step.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, folder: RunFolder, train_set: LabelledSet, test_set: LabelledSet
    ) -> None:
        self.recipe, self.accelerator, self.folder = recipe, accelerator, folder
        self.train_set, self.test_set = train_set, test_set
        self.trackers = Trackers(recipe, accelerator, folder.path)
        self.loader = build_loader(recipe, accelerator, train_set)
        self.total_steps = recipe.epochs * self.loader.steps_per_epoch
        bad_images = folder.path / "bad_images.txt"
        self.bad = BadImages(bad_images, recipe.data.max_bad_share) if recipe.data.streamed else None
        classes = len(train_set.classes)
        if recipe.early_stopping.patience is not None and recipe.early_stopping.metric == "eval_top5_accuracy":
            wanted = f"another one for {classes} classes: eval_top5_accuracy is recorded from {LEAST_FOR_TOP5} on"
            require(classes >= LEAST_FOR_TOP5, "early_stopping.metric", recipe.early_stopping.metric, wanted)
        self.eval_augment = build_augment(recipe, classes, evaluation=True).to(accelerator.device)
        self.engine = engine_of(accelerator)
        contiguous = not self.engine.trains_any_memory_format
        model = build_classifier(recipe, classes, train_set.channels, contiguous=contiguous)
        check_model(accelerator, recipe, model)
        self.begun = begin(recipe, accelerator, folder, model, tuple(train_set.classes))
        dtype = images_dtype(accelerator.mixed_precision, model, train_set.channels, preprocessing_of(recipe.data).size)
        self.augment = build_augment(recipe, classes, dtype=dtype).to(accelerator.device)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(recipe, model, self.total_steps, num_classes=classes)
        schedule = build_schedule(recipe, optimizer, self.total_steps)
        self.meter = build_meter(recipe, accelerator, model, self.augment.image_shape)
        self.model, self.optimizer, self.schedule = self.engine.prepare(accelerator, model, optimizer, schedule)
        check(
            accelerator,
            self.optimizer,
            num_processes=recipe.num_processes,
            schedule=self.schedule,
            total_steps=self.total_steps,
            optimizer_class=type(optimizer),
        )
        self.bare_model: nn.Module = accelerator.unwrap_model(self.model)
        # Equal weights on all ranks, but each rank's own dropout masks.
        set_seed(recipe.seed % 2**31, device_specific=True)
        self.ema = self._build_ema()
        self.early_stop: str | None = None
        if self.ema is not None and self.begun.average is not None:
            self.ema.load_state_dict(self.begun.average)
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
        self.checkpoints = RunCheckpoints(
            recipe,
            accelerator,
            folder,
            train_set=train_set,
            progress=self.progress,
            model=self.model,
            optimizer=self.optimizer,
        )

    def fit(self) -> list[dict[str, Any]]:
        """Train from the folder's newest checkpoint to the last epoch; returns the rows of `metrics.jsonl`.

        Raises:
            CheckpointError: There are checkpoints but none can be used, or one cannot be written.
            DivergedError: The loss is no longer finite.
            Stopped: A signal asked for it; everything is saved.
            TooManyBadImagesError: More images are unreadable than allowed; everything is saved.
        """
        tick("taking up the run", may_be_slow=True)
        self.checkpoints.take_up(self.total_steps, self.loader.steps_per_epoch)
        done = self.progress.step
        self.trackers.start(done)
        # The first step compiles, tunes and connects.
        tick("the first step", may_be_slow=True)
        with (
            self.checkpoints.saver() as self.saver,
            Stopper(self.saver) as self.stopper,
            Display(self.recipe, self.accelerator, self.total_steps, done, self.meter) as display,
            Profiling(self.recipe, self.accelerator, self.folder.path, self.total_steps, done) as profiling,
        ):
            try:
                self._run(display, profiling)
            except TooManyBadImagesError:
                # The run resumes here once they are replaced. Before its first step a sharded optimizer has no state.
                begun = self.progress.step > 0 or self.engine.steps_whole_parameters
                if begun and self.progress.step not in (self.saver.saved, self.progress.resumed_step):
                    self._save(refused=True)
                self.saver.wait()
                raise
            tick("the last checkpoint", may_be_slow=True)
            self.saver.wait()
        if self.early_stop is not None:
            self.accelerator.print(self.early_stop)
        if self.saver.count:
            self.accelerator.print(self.saver.summary())
        return self.folder.metrics()

    def _run(self, display: Display, profiling: Profiling) -> None:
        if self.recipe.data.in_memory:
            # Every rank has decoded all images.
            bad = BadImages(self.folder.path / "bad_images.txt", self.recipe.data.max_bad_share)
            if self.accelerator.is_main_process:
                bad.note([image for of in (self.train_set, self.test_set) for image in getattr(of, "unreadable", ())])
            bad.count(0)
        if self.bad is not None and (self.progress.unfinished or self.progress.step < self.total_steps):
            tick("the check of the evaluation images", may_be_slow=True)
            self.bad.check_headers(self.test_set)
            tick("the first step", may_be_slow=True)
        if self.progress.unfinished:
            display.epoch(self._record_epoch(None))
        if self.progress.step % self.loader.steps_per_epoch == 0:
            self._consider_early_stop()
        while self.progress.step < self.total_steps and self.early_stop is None:
            epoch, start = divmod(self.progress.step, self.loader.steps_per_epoch)
            figures = self._train_epoch(epoch, start, display, profiling)
            display.epoch(self._finish_epoch(epoch, figures))
            if self.stopper.stop and self.progress.step < self.total_steps and self.early_stop is None:
                self._leave()

    def _train_epoch(self, epoch: int, start: int, display: Display, profiling: Profiling) -> Figures:
        """Train the rest of an epoch; returns what was measured."""
        every = self.recipe.checkpoint.every_steps
        self.model.train()
        # After an evaluation FSDP2 holds whole weights, in which changes to its shards would not be seen.
        reshard(self.bare_model)
        self.optimizer.train()
        self.meter.begin()
        for parts in self.meter.fetch(self.loader.epoch(epoch, start)):
            self.train_step(parts)
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

    def train_step(self, parts: list[Batch]) -> None:
        """One optimizer step: the mean loss over the global batch, however it is divided."""
        group = max(self.optimizer.param_groups, key=lambda group: float(group["weight_decay"]))
        self.progress.lr, self.progress.weight_decay = float(group["lr"]), float(group["weight_decay"])
        if not self.engine.broadcasts_buffers:
            broadcast_buffers(self.bare_model)
        self.step(parts)
        if self.ema is not None:
            self.ema.update_parameters(self.bare_model)
        self.progress.step += 1

    def _note_bad_images(self) -> None:
        """Count the last step's bad images; at some steps the ranks exchange counts."""
        if self.bad is not None:
            found = self.loader.take_bad()
            self.progress.bad_images += len(found)
            self.bad.note(found)
            step = self.progress.step % self.loader.steps_per_epoch
            # The epoch's last step is judged with the epoch's figures.
            if step and is_time_to_count(step):
                self._judge_bad_images(self._count_bad_images())

    def _count_bad_images(self) -> int:
        return 0 if self.bad is None else self.bad.count(self.progress.bad_images)

    def _judge_bad_images(self, total: int) -> None:
        if self.bad is not None:
            self.bad.judge(total, self.loader.samples_per_epoch, self.train_set.name, forgiven=self.progress.forgiven)

    def _finish_epoch(self, epoch: int, figures: Figures) -> dict[str, Any]:
        tick(f"the end of epoch {epoch + 1}")
        use_averaged_weights(self.optimizer, self.model, self.loader, epoch, lambda batch: self.step.inputs(batch)[0])
        average_buffers(self.bare_model)
        bad_images = self._count_bad_images()
        total_loss = self.accelerator.reduce(self.progress.loss_sum.clone(), "sum").item()
        train_loss = total_loss / max(1, self.loader.samples_per_epoch - bad_images)
        check_finite(train_loss, self.progress.step, self.recipe.optimizer)
        self.progress.unfinished = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "lr": self.progress.lr if self.step.measured_rate is None else self.step.measured_rate,
            "weight_decay": self.progress.weight_decay,
            "bad_images": bad_images,
        }
        try:
            self._judge_bad_images(bad_images)
            return self._record_epoch(figures)
        except TooManyBadImagesError:
            self.progress.unfinished["measured"] = measured(self.meter, figures, self.accelerator)
            raise

    def _record_epoch(self, figures: Figures | None) -> dict[str, Any]:
        """Evaluate, record and save the trained epoch; `figures` is None if it was measured before."""
        trained, accelerator = self.progress.unfinished, self.accelerator
        assert trained is not None
        if self.ema is not None:
            # Each rank averages its own statistics; a checkpoint holds the first rank's.
            broadcast_buffers(self.ema.module)
        score = self.evaluate()
        row = {
            "epoch": trained["epoch"],
            "step": self.progress.step,
            "train_loss": trained["train_loss"],
            "eval_accuracy": score.accuracy,
            "eval_loss": score.loss,
            "eval_samples": score.samples,
            "eval_top5_accuracy": score.top5,
            "eval_mean_class_accuracy": score.mean_class_accuracy,
            "lr": trained["lr"],
            "weight_decay": trained["weight_decay"],
        }
        row |= trained["measured"] if figures is None else measured(self.meter, figures, accelerator)
        row["checkpoint_seconds"] = self.saver.take_seconds()
        if self.bad is not None:
            row["bad_images"] = trained["bad_images"]
            row["eval_bad_images"] = self.bad.count_evaluation(self.test_set)
        row["eval_class_accuracy"] = list(score.class_accuracy) if len(score.class_accuracy) <= MOST_LISTED else None
        on_rank_0(lambda: self.folder.append(row))
        self.trackers.log(row)
        self.progress.begin_epoch()
        self._consider_early_stop()
        every = self.recipe.checkpoint.every_epochs
        is_last = trained["epoch"] == self.recipe.epochs or self.early_stop is not None
        due = trained["epoch"] % every == 0 or is_last
        if (due or self.stopper.stop) and self.progress.step != self.progress.resumed_step:
            self._save(score.accuracy)
        tick(f"step {self.progress.step + 1}")
        return row

    def _consider_early_stop(self) -> None:
        """After a recorded epoch: the same decision on every rank, at this start and the next."""
        config = self.recipe.early_stopping
        if config.patience is not None:
            self.early_stop = on_rank_0(lambda: early_stop(self.folder.metrics(), config))

    def evaluate(self) -> Score:
        """The score of the weights to evaluate: their average if there is one."""
        whole = self.ema.module if self.ema is not None else self.bare_model
        return evaluate(
            self.model if self.engine.forward_is_collective else whole,
            self.test_set,
            self.eval_augment,
            batch_size=self.recipe.data.eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            dtype=self.step.input_dtype,
        )

    def _build_ema(self) -> AveragedModel | None:
        if self.recipe.ema_decay is None:
            return None
        average = get_ema_multi_avg_fn(self.recipe.ema_decay)
        ema = AveragedModel(self.bare_model, multi_avg_fn=average, use_buffers=True)
        self.accelerator.register_for_checkpointing(ema)
        return ema

    def _save(self, accuracy: float | None = None, *, refused: bool = False) -> None:
        """Save; the checkpoint counts once it is complete.

        `accuracy` is from the evaluation at this step, if there was one. With `refused` the run stops because of bad
        images.
        """
        tick(f"the checkpoint of step {self.progress.step}")
        losses = self.checkpoints.finite_losses()
        bad_images = self._count_bad_images()
        if not refused:
            self._judge_bad_images(bad_images)
        if not self.engine.broadcasts_buffers:
            # A sharded checkpoint takes a buffer from any rank; the next step starts from the first rank's.
            broadcast_buffers(self.bare_model)
        self.checkpoints.save(self.saver, losses, bad_images, accuracy, refused=refused)

    def _leave(self) -> None:
        if self.saver.saved != self.progress.step:
            self._save()
        tick("the last checkpoint", may_be_slow=True)
        self.saver.wait()
        self.stopper.leave(self.folder, self.progress.step, self.total_steps)


def random_set(count: int, shape: Sequence[int], num_classes: int, device: torch.device) -> ImageSet:
    """A set of noise on the device, the same on each call: uint8 [count, *shape] (C, H, W) and int64 labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    return ImageSet(images.to(device), labels.to(device), tuple(map(str, range(num_classes))), "random images")


class Trial:
    """A trainer that steps over random images without end; nothing is kept in its folder.

    The recipe's engine must have been fitted (`fit_engine`), and both sets lie on the device. A setting that cannot
    work is a ValueError.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, folder: Path, train_set: ImageSet, test_set: ImageSet
    ) -> None:
        tracking = replace(recipe.tracking, trackers=[], progress=False)
        recipe = replace(recipe, run_dir=str(folder), epochs=_EPOCHS, num_processes=None, tracking=tracking)
        # The initial weights do not affect a step's cost.
        model = replace(recipe.model, weights=None)
        recipe = replace(recipe, model=model, init_from=None, init_checkpoint="last")
        self.trainer = Trainer(recipe, accelerator, RunFolder(folder), train_set, test_set)
        self.trainer.model.train()
        self.trainer.optimizer.train()
        self.parts = self._parts()
        self.batch = next(self.parts)[0]

    def step(self) -> None:
        """One optimizer step on the next batch."""
        self.trainer.train_step(next(self.parts))

    def augment(self) -> tuple[Tensor, Tensor]:
        """The augmentation of one batch, always the same one."""
        return self.batch.augmented(self.trainer.step.pipeline)

    def evaluate(self) -> None:
        """One evaluation over all evaluation images."""
        self.trainer.evaluate()

    def _parts(self) -> Iterator[list[Batch]]:
        for epoch in itertools.count():
            yield from self.trainer.loader.epoch(epoch)
