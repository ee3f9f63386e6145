"""The table of faults: what each one does to a run, from the outcomes of the tests that bring it about.

A test takes its row with `@pytest.mark.fault(NAME)` and says what happened with pytest's `record_property`: "outcome",
"steps lost", "seconds to end", "seconds to go on". `--faults=launch/NODES.md` writes the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.tables import write_between

FAULTS = (
    "a rank is killed (SIGKILL)",
    "a rank is killed, RESTARTS=1",
    "a host is lost",
    "a host is lost, RESTARTS=1",
    "a host is lost while a checkpoint is written",
    "a link is cut",
    "a link is down for seconds, again and again",
    "a slow link",
    "a link too slow for the timeout",
    "a host hangs (SIGSTOP)",
    "the host of rank 0 hangs (SIGSTOP)",
    "a host never comes",
    "the disk is full while a checkpoint is written",
    "the newest checkpoint is torn",
    "a second job on the run's folder, from another host",
    "clocks an hour apart",
)
COLUMNS = ("outcome", "steps lost", "seconds to end", "seconds to go on")
COMMAND = "bash tests/run.sh --multinode --faults=launch/NODES.md"
BEGIN, END = f"<!-- faults: written by `{COMMAND}` -->", "<!-- end of faults -->"


@dataclass(frozen=True)
class Row:
    """What one fault did.

    Attributes:
        passed: Whether its test passed; None where it was not run.
        values: What the test noted, by column.
    """

    passed: bool | None
    values: Mapping[str, object]

    @classmethod
    def of(cls, outcome: str, values: Mapping[str, object]) -> "Row":
        """The row of a test with this outcome of pytest's."""
        return cls({"passed": True, "failed": False}.get(outcome), values)

    def cells(self) -> list[str]:
        """The texts of the columns."""
        if self.passed is None:
            return ["not run"] + ["-"] * (len(COLUMNS) - 1)
        if not self.passed:
            return ["FAILS"] + ["-"] * (len(COLUMNS) - 1)
        found = [self.values.get(column, "-") for column in COLUMNS]
        return [f"{value:.0f}" if isinstance(value, float) else str(value) for value in found]


Rows = dict[str, Row]


def table(rows: Rows) -> str:
    """The table in Markdown; a fault whose test was not run says so."""
    unknown = [name for name in rows if name not in FAULTS]
    assert not unknown, f"no such fault: {unknown}"
    lines = ["| fault | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    missing = Row(None, {})
    return "\n".join(
        [*lines, *(f"| {name} | " + " | ".join(rows.get(name, missing).cells()) + " |" for name in FAULTS)]
    )


def write_into(path: Path, rows: Rows) -> None:
    """Replace what stands between the file's two marks by the table."""
    write_between(path, BEGIN, END, table(rows))
