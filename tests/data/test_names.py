"""Names are bytes: shown and written down in one line, whatever is in them, and compared in one form."""

import os
import unicodedata

import pytest

from robust_dist.data.names import as_line, composed, printable

LATIN = os.fsdecode(b"caf\xe9.jpg")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("café 猫.jpg", "café 猫.jpg"),
        (LATIN, r"caf\xe9.jpg"),
        ("a\nb\tc", r"a\nb\tc"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
    ],
)
def test_a_name_is_shown_in_one_line_that_any_terminal_takes(name, shown):
    assert printable(name) == shown


@pytest.mark.parametrize(
    ("name", "line"), [(LATIN, b"caf\xe9.jpg"), ("a\nb\tc\r", rb"a\nb\tc\r"), (r"a\nb", rb"a\\nb"), ("é", "é".encode())]
)
def test_a_name_is_written_with_its_own_bytes_in_one_field(name, line):
    assert as_line(name) == line


def test_both_forms_of_unicode_are_one_name():
    parted = unicodedata.normalize("NFD", "café")
    assert parted != "café"
    assert composed(parted) == composed("café") == "café"
    assert composed(LATIN) == LATIN
