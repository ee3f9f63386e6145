from pathlib import Path

import pytest

from tests.multinode.table import BEGIN, END, FAULTS, Row, table, write_into

HERE = Path(__file__).parent
NOTED = {"outcome": "goes on", "steps lost": 3, "seconds to end": 1.4, "seconds to go on": 17.6}


def test_a_row_shows_what_the_test_noted_and_never_hides_a_failure():
    rows = {FAULTS[0]: Row.of("passed", NOTED), FAULTS[1]: Row.of("failed", NOTED), FAULTS[2]: Row.of("skipped", {})}
    text = table(rows)
    assert f"| {FAULTS[0]} | goes on | 3 | 1 | 18 |" in text
    assert f"| {FAULTS[1]} | FAILS | - | - | - |" in text
    assert f"| {FAULTS[2]} | not run | - | - | - |" in text
    assert f"| {FAULTS[3]} | not run | - | - | - |" in text


def test_a_fault_that_is_not_in_the_table_is_an_error():
    with pytest.raises(AssertionError, match="no such fault"):
        table({"a meteorite": Row.of("passed", NOTED)})


def test_every_row_has_one_test():
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert {name: text.count(f'fault("{name}")') for name in FAULTS} == dict.fromkeys(FAULTS, 1)


def test_the_documentation_has_the_tables_marks():
    page = (HERE.parents[1] / "launch" / "NODES.md").read_text()
    assert page.index(BEGIN) < page.index(END)


def test_the_table_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nof the last run\n{END}\nafter\n")
    write_into(page, {FAULTS[0]: Row.of("passed", NOTED)})
    assert "of the last run" not in page.read_text()
    assert page.read_text().startswith(f"before\n{BEGIN}\n| fault | outcome |")
    assert page.read_text().endswith(f"{END}\nafter\n")
