"""The entry of `launch/train.py`: from the command line to a finished run."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from robust_dist.engines.accelerate import EngineError
from robust_dist.schedule import RankDisagreementError
from robust_dist.train.agree import attempt, check_ranks_agree
from robust_dist.train.build import build_accelerator, load_sets
from robust_dist.train.curves import plot_curves
from robust_dist.train.engine import fit_engine
from robust_dist.train.folder import RunFolder, environment
from robust_dist.train.loop import DivergedError, Trainer
from robust_dist.train.recipe import Recipe, parse_recipe

# Exit status of a run whose loss is no longer finite: a result rather than a mistake.
DIVERGED = 3


def train(recipe: Recipe, accelerator: Accelerator | None = None) -> list[dict[str, Any]]:
    """Run a recipe on this rank, or go on with it where its folder stands.

    Args:
        recipe: All settings.
        accelerator: The engine; built from the recipe where None.

    Returns:
        The rows of `metrics.jsonl`, oldest first.

    Raises:
        ValueError: A setting, a file or a folder that cannot be used; on every rank, before the first step.
        DivergedError: The loss is no longer finite.
    """
    accelerator = accelerator or build_accelerator(recipe)
    check_ranks_agree(accelerator, recipe)
    fit_engine(accelerator, recipe)
    folder = RunFolder(recipe.run_dir)
    sets = load_sets(recipe, accelerator)
    trainer = Trainer(recipe, accelerator, folder, *sets)
    main = accelerator.is_main_process
    note = environment(accelerator.num_processes, accelerator.device, accelerator.distributed_type.value)
    attempt(accelerator, lambda: folder.claim(recipe, note), here=main)
    try:
        rows = trainer.fit()
        attempt(accelerator, lambda: plot_curves(rows, folder.path / "curves.png"), here=main)
        accelerator.wait_for_everyone()
    finally:
        folder.release()
    accelerator.end_training()
    return rows


def _parse(args: Sequence[str] | None) -> Recipe:
    """Every rank parses; the first one of each host tells what is wrong."""
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        return parse_recipe(args)


def main(args: Sequence[str] | None = None) -> None:
    """Train from the command line.

    A user's error ends with one message and exit status 2, a loss that is no longer finite with `DIVERGED`.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = _parse(args)
        rows = train(recipe)
    except (ValueError, DivergedError, EngineError, RankDisagreementError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(DIVERGED if isinstance(error, DivergedError) else 2)
    if first:
        last = rows[-1]
        print(f"\naccuracy {last['eval_accuracy']:.2%} on {last['eval_samples']} held-out images of {recipe.data.name}")
        print(f"curves: {os.path.join(recipe.run_dir, 'curves.png')}")
