"""Trained runs for these tests: one launch of two gloo ranks trains them all."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.train.under_engines import train_under
from tests.versions import TORCH_2_7

CLASSES = ("ant", "bee", "cat", "dog")
VIT = ["--model.name", "timm/test_vit", "--model.options", "{img_size: 16, patch_size: 8}"]
LOW = ["--precision.mixed", "bf16"]
PLAIN = ["--augment.trivial", "false", "--augment.cutmix", "false"]
SCHEDULE_FREE = ["--optimizer.name", "schedulefree_adamw", "--schedule.name", "constant", "--optimizer.lr", "0.01"]
# Three steps, with a checkpoint after the second.
FILES = ["--data.name", "imagefolder", "--data.size", "16", "--data.eval_resize", "20", "--data.workers", "0"]
FILES += ["--batch_size", "16", "--checkpoint.every_steps", "2"]
# No accuracy is higher by more than 1, so these runs end after the second of their five epochs.
EARLY = ["--epochs", "5", "--early_stopping.patience", "1", "--early_stopping.min_delta", "1"]
SOURCES = ("--init_from", "--model.weights")
# Rates of 1e-12 and, for the head, 0.01.
HEAD_ALONE = ["--optimizer.lr", "1e-12", "--optimizer.head_lr_mult", "1e10", "--optimizer.beta2", "0.9"]
# torch 2.6 runs FSDP2 on GPUs alone.
FSDP2 = "fsdp2" if TORCH_2_7 else "fsdp1"
# Name: engine, and what it adds to tests.train.under_engines.WORDS. ZeRO last: DeepSpeed changes functions of torch.
RUNS = {
    "ddp": ("ddp", LOW),
    "average": ("ddp", [*FILES, "--ema_decay", "0.6"]),
    "schedule-free": ("ddp", [*FILES, *SCHEDULE_FREE]),
    "fsdp2": (FSDP2, []),
    "fsdp2 bf16": (FSDP2, [*FILES, *VIT, *LOW, "--optimizer.name", "radam"]),
    "average again": ("ddp", [*FILES, "--ema_decay", "0.6", "--optimizer.lr", "0", "--init_from", "average"]),
    "fsdp2 again": (FSDP2, [*FILES, *VIT, "--optimizer.lr", "0", "--init_from", "fsdp2 bf16"]),
    "zero2": ("zero2", []),
    "zero2 bf16": ("zero2", [*FILES, *VIT, *LOW, "--optimizer.name", "adamw", *EARLY]),
    "zero3": ("zero3", [*FILES, *VIT, "--optimizer.name", "nag", *EARLY]),
    "zero3 head": ("zero3", [*FILES, *VIT, *HEAD_ALONE, "--model.weights", "fsdp2 again"]),
}


def write_images(folder):
    """48 images to train on and 24 to evaluate on, of four classes and several sizes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for number, name in enumerate(CLASSES):
            Path(folder, part, name).mkdir(parents=True)
            for index in range(count):
                levels = draw.integers(0, 120, (21 + index, 30, 3), dtype=np.uint8)
                levels[..., number % 3] += np.uint8(40 * (number + 1) // 2)
                Image.fromarray(levels).save(Path(folder, part, name, f"{index}.png"))


def train_all(folder):
    """Train every run; on each rank. Returns what each printed."""
    return {
        name: train_under(
            engine, f"{folder}/{name}", "--data.root", f"{folder}/images", *PLAIN, *_placed(folder, words)
        )
        for name, (engine, words) in RUNS.items()
    }


def _placed(folder, words):
    """The words, with the place of the run that they begin from."""
    return [
        f"{folder}/{word}" if word in RUNS and words[place - 1] in SOURCES else word for place, word in enumerate(words)
    ]
