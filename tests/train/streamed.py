"""Code of test_streamed.py's ranks: recipes for streamed sets, on tiny sets, with training reads logged."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist

from tests.data import tiny_sets
from tests.data.coloured import logged
from tests.train.under_engines import ROOT, train_under

N, EVAL, BATCH, EPOCHS = 52, 13, 16, 2
STEPS = 4
LABELS = [i * 7 % 3 for i in range(N)]
KEYS = ("epoch", "step", "train_loss", "eval_accuracy", "eval_loss", "eval_samples", "lr", "weight_decay")
KEYS += ("bad_images", "eval_bad_images")
# Steps 2 and 6 lie in mid-epoch.
SMALL = ["--batch_size", str(BATCH), "--epochs", str(EPOCHS), "--checkpoint.every_steps", "2", "--checkpoint.keep", "9"]
SMALL += ["--data.size", "32", "--data.eval_size", "48", "--data.eval_resize", "56", "--data.eval_batch_size", "4"]
SMALL += ["--data.workers", "0", "--data.block", "2", "--data.shuffle_window", "12", "--data.drop_last", "false"]
SMALL += ["--schedule.warmup_steps", "0", "--optimizer.no_decay", "[]"]
EXACT = ["--precision.mixed", "no"]
RESNET = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
# No batch normalisation, whose statistics are each rank's own; its tokens are averaged, so any size will do.
VIT = ["--model.name", "timm/test_vit3", "--model.options", "{dynamic_img_size: true, img_size: 32, global_pool: avg}"]


def recipes(sets):
    """Recipe and format to the arguments that substitute the tiny set and model."""
    shards = ["--data.root", f"{sets}/shards", "--data.train", "train-*.tar", "--data.eval", "val-*.tar"]
    whole = ["--data.root", f"{sets}/folder", "--data.eval_share", "null"]
    table = ["--data.path", f"{sets}/parquet"]
    return {
        "imagenet_resnet50": [*RESNET, "--data.root", f"{sets}/folder"],
        "imagenet_vit_small": [*VIT, "--data.root", f"{sets}/folder"],
        "imagenet_resnet50_shards": [*RESNET, *shards, "--data.num_classes", "3"],
        "imagefolder": [*VIT, "--data.root", f"{sets}/folder"],
        "imagefolder_small": [*RESNET, *whole, "--optimizer.beta2", "0.99"],
        "hub": [*RESNET, *table],
        "hub, streaming": [*VIT, *table, "--data.streaming", "true", "--data.spool_dir", f"{sets}/spool"],
    }


def write_sets(folder):
    """A tiny set in each format, with the same images in groups of several sizes."""
    for part, labels in {"train": LABELS, "val": LABELS[:EVAL]}.items():
        tiny_sets.write_image_folder(f"{folder}/folder/{part}", labels)
        tiny_sets.write_shards(f"{folder}/shards", labels, prefix=part)
        split = {"train": "train", "val": "validation"}[part]
        tiny_sets.write_parquet(f"{folder}/parquet", labels, split, classes=tiny_sets.CLASSES[:3])


class Logged:
    """A source that records what is read from it."""

    def __init__(self, source, log):
        self.source, self.log = source, log
        self.name, self.classes, self.group_sizes = source.name, source.classes, source.group_sizes

    def __len__(self):
        return len(self.source)

    def read(self, index):
        with open(self.log, "ab", buffering=0) as file:
            file.write(b"%d\n" % index)
        return self.source.read(index)

    def where(self, index):
        return self.source.where(index)


def log_reads(log):
    """Log this process's training reads to the file from now on; returns a function that undoes this."""
    from robust_dist.train import sources

    real, told = sources.open_source, sources.tell_exif

    def logging(data, part, classes, *, download):
        source = real(data, part, classes, download=download)
        return Logged(source, log) if part == "train" else source

    def undo():
        sources.open_source, sources.tell_exif = real, told

    sources.open_source = logging
    # The look at the first images at the start does not belong to an epoch.
    sources.tell_exif = lambda *args: None
    return undo


def run(recipe, sets, run_dir, *words, log=None, fails=False, engine="ddp"):
    """Train a recipe under an engine; returns what was printed."""
    name = recipe.partition(",")[0]
    undo = log_reads(log) if log else lambda: None
    try:
        config = ["--config", str(ROOT / "configs" / "recipes" / f"{name}.yaml")]
        # WORDS, which train_under puts first, are overridden by the file, and the file by what follows it.
        words = [*SMALL, *EXACT, *recipes(sets)[recipe], *words, "--run_dir", run_dir]
        out = train_under(engine, run_dir, *config, *QUIET, *words)
    finally:
        undo()
    assert fails or dist.get_rank() or "held-out images" in out, out
    return out


QUIET = ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]


def rows(run_dir):
    """The metrics that do not measure time."""
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in KEYS} for line in lines]


def steps(run_dir):
    return sorted(int(path.name.removeprefix("step-")) for path in Path(run_dir, "checkpoints").glob("step-*"))


def on_first_rank(action):
    """Let one rank change files while the others wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def cut_back(run_dir, step):
    """Turn the run into one that was killed after step `step` and before its next checkpoint."""
    for later in steps(run_dir):
        if later > step:
            shutil.rmtree(Path(run_dir, "checkpoints", f"step-{later:08d}"))
    kept = [
        line for line in Path(run_dir, "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step
    ]
    Path(run_dir, "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))


def by_step(log, world_size=1):
    """A rank's reads, cut at its steps: lists of numbers, an epoch's last one shorter."""
    numbers, sizes = logged(log), [BATCH] * (N // BATCH) + [N % BATCH] * (N % BATCH > 0)
    found, start = [], 0
    for size in [size // world_size for size in sizes * (len(numbers) * world_size // N + 1)]:
        found.append(numbers[start : start + size])
        start += size
    return [one for one in found if one]
