"""`robust-dist study run | status | report`."""

import argparse
import contextlib
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from robust_dist.study.folder import StudyFolder

from robust_dist.own_code import add_argument


def add_study_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `study` to the commands of `robust-dist`."""
    study = commands.add_parser("study", help="run a grid of recipes and seeds, and report the results")
    words = study.add_subparsers(required=True, metavar="COMMAND")

    run = words.add_parser("run", help="train the remaining runs; may be repeated, and run on several machines at once")
    run.add_argument("config", metavar="STUDY", help="a YAML file, or the name of a study that comes with the package")
    run.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    run.add_argument("--dir", metavar="D", help="the study's folder (default: runs/studies/NAME)")
    run.add_argument(
        "--from", dest="report", metavar="REPORT.json", help="reuse the finished runs of an earlier report"
    )
    run.add_argument("--dry-run", action="store_true", help="estimate the cost from a measured step, without training")
    run.add_argument(
        "--gpu", default="h100", help="the GPU whose hours --dry-run estimates on a machine without one (default: h100)"
    )
    add_argument(run)
    run.set_defaults(run=_run, extra="study")

    status = words.add_parser("status", help="list what is finished, running, failed and waiting")
    status.add_argument("dir", metavar="D", help="a study's folder")
    status.set_defaults(run=_status, extra="study")

    report = words.add_parser("report", help="write a table, JSON, heat map and curves, also of an unfinished study")
    report.add_argument("dir", metavar="D", help="a study's folder, or an earlier report.json (with --out)")
    report.add_argument("--against", metavar="D2", help="another study, tested pair by pair over common cells")
    report.add_argument("--out", metavar="DIR", help="where to write (default: D/report)")
    report.add_argument(
        "--diverged-as",
        type=float,
        metavar="SHARE",
        help="what a diverged run counts as (default: guessing, 1/classes)",
    )
    report.set_defaults(run=_report, extra="study")


def _run(words: argparse.Namespace) -> int:
    from robust_dist.study.folder import StudyFolder, adopt, read_report
    from robust_dist.study.grid import StudyError
    from robust_dist.study.measure import estimate
    from robust_dist.study.parse import load_study
    from robust_dist.study.report import write_report
    from robust_dist.study.worker import Workers

    if words.workers < 1:
        raise StudyError(f"--workers {words.workers} must be at least 1")
    study, recipes = load_study(words.config)
    if words.dry_run:
        print(estimate(study, recipes, words.gpu))
        return 0
    folder = StudyFolder(words.dir or Path("runs", "studies", study.name))
    # Before the folder becomes this study's: a report that does not fit may show that it is the wrong one.
    found = read_report(study, words.report) if words.report else {}
    folder.claim(study)
    if words.report:
        print(f"{adopt(folder, study, found)} runs taken from {words.report}", flush=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        Workers(folder, study, recipes, words.workers).work()
    except KeyboardInterrupt:
        print("stopped; run the same command to continue", flush=True)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n" + write_report(folder, folder.path / "report"))
    missing = [run for run in study.runs() if folder.result(run) is None]
    for run in missing:
        print(f"no result: {run} (log: {folder.of('logs', run, '.log')})")
    print(f"report: {folder.path / 'report'}")
    return 1 if missing else 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _status(words: argparse.Namespace) -> int:
    from robust_dist.study.folder import StudyFolder, status

    print(status(StudyFolder(words.dir)))
    return 0


def _report(words: argparse.Namespace) -> int:
    from robust_dist.study.grid import StudyError
    from robust_dist.study.report import write_report

    if words.diverged_as is not None and not 0 <= words.diverged_as <= 1:
        raise StudyError(f"--diverged-as={words.diverged_as} is not valid: it must be a share, from 0 to 1")
    with contextlib.ExitStack() as stack:
        folder, against = (_opened(path, stack) for path in (words.dir, words.against))
        assert folder is not None
        if not words.out and Path(words.dir).is_file():
            raise StudyError(f"{words.dir} is a report, which lies in no study's folder: give --out DIR")
        out = Path(words.out) if words.out else folder.path / "report"
        print(write_report(folder, out, against=against, diverged_as=words.diverged_as))
    print(f"wrote {out}")
    return 0


def _opened(path: str | None, stack: contextlib.ExitStack) -> "StudyFolder | None":
    """A study's folder; for a `report.json`, a temporary one with its runs, removed when the stack closes."""
    from robust_dist.study.folder import StudyFolder, folder_of_report

    if path is None:
        return None
    if not Path(path).is_file():
        return StudyFolder(path)
    return folder_of_report(path, stack.enter_context(tempfile.TemporaryDirectory()))
