"""Claims of a part: what was expected, what was measured, and whether that is right."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["right", "wrong", "slow", "measured", "not checked"]


@dataclass(frozen=True)
class Claim:
    """One line of the report.

    Attributes:
        what: The claim, in words.
        expected: What must be measured; empty where a figure is only reported.
        measured: What was measured.
        verdict: "right" or "wrong"; of speed "slow", or "measured" where nothing is expected; or "not checked", with
            the reason in `measured`.
    """

    what: str
    expected: str
    measured: str
    verdict: Verdict


class Claims:
    """Claims of a part as they come, each kept in a file at once, so that a part that dies leaves what it found.

    Args:
        path: The file, a JSON object a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, expected: object, measured: object, verdict: Verdict) -> None:
        """Keep a claim."""
        claim = Claim(what, str(expected), str(measured), verdict)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(claim)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check(self, what: str, expected: object, measured: object, right: bool) -> None:
        """Keep a claim that is right or wrong."""
        self.add(what, expected, measured, "right" if right else "wrong")

    def equal(self, what: str, expected: object, measured: object) -> None:
        """Keep a claim that is right where both are equal."""
        self.check(what, expected, measured, expected == measured)

    def skip(self, what: str, reason: str) -> None:
        """Keep what could not be checked, and why."""
        self.add(what, "", reason, "not checked")

    @contextmanager
    def needing(self, what: str, *packages: str) -> Iterator[None]:
        """Skip what is inside where it turns out that a package is missing.

        Args:
            what: What is then not checked.
            *packages: Those that it may lack; any other missing one is an error.
        """
        try:
            yield
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in packages:
                raise
            self.skip(what, f"{missing} is not installed")


def read_claims(path: Path) -> list[dict[str, Any]]:
    """The claims of a file, whole lines alone."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            # The part died while it wrote.
            continue
    return found
