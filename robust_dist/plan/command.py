"""The words of `robust-dist plan`."""

import argparse
import json
from typing import Any

from robust_dist.own_code import add_argument
from robust_dist.plan.question import DTYPES, Question

# What --check runs by default: large enough to show beside a process's own memory.
CHECK_MODEL, CHECK_SIZE, CHECK_BATCH = "resnet50", 96, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser; those left out stay None, so that a recipe may give them."""
    add = parser.add_argument
    add("--model", help="a model: resnet56, a torchvision name, timm/NAME, your own as MODULE:NAME")
    add("--config", help="a recipe, in YAML or by name, for model, batch, precision and image size")
    add_argument(parser)
    add("--nodes", type=int, help="machines (default: 1)")
    add("--gpus-per-node", type=int, help="GPUs of each (default: 8)")
    add("--gpu", help="h100, a100-80, ... (default: h100)")
    add("--memory-gb", type=float, dest="memory_gib", help="memory of a GPU, GiB, in place of the table's")
    add("--batch-size", type=int, help="global batch: images per optimizer step (default: 128)")
    add("--micro-batch", type=int, help="images at a time and GPU (default: the most that fits)")
    add("--image-size", type=int, help="height and width, pixels (default: 224)")
    add("--num-classes", type=int, help="outputs (default: 1000)")
    add("--in-channels", type=int, help="channels of the images (default: 3)")
    add("--precision", choices=[*DTYPES], help="mixed precision (default: no)")
    add("--intra-gbps", type=float, help="link between a node's GPUs, Gbit/s a GPU and direction")
    add("--inter-gbps", type=float, help="network between nodes, Gbit/s a GPU and direction")
    add("--mfu", type=float, help="share of the peak rate that the model reaches (default: 0.35)")
    add("--margin", type=float, help="share of the memory to leave free (default: 0.1)")
    add("--json", action="store_true", help="print plain values in place of tables")
    add("--check", action="store_true", help="run nodes x gpus-per-node CPU ranks here: predicted beside measured")


_SETTINGS = [name for name in Question.__dataclass_fields__ if name not in ("options", "recipe")]


def question_of(words: argparse.Namespace) -> Question:
    """The question on the command line; what it omits comes from the recipe, then from the defaults.

    Raises:
        ValueError: Neither a model nor a recipe is given, or a value is out of its range.
    """
    given = {name: getattr(words, name) for name in _SETTINGS if getattr(words, name) is not None}
    known = {**(_from_recipe(words.config) if words.config else {}), **given}
    if "model" not in known and not words.check:
        raise ValueError("--model or --config is needed: say what is to be trained, e.g. --model resnet50")
    if words.check:
        defaults = {"model": CHECK_MODEL, "image_size": CHECK_SIZE, "gpus_per_node": 2, "micro_batch": CHECK_BATCH}
        known = {**defaults, **known}
        world = known.get("nodes", 1) * known["gpus_per_node"]
        known["batch_size"] = world * known["micro_batch"]
    return Question(**known)


def _from_recipe(path: str) -> dict[str, Any]:
    from robust_dist.train.recipe import load_recipe
    from robust_dist.train.sources import known_info

    recipe = load_recipe(path)
    known = {
        "model": recipe.model.name,
        "options": recipe.model.options,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision.mixed,
        "recipe": path,
    }
    info = known_info(recipe.data)
    size = getattr(recipe.data, "image_size", None) or getattr(info, "size", None)
    return known | ({"image_size": size} if isinstance(size, int) else {})


def run(words: argparse.Namespace) -> int:
    """Print a plan; status 1 if nothing fits, or if a check is off by more than 15 %."""
    question = question_of(words)
    if words.check:
        return _check(question)
    from robust_dist.plan.choose import plan
    from robust_dist.plan.show import as_text, as_values

    found = plan(question)
    print(json.dumps(as_values(found), indent=2) if words.json else as_text(found))
    return 0 if found.best is not None else 1


def _check(question: Question) -> int:
    from robust_dist.plan.check import TOLERANCE, compare, show

    assert question.micro_batch is not None
    rows = compare(question, question.micro_batch)
    print(show(rows))
    return 0 if all(row.exact and abs(row.error) <= TOLERANCE for row in rows) else 1
