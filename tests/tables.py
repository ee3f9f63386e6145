"""Tables in the documentation that test runs write between two marks in a file."""

from pathlib import Path


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between the file's two marks, which stay on their lines."""
    page = path.read_text(encoding="utf-8")
    assert page.count(begin) == page.count(end) == 1, f"{path} lacks the marks {begin!r} and {end!r}"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
