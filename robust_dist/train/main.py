"""The entry point of `launch/train.py`: from the command line to a finished run."""

import contextlib
import faulthandler
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from robust_dist import own_code
from robust_dist.engines.accelerate import EngineError
from robust_dist.models.registry import builder_of
from robust_dist.private import hidden, hidden_text
from robust_dist.ranks.claim import FolderLostError
from robust_dist.ranks.talk import agree, attempt, on_rank_0, origin_of
from robust_dist.schedule import RankDisagreementError
from robust_dist.train.build import build_accelerator, changed_sources, check_own, fit_engine, fit_ranks, own_sources
from robust_dist.train.checkpoints import DivergedError
from robust_dist.train.curves import plot_curves
from robust_dist.train.data_record import check_parts, data_record
from robust_dist.train.failures import Rank, record_failure, report_failure, report_shared, set_aside, tell_launcher
from robust_dist.train.folder import RunFolder, environment
from robust_dist.train.loop import Trainer
from robust_dist.train.metrics import last_row
from robust_dist.train.opening import backends_of, data_lines, data_notes, decoder_note, part_lines, say_run
from robust_dist.train.optimizers import check_fits
from robust_dist.train.output import LastingOutput
from robust_dist.train.parse import check_recipe_is_named
from robust_dist.train.recipe import Recipe, flatten, parse_recipe, recipe_dict
from robust_dist.train.sources import load_sets, preprocessing_of, with_decoder
from robust_dist.train.stop import STOPPED_STATUS, Stopped, check_not_stopped
from robust_dist.train.trackers import check_trackers
from robust_dist.train.watchdog import HANG_STATUS, STDERR, HangError, Watchdog, say, tick
from robust_dist.train.weights import check_there

# Raised on every rank, wherever they come from.
_FOR_ALL = (DivergedError, EngineError, FolderLostError, RankDisagreementError)
_SECONDS_TO_LEAVE, _SECONDS_TO_END = 60.0, 5.0
# Exit status of a run whose loss is no longer finite: a result, not a mistake.
DIVERGED = 3


def train(
    recipe: Recipe, accelerator: Accelerator | None = None, on_claim: Callable[[Path], None] = lambda folder: None
) -> list[dict[str, Any]]:
    """Run a recipe on this rank, or resume it from its folder; returns the rows of `metrics.jsonl`.

    Args:
        recipe: All settings.
        accelerator: The engine; None creates it from the recipe.
        on_claim: Called with the run's folder once it belongs to this run.

    Raises:
        ValueError: A setting, file or folder cannot be used; raised on every rank, before the first step.
        DivergedError: The loss is no longer finite.
        Stopped: A signal asked for it; everything is saved.
    """
    accelerator = accelerator or build_accelerator(recipe)
    attempt(lambda: check_own(recipe))
    check_ranks_agree(recipe)
    folder, asked = RunFolder(recipe.run_dir), recipe
    stopped = on_rank_0(folder.stop_note)
    attempt(lambda: check_not_stopped(stopped))
    recipe = fit_ranks(recipe, accelerator)
    fit_engine(accelerator, recipe)
    main = accelerator.is_main_process
    on_rank_0(lambda: _check_begins(asked, folder))
    tick("loading the data", may_be_slow=True)
    noted = on_rank_0(folder.decoder)
    sets = load_sets(replace(recipe, data=with_decoder(recipe.data, accelerator.device, noted)), accelerator)
    sources = own_sources(recipe)
    warnings = on_rank_0(lambda: [*check_parts(recipe.data, sets), *changed_sources(folder, sources)])
    if main:
        print(*data_lines(sets, recipe.data.keep_on), *part_lines(sets), sep="\n", flush=True)
    tick("building the model", may_be_slow=True)
    trainer = Trainer(recipe, accelerator, folder, *sets)
    backends = backends_of(recipe, accelerator, trainer.optimizer, trainer.augment)
    on_rank_0(lambda: say_run(recipe, accelerator, sets, trainer, backends, warnings))
    note = environment(accelerator.num_processes, accelerator.device, accelerator.distributed_type.value)
    note |= {"data": data_notes(sets), "backends": asdict(backends)} | ({"own_code": sources} if sources else {})
    note |= decoder_note(sets[0])
    note |= {"weights": trainer.begun.lines[0].removeprefix("weights: ")} if trainer.begun.lines else {}
    record = on_rank_0(lambda: data_record(recipe, sets, preprocessing_of(recipe.data)))
    on_rank_0(lambda: folder.claim(asked, note, record))
    on_rank_0(lambda: set_aside(folder.path))
    on_claim(folder.path)
    try:
        rows = trainer.fit()
        tick("the end", may_be_slow=True)
        on_rank_0(lambda: plot_curves(rows, folder.path / "curves.png", recipe))
        accelerator.wait_for_everyone()
    finally:
        folder.release()
    accelerator.end_training()
    return rows


def _check_begins(recipe: Recipe, folder: RunFolder) -> None:
    """Report every unusable thing that a recipe names, in one message, before the data is opened."""
    found: list[ValueError] = []
    for check in (
        lambda: folder.check_usable(recipe),
        lambda: builder_of(recipe.model.name),
        lambda: check_fits(recipe),
        lambda: check_there(recipe, folder),
        lambda: check_trackers(recipe.tracking.trackers),
    ):
        try:
            check()
        except ValueError as error:
            found.append(error)
    if len(found) > 1:
        raise ValueError("\n  ".join(map(str, found)))
    if found:
        raise found[0]


def check_ranks_agree(recipe: Recipe) -> None:
    """Compare the recipe, and the user's own code that it names, between ranks.

    Raises:
        ValueError: On every rank, with each differing setting and its values.
    """
    problem = "the ranks were started with different settings; start all with the same ones"
    sources = {f"the source of {name}": found["sha256"] for name, found in own_sources(recipe).items()}
    agree(flatten(hidden(recipe_dict(recipe))) | sources, problem)


def _parse(args: Sequence[str] | None, kind: type[Recipe]) -> Recipe:
    """Parse on every rank; the first rank of each host reports errors."""
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        recipe = parse_recipe(args, kind)
    check_recipe_is_named(sys.argv[1:] if args is None else args)
    return recipe


def main(args: Sequence[str] | None = None, kind: type[Recipe] = Recipe) -> None:
    """Train from the command line, under a watchdog.

    Args:
        args: Command-line words; None: `sys.argv`.
        kind: The recipe's class: Recipe, or a subclass with your own keys.

    Raises:
        SystemExit: 2 after a user error, with one message; `DIVERGED` if the loss is no longer finite; 75 after a
            signal stopped and saved the run; 1 after any other error, with one traceback. The watchdog ends a hanging
            rank with `watchdog.HANG_STATUS`.
    """
    rank = Rank()
    if not faulthandler.is_enabled():
        faulthandler.enable(STDERR)
    with LastingOutput(rank) as output:
        _run(args, kind, rank, output)


def _run(args: Sequence[str] | None, kind: type[Recipe], rank: Rank, output: LastingOutput) -> None:
    try:
        recipe = _parse(args, kind)
        with Watchdog(rank, recipe.timeout_seconds, lambda reason: _note_hang(reason, rank)):
            rows = train(recipe, on_claim=output.claimed)
    except Stopped as stopped:
        if rank.number == 0:
            print(f"\n{stopped}", flush=True)
        sys.exit(STOPPED_STATUS)
    except Exception as error:
        sys.exit(_fail(error, rank))
    if rank.number == 0:
        _say_end(recipe, rows)


def _say_end(recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    last = last_row(rows, recipe.epochs, recipe.early_stopping)
    if last is None:
        print("\nfinished; metrics.jsonl has no row of the last epoch, so there is no accuracy to show")
    else:
        seen = f"{last['eval_samples']} held-out images of {recipe.data.title}"
        early = "" if last["epoch"] == recipe.epochs else f", in epoch {last['epoch']} of {recipe.epochs}"
        print(f"\naccuracy {last['eval_accuracy']:.2%} on {seen}{early}")
    print(f"curves: {os.path.join(recipe.run_dir, 'curves.png')}")
    if "tensorboard" in recipe.tracking.trackers:
        print(f"tensorboard: tensorboard --logdir {shlex.quote(os.path.join(recipe.run_dir, 'trackers'))}")
    run = "".join(f"--import {module} " for module in sorted(own_code.named)) + shlex.quote(recipe.run_dir)
    print(f"use it: robust-dist evaluate {run}; robust-dist predict {run} IMAGE ...")


def _fail(error: Exception, rank: Rank) -> int:
    """Report an error once; returns the exit status."""
    origin = origin_of(error)
    users = isinstance(error, (ValueError, *_FOR_ALL))
    if users and (rank.folder is None or origin is not None or isinstance(error, _FOR_ALL)):
        # The same on every rank.
        if rank.number == 0:
            record_failure(error, rank, "failed", origin)
            print(f"error: {hidden_text(str(error))}", file=sys.stderr, flush=True)
        tell_launcher(str(error), f"error: {error}")
        return DIVERGED if isinstance(error, DivergedError) else 2
    # A rank that has lost its peers may wait for them again while it shuts down its process group.
    faulthandler.dump_traceback_later(_SECONDS_TO_LEAVE, exit=True, file=STDERR)
    if users and type(error).__module__.startswith("robust_dist."):
        record = record_failure(error, rank)
        print(f"error: {rank}: {record.message}", file=sys.stderr, flush=True)
        tell_launcher(record.summary, f"error: {error}")
        return 2
    if origin is not None:
        report_shared(error, origin, rank)
    else:
        report_failure(error, rank)
    if rank.world_size > 1:
        # Everything is reported; ranks still waiting for this one see only its exit.
        faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True, file=STDERR)
    return 1


def _note_hang(reason: str, rank: Rank) -> None:
    """Report a hang before the watchdog ends this process."""
    record = record_failure(HangError(reason), rank, kind="hang")
    say(f"{rank}: given up (exit status {HANG_STATUS}): {reason}")
    tell_launcher(record.summary, reason)
