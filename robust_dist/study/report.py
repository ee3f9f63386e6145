"""`robust-dist study report`: Markdown, JSON and pictures of a study, finished or not."""

import json
from pathlib import Path
from typing import Any

from robust_dist.checkpoint import write_atomically
from robust_dist.private import hidden
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import study_dict
from robust_dist.study.plots import plot_heat_map, plot_learning_rates
from robust_dist.study.summary import Comparison, Summary, against_reference, against_study, robustness, summarize
from robust_dist.study.tables import markdown


def write_report(
    folder: StudyFolder, out: Path, *, against: StudyFolder | None = None, diverged_as: float | None = None
) -> str:
    """Write `report.md`, `report.json`, `heat_map.png` and, with an axis of learning rates, `learning_rates.png`.

    Args:
        folder: The study's folder.
        out: Where to write.
        against: Another study, tested pair by pair over common cells and seeds.
        diverged_as: What a diverged run counts as, as a share; None: the accuracy of guessing.

    Returns:
        The Markdown.

    Raises:
        StudyError: A folder is no study's, or the two have nothing in common.
    """
    summary = summarize(folder, diverged_as=diverged_as)
    comparisons = [] if against is None else against_study(summary, summarize(against, diverged_as=diverged_as))
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(summary, comparisons, diverged_as=diverged_as, seen=_seen(summary))
    tests = [*against_reference(summary), *comparisons]
    write_atomically(out / "report.md", text)
    write_atomically(out / "report.json", json.dumps(_as_json(summary, tests, diverged_as), indent=1) + "\n")
    plot_heat_map(summary, out / "heat_map.png")
    plot_learning_rates(summary, out / "learning_rates.png")
    return text


def _seen(summary: Summary) -> str:
    """Revision, machine and length of the runs: one sentence, however many there were of each."""
    results = list(summary.results.values())
    if not results:
        return ""
    noted = [result.environment for result in results]
    lengths = [f"{result.epochs} epochs, {result.steps:,} steps" for result in results if result.diverged is None]
    parts = {
        "length": lengths,
        "revision": [str(one.get("revision")) for one in noted],
        "device": [f"{one.get('device')} ({_machine(one)})" for one in noted],
        "torch": [str(one.get("packages", {}).get("torch")) for one in noted],
    }
    return "; ".join(f"{name}: {' and '.join(sorted(set(found)))}" for name, found in parts.items() if found)


def _machine(noted: dict[str, Any]) -> str:
    processor = noted.get("processor") or noted.get("platform")
    return f"{processor}, {noted.get('threads_per_process')} threads a run"


def _as_json(summary: Summary, tests: list[Comparison], diverged_as: float | None) -> dict[str, Any]:
    return {
        "study": hidden(study_dict(summary.study)),
        "complete": summary.is_complete,
        "diverged_as": "guessing" if diverged_as is None else diverged_as,
        "runs": [
            {"labels": list(run.cell.labels), "seed": run.seed, "settings": hidden(run.cell.settings)}
            | (vars(summary.results[run.name]) if run.name in summary.results else {"missing": True})
            | ({"failure": vars(summary.failures[run.name])} if run.name in summary.failures else {})
            for run in summary.study.runs()
        ],
        "robustness": {
            contender: {"cells": count, **{name: vars(figure) for name, figure in figures.items()}}
            for contender, (count, figures) in robustness(summary).items()
        },
        "paired_tests": [{"first": one.first, "second": one.second, **vars(one.test)} for one in tests],
    }
