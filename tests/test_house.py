"""The code base is as robust_dist/README.md describes it: rooms, arrows, no circles, no more oddities than stated."""

import re

from tests import house

README = (house.PACKAGE / "README.md").read_text(encoding="utf-8")
# May only decrease.
LIMITS = {
    "import circles": 0,
    "files that name DeepSpeed": 19,
    "files that hold engine-name strings": 10,
    "files that use object collectives": 1,
    "private names of other packages, by file": 28,
}


def drawn():
    """The rooms that each room may import, by the page's table."""
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\| ([^|]*) \|$", README, flags=re.MULTILINE)
    return {room: set(re.findall(r"\w+", others)) - {"none"} for room, others in rows}


def test_every_room_is_on_the_page_and_imports_only_what_the_page_says():
    found = {room: others - {""} for room, others in house.arrows().items() if room}
    assert found.keys() == drawn().keys()
    assert {room: others - drawn()[room] for room, others in found.items() if others - drawn()[room]} == {}


def test_no_two_files_import_each_other():
    assert house.circles() == []


def test_odd_places_are_no_more_than_stated():
    found = house.figures(timed=False)
    assert {what: found[what] for what, limit in LIMITS.items() if found[what] > limit} == {}
