"""Names are bytes: shown and recorded on one line, whatever they contain, and compared in one form."""

import os
import unicodedata

import pytest

from robust_dist.data.classes import check_same_classes, text_classes
from robust_dist.data.errors import BadImage
from robust_dist.data.source import as_line, composed, printable
from tests.data.tiny_sets import encoded, turned_image

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


def bad_images(path):
    pytest.importorskip("accelerate")
    from robust_dist.train.bad_images import BadImages

    return BadImages(path, 0.5)


@pytest.mark.parametrize("name", [LATIN, "a\nb.jpg", "a\tb.jpg", "a\u2028b.jpg", "a\\b.jpg", "é.jpg"])
def test_a_bad_image_is_named_once_whatever_its_name_holds(tmp_path, name):
    path = tmp_path / "bad_images.txt"
    for _ in range(2):
        bad_images(path)._keep([BadImage(name, "no\nimage"), BadImage(name, "no image")])
    assert path.read_bytes() == as_line(name) + b"\tno image\n"


def test_the_start_says_what_is_done_with_exif_where_the_first_images_have_it(tmp_path):
    sources = pytest.importorskip("robust_dist.train.sources")
    from robust_dist.train.data_config import DataConfig

    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, content in {"0": b"junk", "1": turned_image(), "2": encoded(0, 0), "3": turned_image(8)}.items():
        (tmp_path / "train" / "a" / f"{name}.jpg").write_bytes(content)
    for exif, words in {"auto": "left as stored", "off": "left as", "on": "turned upright"}.items():
        data = DataConfig("imagefolder", str(tmp_path), exif=exif)
        line = sources.exif_line(data, sources.open_source(data, "train", None, download=False))
        assert f"2 of the first 4 images carry an EXIF orientation; they are {words}" in line
        assert f"data.exif={exif};" in line
    (tmp_path / "train" / "a" / "1.jpg").unlink()
    (tmp_path / "train" / "a" / "3.jpg").unlink()
    assert sources.exif_line(data, sources.open_source(data, "train", None, download=False)) is None


def test_text_labels_in_both_forms_are_one_class():
    parted = unicodedata.normalize("NFD", "café")
    labels, classes = text_classes(["zoo", "café", parted], None, "set")
    assert (labels.tolist(), classes) == ([1, 0, 0], (parted, "zoo"))
    assert text_classes(["café"], classes, "set")[0].tolist() == [0]
    check_same_classes(["café", "zoo"], classes, "set")
