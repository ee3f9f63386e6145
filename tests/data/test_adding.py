"""A data source is added in one file, from outside the package (robust_dist/data/README.md)."""

import importlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from robust_dist.data import registry
from robust_dist.study.parse import load_study
from robust_dist.train import data_config
from robust_dist.train.folder import RunFolderError
from robust_dist.train.main import train
from robust_dist.train.recipe import DataConfig, parse_recipe
from tests.data.tiny_sets import encode, picture
from tests.study.studies import write

PAGE = Path(registry.__file__).with_name("README.md").read_text(encoding="utf-8").partition("## Adding a source")[2]
SIDE, TRAIN, TEST = 16, 24, 10


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a file as pip would, with the page's entry point."""

    def install(code):
        entry = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1]
        info = tmp_path / "zip_source-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zip_source\nVersion: 1.0\n")
        entry = entry.replace('project.entry-points."robust_dist.sources"', "robust_dist.sources").replace('"', "")
        (info / "entry_points.txt").write_text(entry)
        (tmp_path / "zip_source.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    data_config.source_choice.cache_clear()
    yield install
    data_config.source_choice.cache_clear()
    sys.modules.pop("zip_source", None)


@pytest.fixture
def installed(install):
    install(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])


@pytest.fixture
def words(tmp_path):
    """The arguments of a run on its own archive."""
    # Accelerate keeps the precision of the process's first run.
    AcceleratorState._reset_state(True)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for part, count in (("train", TRAIN), ("test", TEST)):
            for number in range(count):
                file.writestr(
                    f"{part}/{'ab'[number % 2]}/{number:02}.png", encode(picture(number, number % 2, SIDE, SIDE), "PNG")
                )
        file.writestr("train/a/none.png", b"no image")
    found = ["--data.name", "zip", "--data.root", str(tmp_path), "--data.size", str(SIDE), "--data.workers", "0"]
    found += ["--model.name", "resnet8", "--batch_size", "8", "--epochs", "2", "--data.max_bad_share", "0.1"]
    return [*found, "--tracking.trackers", "[]", "--tracking.progress", "false"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("more", [[], ["--data.workers", "1"], ["--data.crop_scale", "null"]])
def test_a_source_from_outside_trains_and_its_run_goes_on(words, more, tmp_path, capsys):
    run = tmp_path / "run"
    words += [*more, "--data.options.ending", "png", "--run_dir", str(run)]
    rows = train(parse_recipe(words))
    # Three steps and one for the rest; in memory, unreadable images are left out beforehand.
    assert [row["step"] for row in rows] == ([4, 8] if more[:1] != ["--data.crop_scale"] else [3, 6])
    assert [row["eval_samples"] for row in rows] == [TEST] * 2
    record = json.loads((run / "data.json").read_text())
    assert (record["name"], record["classes"], record["eval"]["images"]) == ("zip", ["a", "b"], TEST)
    assert "ending: png" in (run / "recipe.yaml").read_text()
    assert "images.zip, train/a/none.png" in capsys.readouterr().out + (run / "bad_images.txt").read_text()
    assert len(train(parse_recipe([*words, "--epochs", "2"]))) == 2
    with pytest.raises(RunFolderError, match=r"data.options.ending: '.png' here, 'png' in the folder"):
        train(parse_recipe([*words, "--data.options.ending", ".png"]))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "zip", "options": {"suffix": "png"}}, r"data.options=.*'suffix'.* do not suit data.name='zip'"),
        ({"name": "zip", "train": ["a", "b"]}, "data.train=.*it must be a folder of the archive"),
        ({"name": "zip", "streaming": True}, "data.streaming=True is for data.name=hub, but data.name is 'zip'"),
        ({"name": "imagefolder", "options": {"ending": 1}}, "data.options=.* do not suit data.name='imagefolder'"),
        (
            {"options": {"token": "abc"}},
            r"data.options=.*\(hidden\)'} is for .* or webdataset or zip, .*digits",
        ),
    ],
)
def test_a_wrong_setting_of_a_source_from_outside_is_an_error_that_names_it(settings, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**settings)


@pytest.mark.usefixtures("installed")
def test_a_source_from_outside_is_taken_by_studies(tmp_path):
    _, recipes = load_study(write(tmp_path / "s.yaml", axes={"data.name": ["zip", "digits"]}))
    assert [recipe.data.streamed for recipe in recipes.values()] == [True, False]


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("import no_such_package", "zip = zip_source:ZIP in the group 'robust_dist.sources' cannot be loaded.*no_such"),
        ("ZIP = print", "is a builtin_function_or_method; it must be a SourceChoice"),
    ],
)
def test_an_entry_point_that_is_no_source_is_an_error_that_names_it(install, code, match):
    install(code)
    with pytest.raises(ValueError, match=match):
        DataConfig(name="zip")
