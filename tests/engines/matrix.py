"""The table engine x property: which test holds which cell, and what robust_dist/engines/matrix.md shows of it.

A test takes its place with `@pytest.mark.cell(engine, column, world)` (or `marks=` of a parameter). A run with
`--matrix=robust_dist/engines/matrix.md` writes the table between the file's two marks from the outcomes of that run.
"""

import traceback
from collections.abc import Callable
from pathlib import Path

from tests.tables import write_between

ENGINES = (
    "one process",
    "DDP",
    "FSDP1",
    "FSDP1, use_orig_params=False",
    "FSDP1, SHARD_GRAD_OP",
    "FSDP2",
    "FSDP2, bf16",
    "HSDP",
    "FSDP2 + tensor parallel",
    "FSDP2, CPUOffloadPolicy",
    "ZeRO 0",
    "ZeRO 1",
    "ZeRO 2",
    "ZeRO 3",
    "ZeRO 0, bf16",
    "ZeRO 1, bf16",
    "ZeRO 2, bf16",
    "ZeRO 3, bf16",
    "ZeRO 2, fp16 overflow",
    "ZeRO 2, offload",
    "ZeRO 3, offload",
    "ZeRO 3, parameter offload",
    "Trainer, one process",
    "Trainer, DDP",
    "Trainer, FSDP1",
    "Trainer, FSDP2",
    "Trainer, ZeRO 1",
    "Trainer, ZeRO 2",
    "Trainer, ZeRO 3",
)
COLUMNS = (
    "trajectory",
    "resume",
    "other world size",
    "switch",
    "measured rate",
    "groups",
    "after an evaluation",
    "a parameter without a gradient",
    "convert in",
    "convert out",
)
BEGIN, END = (
    "<!-- matrix: written by `bash tests/run.sh --matrix=robust_dist/engines/matrix.md` -->",
    "<!-- end of matrix -->",
)

Cells = dict[tuple[str, str], list[tuple[str, str]]]


def run_scenarios(scenarios: dict[str, Callable[[], None]]) -> dict[str, str | None]:
    """Run scenarios in order on this rank: name -> None, or the traceback of its failure.

    Ranks are no longer in step after a failure, so the scenarios that follow one are not run.
    """
    results: dict[str, str | None] = {}
    failed = ""
    for name, scenario in scenarios.items():
        if failed:
            results[name] = f"not run: {failed} failed before it"
            continue
        try:
            scenario()
            results[name] = None
        except BaseException:
            results[name], failed = traceback.format_exc(), name
    return results


def assert_passed(results: list[dict[str, str | None]], name: str) -> None:
    """Fail with every rank's traceback, unless the scenario passed on all of them."""
    found = [f"rank {rank}:\n{one[name]}" for rank, one in enumerate(results) if one[name] is not None]
    assert not found, "\n".join(found)


def text_of(outcomes: list[tuple[str, str]]) -> str:
    """A cell's text from its (world, outcome) pairs: the worlds that passed, or what did not."""
    if not outcomes:
        return "-"
    for bad in ("failed", "error"):
        if any(outcome == bad for _, outcome in outcomes):
            return "FAILS"
    passed = sorted({world for world, outcome in outcomes if outcome == "passed"})
    return ", ".join(world for world in passed if world) or ("yes" if passed else "not run (GPU)")


def table(cells: Cells) -> str:
    """The table in Markdown."""
    unknown = [cell for cell in cells if cell[0] not in ENGINES or cell[1] not in COLUMNS]
    assert not unknown, f"no such cell: {unknown}"
    lines = ["| engine | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for engine in ENGINES:
        row = [text_of(cells.get((engine, column), [])) for column in COLUMNS]
        if any(text != "-" for text in row):
            lines.append(f"| {engine} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def write_into(path: Path, cells: Cells) -> None:
    """Replace what stands between the file's two marks by the table."""
    write_between(path, BEGIN, END, table(cells))
