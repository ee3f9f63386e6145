"""The commands, as a person types them."""

from importlib.metadata import version

import pytest

import robust_dist
from robust_dist.cli import main


def test_preview_writes_a_picture_of_the_recipe_s_data(tmp_path, capsys):
    path = tmp_path / "preview.png"
    assert main(["preview", "--rows", "3", "--out", str(path), "--data.name", "digits"]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert str(path) in capsys.readouterr().out
    before = path.read_bytes()
    assert main(["preview", "--rows", "2", "--out", str(path), "--data.name", "digits"]) == 2
    assert path.read_bytes() == before


def test_doctor_says_what_is_here(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("torch", "accelerate", "foreach"):
        assert word in output


def test_the_version_is_the_distribution_s_wherever_it_is_asked_for(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["robust_dist", version("robust_dist")]
    assert robust_dist.__version__ == version("robust_dist")
    main(["doctor"])
    assert capsys.readouterr().out.split()[:3] == ["ok", "robust_dist", version("robust_dist")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview", "--data.name", "mnist3d"], "mnist3d"),
        (["preview", "--rows", "0"], "rows"),
        (["preview", "--out", __file__ + "/below/a/file.png"], "test_cli.py"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_word_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--fast"])
    assert "--fast" in capsys.readouterr().err
