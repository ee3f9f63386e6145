"""Tables in the documentation that a run of the tests writes between two marks of a file."""

from pathlib import Path


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between the file's two marks, which keep their lines."""
    page = path.read_text(encoding="utf-8")
    assert page.count(begin) == page.count(end) == 1, f"{path} lacks the marks {begin!r} and {end!r}"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
