import pytest

from tests.engines.matrix import BEGIN, END, table, text_of, write_into


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        ([], "-"),
        ([("2", "passed"), ("1", "passed"), ("2", "passed")], "1, 2"),
        ([("", "passed")], "yes"),
        ([("1", "skipped")], "not run (GPU)"),
        ([("1", "passed"), ("2", "failed")], "FAILS"),
    ],
)
def test_a_cell_shows_what_passed_and_never_hides_a_failure(outcomes, text):
    assert text_of(outcomes) == text


def test_a_cell_that_is_not_in_the_table_is_an_error():
    with pytest.raises(AssertionError, match="no such cell"):
        table({("FSDP9", "resume"): [("1", "passed")]})


def test_the_table_replaces_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(page, {("DDP", "resume"): [("2", "passed")]})
    text = page.read_text()
    assert "old" not in text
    assert "| DDP | - | 2 |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
