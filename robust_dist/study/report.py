"""`robust-dist study report`: Markdown, JSON and pictures of a study, finished or not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robust_dist.checkpoint import write_atomically
from robust_dist.measure.table import table
from robust_dist.private import hidden
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import Cell, Study, study_dict
from robust_dist.study.plots import heat_map, learning_rates
from robust_dist.study.summary import (
    Comparison,
    Figure,
    Summary,
    against_reference,
    against_study,
    at_defaults,
    default_against_reference,
    in_units,
    paper_robustness,
    robustness,
    summarize,
)

_NOTE = (
    "mean ± standard deviation (n - 1) over seeds, of the last epoch's accuracy in %; a diverged run counts as "
    "{counted}. Intervals: 95 % bootstrap over seeds. Share within 0.5: of the cells, of the best one. "
    "robust_dist/study/figures.py has the definitions."
)


def write_report(
    folder: StudyFolder, out: Path, *, against: StudyFolder | None = None, diverged_as: float | None = None
) -> str:
    """Write `report.md`, `report.json`, `heat_map.png` and, with an axis of learning rates, `learning_rates.png`.

    Args:
        folder: The study's folder.
        out: Where to write.
        against: Another study, tested pair by pair over common cells and seeds.
        diverged_as: The share that a diverged run counts as; None: the accuracy of guessing.

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
    for name, figure in {"heat_map": heat_map(summary), "learning_rates": learning_rates(summary)}.items():
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=120)
    return text


def _seen(summary: Summary) -> str:
    """Revision, machine and length of the runs in one sentence, however many different ones there are."""
    results = list(summary.results.values())
    if not results:
        return ""
    noted = [result.environment for result in results]
    lengths = [f"{result.epochs} epochs, {result.steps:,} steps" for result in results if result.diverged is None]
    parts = {
        "length": lengths,
        "revision": [str(environment.get("revision")) for environment in noted],
        "device": [f"{environment.get('device')} ({_machine(environment)})" for environment in noted],
        "torch": [str(environment.get("packages", {}).get("torch")) for environment in noted],
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
        "at_defaults": {
            name: {"accuracy": _plain(one.points), "regret": _plain(one.regret)}
            for name, one in at_defaults(summary).items()
        },
        "paired_tests": [{"first": test.first, "second": test.second, **vars(test.test)} for test in tests],
    }


def markdown(summary: Summary, comparisons: Sequence[Comparison], *, diverged_as: float | None, seen: str) -> str:
    """The report."""
    study = summary.study
    counted = "guessing (1/classes)" if diverged_as is None else f"{diverged_as:.2%}"
    parts = [f"# {study.name}", study.description, _state(summary), seen]
    parts += ["## Accuracy", accuracy_table(summary), _NOTE.format(counted=counted)]
    parts += _defaults_part(summary)
    parts += _robustness_part(summary, diverged_as)
    tests = [*against_reference(summary), *comparisons]
    parts += ["## Paired tests", _tests_table(tests), _TESTS] if tests else []
    parts += _troubles(summary)
    return "\n\n".join(part for part in parts if part) + "\n"


_TESTS = (
    "Mean difference in points over pairs of one cell and one seed; p of the sign-flip permutation test, two-sided, "
    "not corrected for the number of tests."
)


def _state(summary: Summary) -> str:
    total = summary.points.size
    if summary.is_complete:
        return f"All {total} runs are finished."
    failed = f"; {len(summary.failures)} failed at their last start" if summary.failures else ""
    return (
        f"**Unfinished: {len(summary.results)} of {total} runs have a result{failed}.** Figures are of what is there."
    )


def accuracy_table(summary: Summary) -> str:
    """Rows: all axes but the last; columns: the last one. Each cell beside the paper's figure where there is one."""
    study = summary.study
    columns = study.axes[-1].labels
    lines = {
        cell.labels: cell_text(summary, row, cell) + _paper_text(study, cell) for row, cell in enumerate(study.cells())
    }
    heads = list(dict.fromkeys(labels[:-1] for labels in lines))
    rows = [[", ".join(head) or "accuracy", *(lines[head + (column,)] for column in columns)] for head in heads]
    corner = " \\ ".join([", ".join(axis.name for axis in study.axes[:-1]), study.axes[-1].name]).strip(" \\")
    return table([corner, *columns], rows)


def cell_text(summary: Summary, row: int, cell: Cell) -> str:
    """A cell's mean and spread, and how many runs diverged or are missing."""
    values = summary.points[row]
    there = values[~np.isnan(values)]
    diverged = len(summary.diverged(cell))
    if len(there) == 0:
        return "-"
    if diverged == len(there):
        text = "diverged"
    else:
        text = f"{np.mean(there):.2f}" + (f" ± {np.std(there, ddof=1):.2f}" if len(there) > 1 else "")
        text += f", {diverged} of {len(there)} diverged" if diverged else ""
    return text if len(there) == len(values) else f"{text} (n = {len(there)} of {len(values)})"


def _paper_text(study: Study, cell: Cell) -> str:
    figure = study.paper.get(cell.labels)
    if figure is None:
        return ""
    return f" (paper: {figure})" if isinstance(figure, str) else f" (paper: {figure:.2f})"


def _robustness_part(summary: Summary, diverged_as: float | None) -> list[str]:
    found = {name: entry for name, entry in robustness(summary).items() if entry[1]}
    if not found:
        return []
    names = max((list(figures) for _, figures in found.values()), key=len)
    sizes = {name: len(cells) for name, cells in summary.study.contenders().items()}
    rows = []
    paper = paper_robustness(summary.study, 100 * _counted(summary, diverged_as))
    for contender, (count, figures) in found.items():
        label = contender if count == sizes[contender] else f"{contender} ({count} of {sizes[contender]} cells)"
        rows.append([label, *(_figure_text(name, figures.get(name)) for name in names)])
        if contender in paper:
            rows.append(
                [f"{contender} (paper)", *(_figure_text(name, _bare(paper[contender].get(name))) for name in names)]
            )
    return ["## Robustness over the grid", table(["", *names], rows)]


_DEFAULTS = (
    "Regret: points below the best cell of the same task, of any contender at any setting, means over seeds. p of the "
    "sign-flip test of the first one, two-sided, by Holm over the table's tests; a pair is {unit}."
)


def _defaults_part(summary: Summary) -> list[str]:
    """Each contender at its one setting, its regret, the tests; and the grid in units of the defaults."""
    study, found = summary.study, at_defaults(summary)
    if not found:
        return []
    tasks = next((axis.labels for axis in study.axes if axis.name == study.tasks), ())
    tests = {test.second: test.test for test in default_against_reference(summary)}
    rows = []
    for name, one in sorted(found.items(), key=lambda item: _key(item[1].regret)):
        at = f"{name} ({study.defaults[name]})" if study.defaults else name
        spread = [_number(value) for value in one.regret] if len(tasks) > 1 else []
        p = [f"{tests[name].difference:+.2f}", f"{tests[name].p:.3g}"] if name in tests else ["", ""]
        rows.append([at, _number(one.points), _number(one.regret), _number(one.regret, np.nanmax), *spread, *p])
    head = ["contender", "mean accuracy", "mean regret", "largest", *(tasks if len(tasks) > 1 else ())]
    head += [f"{study.reference} - it", "p"]
    unit = "a task, its mean over seeds" if study.tasks else "a seed"
    parts = ["## At one setting each", table(head, rows), _DEFAULTS.format(unit=unit)]
    units = in_units(summary)
    if units:
        multiples = sorted({multiple for grid in units.values() for multiple in grid})
        common = [multiple for multiple in multiples if all(multiple in grid for grid in units.values())]
        lines = []
        for name, grid in units.items():
            shared = np.array([grid[multiple] for multiple in common])
            cells = [_number(np.array(grid.get(multiple, np.nan))) for multiple in multiples]
            lines.append([name, *cells, _number(shared), _number(shared, np.nanmin)])
        head = ["times the default", *(f"{multiple:g}" for multiple in multiples), "mean", "lowest"]
        note = f"Mean and lowest are over {', '.join(f'{multiple:g}' for multiple in common)} times the default."
        parts += ["## In units of each default", table(head, lines), note]
    return parts


def _plain(values: Any) -> Any:
    """Nested lists with None for what is missing, as JSON has no NaN."""
    return [_plain(row) for row in values] if np.ndim(values) else (None if np.isnan(values) else float(values))


def _number(values: Any, of: Any = np.nanmean) -> str:
    return "-" if np.isnan(values).all() else f"{of(values):.2f}"


def _key(regret: Any) -> float:
    return float("inf") if np.isnan(regret).all() else float(np.nanmean(regret))


def _counted(summary: Summary, diverged_as: float | None) -> float:
    """The value of a diverged cell: the given one, or the accuracy of guessing on the study's own data."""
    if diverged_as is not None:
        return diverged_as
    chances = [result.chance for result in summary.results.values() if result.chance is not None]
    return chances[0] if chances else 0.1


def _bare(value: float | None) -> Figure | None:
    return None if value is None else Figure(value, None)


def _figure_text(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    digits = "{:.0%}" if name.startswith("share") else "{:.2f}"
    text = digits.format(figure.value)
    if figure.interval is None:
        return text
    low, high = (digits.format(end) for end in figure.interval)
    return f"{text} [{low}, {high}]"


def _tests_table(tests: Sequence[Comparison]) -> str:
    rows = [
        [test.first, test.second, str(test.test.pairs), f"{test.test.difference:+.2f}", f"{test.test.p:.3g}"]
        for test in tests
    ]
    return table(["first", "second", "pairs", "first - second", "p"], rows)


def _troubles(summary: Summary) -> list[str]:
    diverged = [
        f"- {', '.join(cell.labels)}, seed {seed}: {why}"
        for cell in summary.study.cells()
        for seed, why in summary.diverged(cell)
    ]
    failed = [f"- {name}: status {failure.status}; its log ends:" for name, failure in summary.failures.items()]
    logs = ["\n".join(["", *("      " + line for line in f.log.splitlines())]) for f in summary.failures.values()]
    parts = ["## Diverged", "\n".join(diverged)] if diverged else []
    return parts + (["## Failed", "\n".join(a + b for a, b in zip(failed, logs, strict=True))] if failed else [])
