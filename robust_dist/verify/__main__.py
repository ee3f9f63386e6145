"""`robust-dist verify`, and `python -m robust_dist.verify` for a launcher."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="the report's folder, new or empty (default: runs/verify/TIME)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON at the end")
    parser.add_argument("--ranks", type=int, metavar="N", help="without a launcher: ranks (default: one a GPU, or 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts to run, by their names")


def run(words: argparse.Namespace) -> int:
    """Verify this machine, or this job's machines; returns the exit status."""
    from robust_dist.verify.conductor import find_ranks, verify
    from robust_dist.verify.parts import PARTS

    names = [part.name for part in PARTS]
    unknown = [name for name in words.only if name not in names]
    wrong = [f"--only {name}: there is no such part; there are {', '.join(names)}" for name in unknown]
    if not (math.isfinite(words.minutes) and words.minutes > 0):
        wrong.append(f"--minutes={words.minutes} is not valid: it must be above 0")
    if words.ranks is not None and words.ranks < 1:
        wrong.append(f"--ranks={words.ranks} is not valid: it must be at least 1")
    if wrong:
        raise ValueError("; ".join(wrong))
    ranks = find_ranks(words.ranks)
    status, folder = verify(words.minutes, Path(words.out) if words.out else None, ranks, words.only)
    if ranks.rank == 0:
        if words.json:
            print((folder / "report.json").read_text(encoding="utf-8"))
        print(f"{'something is WRONG' if status else 'nothing is wrong'}: {folder / 'report.md'}", flush=True)
    return status


def main(args: Sequence[str] | None = None) -> int:
    """Run the command, or a process of one of its parts."""
    parser = argparse.ArgumentParser(prog="python -m robust_dist.verify", description=__doc__)
    add_arguments(parser)
    for name in ("--part", "--phase", "--local-rank", "--claims", "--work"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args(args)
    if words.part is not None:
        from robust_dist.verify.parts import run_part

        run_part(words.part, words.phase, int(words.local_rank), Path(words.claims), Path(words.work))
        return 0
    try:
        return run(words)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
