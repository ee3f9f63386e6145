"""The package as `pip install` leaves it: recipes, studies and launcher files by name, from any folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from robust_dist.config_files import config_names, find_config
from robust_dist.train.__main__ import launch_command

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in ROOT.glob("configs/**/*.*") if path.suffix != ".md" and "results" not in path.parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Not in the checkout, whose build folder may hold files of another version.
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("robust_dist/", "configs/", "pyproject", "README", "LICENSE")) and "/results/" not in name:
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                target.symlink_to(os.readlink(ROOT / name))
            else:
                target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", folder / "out", folder / "source"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next((folder / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of an environment that has the wheel, and this one's other packages behind it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    others = dict.fromkeys([sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("site-packages"))])
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return folder / "bin" / "python"


def run(python, *words, cwd):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([python, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_wheel_has_every_recipe_study_and_launcher_file(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("robust_dist/configs/")}
    assert inside == {f"robust_dist/{path.relative_to(ROOT)}" for path in CONFIGS}


def test_an_installed_wheel_trains_a_recipe_by_its_name_from_any_folder(installed, tmp_path):
    words = ["--config", "quickstart", "--epochs", "2", "--run_dir", "run", "--model.options", "{stem_stride: 2}"]
    code = "import sys, robust_dist; print(robust_dist.__file__, flush=True)\n"
    code += f"from robust_dist.cli import main; sys.exit(main({['train', '--accelerate', 'cpu', *words]}))"
    status, said = run(installed, "-c", code, cwd=tmp_path)
    assert status == 0, said
    assert said.startswith(str(installed.parents[1]))
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
