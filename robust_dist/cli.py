"""The `robust-dist` commands."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import robust_dist
from robust_dist import own_code
from robust_dist.engines.engine import EngineError, engine_named
from robust_dist.inference.command import add_commands, split_data_words
from robust_dist.study.commands import add_study_commands
from robust_dist.validate import whole_number

EXTRA_HINT = "install what it needs with: pip install 'robust_dist[{extra}]'"


def _train(words: argparse.Namespace) -> int:
    if words.accelerate is not None:
        from robust_dist.train.__main__ import launch

        launch(words.accelerate, words.overrides)
    from robust_dist.train.main import main

    main(words.overrides)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from robust_dist.doctor import exit_code, format_report, report

    checks = report()
    print(format_report(checks))
    return exit_code(checks)


def _preview(words: argparse.Namespace) -> int:
    import torch

    from robust_dist.inference.export import check_new
    from robust_dist.preview import columns, draw
    from robust_dist.train.augment_config import own_stage
    from robust_dist.train.build import build_augment
    from robust_dist.train.recipe import parse_recipe
    from robust_dist.train.sources import open_sets

    whole_number("--epoch", words.epoch, 0)
    check_new(Path(words.out))
    recipe = parse_recipe([*(["--config", words.config] if words.config else []), *words.overrides])
    images, _ = open_sets(recipe.data, torch.device("cpu"), download=recipe.data.download)
    augment = build_augment(recipe, len(images.classes))
    own = {name: own_stage("augment.before", name) for name in recipe.augment.before}
    order = {"seed": recipe.seed, "epoch": words.epoch, "batch_size": recipe.batch_size}
    draw(columns(images, augment, rows=words.rows, before=own, **order), Path(words.out))
    if recipe.augment.after:
        print(f"not shown, because it runs after normalisation: {', '.join(recipe.augment.after)}")
    print(f"wrote {words.out}")
    return 0


def _recipe(words: argparse.Namespace) -> int:
    from robust_dist.inference.export import check_new
    from robust_dist.train.suggest import suggest

    if words.out is not None:
        check_new(Path(words.out))
        if not Path(words.out).absolute().parent.is_dir():
            raise ValueError(f"--out {words.out}: there is no folder {Path(words.out).parent}; create it first")
    text = suggest(words.folder)
    if words.out is None:
        print(text, end="")
        return 0
    with open(words.out, "x", encoding="utf-8") as file:
        file.write(text)
    print(f"wrote {words.out}; train with: robust-dist train --config {shlex.quote(words.out)}")
    return 0


def _convert(words: argparse.Namespace) -> int:
    from robust_dist.checkpoint import convert

    words.extra = engine_named(words.to).extra or words.extra
    how = {"full_state_dict": words.full_state_dict, "unwrap": words.unwrap, "form": words.form}
    notes = convert(words.src, words.dst, words.to, words.world_size, **how)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {words.dst}")
    return 0


def _inspect(words: argparse.Namespace) -> int:
    from robust_dist.checkpoint.inspection import examine

    report = examine(words.src)
    print(report.text)
    return 0 if report.whole else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="robust-dist", description=__doc__)
    parser.add_argument("--version", action="version", version=f"robust_dist {robust_dist.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # The recipe's own parser prints the help for all keys.
    train = commands.add_parser("train", help="train a recipe (--help: its keys)", add_help=False, allow_abbrev=False)
    train.add_argument("--accelerate", metavar="FILE")
    train.set_defaults(run=_train, extra="train")

    doctor = commands.add_parser("doctor", help="show versions, devices and backends, and how to fix problems")
    doctor.set_defaults(run=_doctor, extra="train")

    recipe = commands.add_parser("recipe", help="inspect a folder of images and write a recipe for it, with reasons")
    recipe.add_argument("folder", metavar="PATH", help="a folder with one subfolder of images per class")
    recipe.add_argument("--out", metavar="FILE", help="the file to write; must not exist (default: print)")
    recipe.set_defaults(run=_recipe, extra="train")

    preview = commands.add_parser("preview", help="write a PNG showing what the augmentation does to your data")
    preview.add_argument("--config", help="a recipe in YAML")
    preview.add_argument("--out", default="preview.png", help="the PNG to write; must not exist (default: %(default)s)")
    preview.add_argument("--rows", type=int, default=8, help="number of samples (default: %(default)s)")
    preview.add_argument("--epoch", type=int, default=0, help="the epoch to show (default: %(default)s)")
    preview.set_defaults(run=_preview, extra="train")

    _add_measuring_commands(commands)
    add_study_commands(commands)
    _add_checkpoint_commands(commands)
    add_commands(commands)
    return parser


def _add_measuring_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from robust_dist.bench import command as bench
    from robust_dist.plan import command as plan
    from robust_dist.verify import __main__ as verify

    helps = {
        "verify": (verify, "train", "check that everything works here and measure its speed; writes a report"),
        "bench": (bench, "bench", "compare speed with other libraries and the hardware's limit"),
        "plan": (plan, "train", "estimate a job's memory and traffic under each engine, and suggest an engine"),
    }
    for name, (module, extra, text) in helps.items():
        parser = commands.add_parser(name, help=text)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run, extra=extra)


def _add_checkpoint_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser("convert", help="convert a checkpoint to another engine or number of ranks")
    convert.add_argument("src", metavar="SRC", help="a checkpoint from any engine, Accelerate, Trainer or torch.save")
    convert.add_argument("dst", metavar="DST", help="the folder to write; must not exist")
    engines = "ddp, fsdp, zero0, zero1, zero2, zero3, or an engine added by another package"
    convert.add_argument("--to", required=True, metavar="ENGINE", help=engines)
    convert.add_argument("--world-size", type=int, required=True, metavar="N", help="number of ranks that will load it")
    convert.add_argument(
        "--full-state-dict", action="store_true", help="fsdp: write FULL_STATE_DICT instead of SHARDED_STATE_DICT"
    )
    convert.add_argument(
        "--unwrap", action="store_true", help='remove the "module." prefix that DDP adds to every name'
    )
    convert.add_argument(
        "--form",
        choices=["accelerate", "trainer"],
        help="the loader to write for: Accelerate's or Trainer's (default: same as SRC)",
    )
    convert.set_defaults(run=_convert, extra="train")

    inspect = commands.add_parser(
        "inspect", help="show a checkpoint's contents and whether it is complete (exit status 1 if not)"
    )
    inspect.add_argument("src", metavar="SRC", help="a checkpoint from any of these engines")
    inspect.set_defaults(run=_inspect, extra="train")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 if the user has to change something)."""
    parser = _parser()
    given = list(sys.argv[1:] if args is None else args)
    try:
        given, data_words = split_data_words(given) if given[:1] == ["evaluate"] else (given, [])
    except ValueError as error:
        parser.error(str(error))
    words, overrides = parser.parse_known_args(given)
    if overrides and words.run not in (_preview, _train):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    words.overrides, words.data_words = overrides, data_words
    run: Callable[[argparse.Namespace], int] = words.run
    try:
        own_code.allow(getattr(words, "imports", ()))
        return run(words)
    except ModuleNotFoundError as error:
        hint = "" if "pip install" in str(error) else f"; {EXTRA_HINT.format(extra=words.extra)}"
        print(f"error: {error}{hint}", file=sys.stderr)
    except (ValueError, OSError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
