"""The package as `pip install` leaves it: recipes, studies and launcher files by name, from any folder."""

import zipfile
from pathlib import Path

import pytest

from robust_dist.documents import config_names, find_config
from robust_dist.train.__main__ import launch_command
from tests import fresh
from tests.fresh import ROOT

CONFIGS = [path for path in ROOT.glob("configs/**/*.*") if path.suffix != ".md" and "results" not in path.parts]


def test_a_wheel_has_every_recipe_study_and_launcher_file():
    inside = {name for name in zipfile.ZipFile(fresh.wheel()).namelist() if name.startswith("robust_dist/configs/")}
    assert inside == {f"robust_dist/{path.relative_to(ROOT)}" for path in CONFIGS}


def test_an_installed_wheel_trains_a_recipe_by_its_name_from_any_folder(tmp_path):
    words = ["--config", "quickstart", "--epochs", "2", "--run_dir", "run", "--model.options", "{stem_stride: 2}"]
    code = "import sys, robust_dist; print(robust_dist.__file__, flush=True)\n"
    code += f"from robust_dist.cli import main; sys.exit(main({['train', '--accelerate', 'cpu', *words]}))"
    status, said = fresh.run("-c", code, cwd=tmp_path)
    assert status == 0, said
    assert said.startswith(str(fresh.interpreter().parents[1]))
    assert "2 ranks" in said
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_a_file_of_the_current_folder_comes_before_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("recipes", "quickstart") == find_config("recipes", "quickstart.yaml")
    assert find_config("recipes", "quickstart").is_file()
    assert "quickstart" in config_names("recipes")
    Path("quickstart.yaml").write_text("epochs: 1\n")
    assert find_config("recipes", "quickstart.yaml") == Path("quickstart.yaml")
    Path("quickstart").mkdir()
    assert find_config("recipes", "quickstart").is_absolute()


def test_deepspeed_s_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = launch_command("zero2", ["--config", "quickstart", "--num_processes", "4"])
    assert Path(command[command.index("--deepspeed_config_file") + 1]).is_file()
    assert command[-5:] == ["robust_dist.train", "--config", "quickstart", "--num_processes", "4"]
    assert command[command.index("-m", 2) - 2 : command.index("-m", 2)] == ["--num_processes", "4"]
    (tmp_path / "configs/deepspeed").mkdir(parents=True)
    (tmp_path / "configs/deepspeed/zero2.json").write_text("{}")
    assert "--deepspeed_config_file" not in launch_command("zero2", [])


def test_an_unknown_launcher_file_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"--accelerate zero9: there is no such file.*fsdp2.*zero3_offload"):
        launch_command("zero9", [])
