"""The report of a verification, as Markdown and as JSON."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robust_dist.measure.table import table
from robust_dist.ranks.talk import ranks_text

FAILED = ("failed", "hung")


@dataclass
class Outcome:
    """The outcome of a part.

    Attributes:
        part: Its name.
        state: "done", "failed", "hung", or "not run".
        seconds: That it took.
        claims: As they were made; of a claim that the ranks share, each rank's, with "rank" in it.
        log: The end of what its processes printed, where it failed.
    """

    part: str
    state: str
    seconds: float = 0.0
    claims: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it failed, hung, or found something wrong."""
        return self.state in FAILED or any(claim["verdict"] == "wrong" for claim in self.claims)

    @property
    def summary(self) -> str:
        """Its state, and how many claims have which verdict."""
        counts = Counter(claim["verdict"] for claim in self.claims)
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return found if self.state == "done" and found else ", ".join(filter(None, (self.state, found)))


def write_report(folder: Path, outcomes: Sequence[Outcome], about: dict[str, Any]) -> None:
    """Write report.md and report.json anew, whole or not at all.

    Args:
        folder: Where they go.
        outcomes: Of all parts so far.
        about: What the report says of the whole: command, ranks, versions.
    """
    data = {**about, "parts": [{**asdict(one), "wrong": one.is_wrong} for one in outcomes]}
    _write(folder / "report.json", json.dumps(data, indent=1) + "\n")
    _write(folder / "report.md", _markdown(outcomes, about))


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _markdown(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    lines = ["# Verification", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    parts = [(one.part, "**wrong**: " * one.is_wrong + one.summary, f"{one.seconds:.0f}") for one in outcomes]
    lines += [table(["part", "outcome", "s"], parts)]
    for one in outcomes:
        if not one.claims and not one.log:
            continue
        lines += ["", f"## {one.part}", ""]
        lines += [table(["claim", "expected", "measured", "verdict"], (map(_cell, row) for row in merged(one.claims)))]
        if one.log:
            lines += ["", "```", one.log.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def merged(claims: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: ranks that say the same share one, others are named."""
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for claim in claims:
        key = (claim["what"], claim["expected"], claim["measured"], claim["verdict"])
        rows.setdefault(key, []).append(claim.get("rank", 0))
    ranks = {claim.get("rank", 0) for claim in claims}

    def who(of: list[int]) -> str:
        return "" if set(of) == ranks else f" ({ranks_text(set(of))})"

    return [(what + who(of), expected, measured, verdict) for (what, expected, measured, verdict), of in rows.items()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
