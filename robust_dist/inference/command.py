"""The commands `export`, `predict`, `evaluate` and `runs` of `robust-dist`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_dist.own_code import add_argument

if TYPE_CHECKING:
    import torch

    from robust_dist.data.errors import BadImage
    from robust_dist.inference.predict import Prediction

# Exit status if some of what was named could not be used, and the rest was done.
_IN_PART = 1


def add_commands(commands: Any) -> None:
    """Add the four commands to the parser's."""
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    runs = commands.add_parser(
        "runs", help="list the runs below a folder: state, accuracy, and the settings that differ"
    )
    runs.add_argument("folder", metavar="DIR")
    runs.add_argument("--plot", metavar="PNG", help="draw the runs' accuracies over the epochs")
    runs.set_defaults(run=_runs, extra="train")


def _add_model(parser: argparse.ArgumentParser, others: str = "") -> None:
    parser.add_argument("model", metavar="RUN", help=f"a run's folder, or one that `export` wrote{others}")
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="last|best|STEP",
        help="of a run: its last (default), the one with the best logged accuracy, or that of a step",
    )
    add_argument(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy, calibration and confusion of a trained model",
        usage="robust-dist evaluate RUN [PATH | --data.KEY VALUE ...] [--checkpoint ...] [--out DIR] [--device ...]",
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a folder with a sub-folder of images for each class; without it, the run's own evaluation images, or "
        "those that --data.KEY VALUE name, as in a recipe",
    )
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="the folder to write; must not exist (default: RUN/evaluation-STEP[-PATH])",
    )
    _add_device(evaluate)
    evaluate.set_defaults(run=_evaluate, extra="train")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="classify image files (status 1: one of them is not an image)")
    _add_model(predict)
    predict.add_argument("paths", nargs="+", metavar="PATH", help="image files, and folders of them at any depth")
    predict.add_argument("--top-k", type=int, default=1, metavar="K", help="classes of each (default: %(default)s)")
    predict.add_argument("--format", choices=["table", "jsonl", "csv"], default="table")
    predict.add_argument("--out", metavar="FILE", help="the file to write; must not exist (default: print)")
    predict.add_argument("--contact-sheet", metavar="PNG", help="draw the images with their classes; must not exist")
    predict.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    _add_device(predict)
    predict.set_defaults(run=_predict, extra="train")


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a trained model as files that need no run")
    _add_model(export, "; or a checkpoint of your own loop, whose weights alone are written")
    export.add_argument("out", metavar="OUT", help="the folder to write; must not exist")
    export.add_argument(
        "--format",
        default="safetensors",
        metavar="FORMAT,...",
        help="of safetensors (always), torch.export (model.pt2) and onnx (model.onnx)",
    )
    export.set_defaults(run=_export, extra="train")


def split_data_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `evaluate`, with `--data.KEY VALUE` set apart, which the parser would take for PATH."""
    others: list[str] = []
    data: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--data."):
            others.append(word)
            continue
        name, equals, value = word.partition("=")
        given = value if equals else next(rest, None)
        if given is None:
            raise ValueError(f"{name} has no value")
        data += [name, given]
    return others, data


def _device(name: str | None) -> "torch.device":
    import torch

    wanted = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device here")
    return wanted


def _evaluate(words: argparse.Namespace) -> int:
    from robust_dist.inference import evaluate
    from robust_dist.inference.export import check_new, new_folder
    from robust_dist.inference.trained import read

    if words.path is not None and words.data_words:
        raise ValueError(f"PATH {words.path!r} and {words.data_words[0]} both name images: give one of them")
    if words.path is not None and not Path(words.path).is_dir():
        raise ValueError(f"PATH: there is no folder {words.path}; give one with a sub-folder of images for each class")
    device, trained = _device(words.device), read(words.model, checkpoint=words.checkpoint)
    images = "" if words.path is None else f"-{Path(words.path).resolve().name}"
    out = Path(words.out or trained.path / f"evaluation-{trained.record.checkpoint.step}{images}")
    check_new(out, "choose another folder with --out DIR")
    on = (
        evaluate.own_images(trained, words.data_words, device)
        if words.path is None
        else evaluate.folder_images(trained, words.path, device)
    )
    found = evaluate.evaluate(trained, on, device)
    with new_folder(out) as folder:
        evaluate.write(trained, found, folder)
    print(evaluate.as_text(trained, found, evaluate.SHOWN))
    print(f"wrote {out}")
    return 0


def _predict(words: argparse.Namespace) -> int:
    from robust_dist.inference.export import check_new
    from robust_dist.inference.predict import draw_sheet, files_of, lines, predict
    from robust_dist.inference.trained import read

    for path in (words.out, words.contact_sheet):
        if path is not None:
            check_new(Path(path))
    files = files_of(words.paths)
    trained, device = read(words.model, checkpoint=words.checkpoint), _device(words.device)
    found = predict(trained, files, device=device, top_k=words.top_k, batch_size=words.batch_size)
    bad: list[BadImage] = []
    kept: list[Prediction] = []
    good = _apart(found, bad, kept if words.contact_sheet else None)
    text = lines(good, words.format, min(words.top_k, len(trained.classes)))
    with nullcontext(sys.stdout) if words.out is None else open(words.out, "x", encoding="utf-8") as file:
        for line in text:
            print(line, file=file)
    if words.out is not None:
        print(f"wrote {words.out}")
    for image in bad:
        print(f"error: {image.where}: {image.reason}", file=sys.stderr)
    if kept:
        draw_sheet(kept, Path(words.contact_sheet))
        print(f"wrote {words.contact_sheet}", file=sys.stderr if words.out is None else sys.stdout)
    return _IN_PART if bad else 0


def _apart(
    found: "Iterator[Prediction | BadImage]", bad: "list[BadImage]", kept: "list[Prediction] | None"
) -> "Iterator[Prediction]":
    from robust_dist.inference.predict import Prediction

    for result in found:
        if isinstance(result, Prediction):
            if kept is not None:
                kept.append(result)
            yield result
        else:
            bad.append(result)


def _export(words: argparse.Namespace) -> int:
    from robust_dist.inference.export import export, export_weights
    from robust_dist.inference.trained import is_bare_checkpoint, read

    out = Path(words.out)
    if is_bare_checkpoint(words.model):
        if (words.format, words.checkpoint) != ("safetensors", "last"):
            raise ValueError(
                f"{words.model} is a checkpoint of your own loop, of which only the weights can be exported: leave "
                "--format and --checkpoint out"
            )
        print(f"wrote {out}: {', '.join(export_weights(Path(words.model), out))}")
        return 0
    names = export(read(words.model, checkpoint=words.checkpoint), out, words.format.split(","))
    print(f"wrote {out}: {', '.join(names)}")
    return 0


def _runs(words: argparse.Namespace) -> int:
    from robust_dist.inference.export import check_new
    from robust_dist.inference.runs import find_runs, plot, table

    if words.plot is not None:
        check_new(Path(words.plot))
    runs = find_runs(words.folder)
    print(table(runs))
    if words.plot is not None:
        plot(runs, Path(words.plot))
        print(f"wrote {words.plot}")
    return 0
