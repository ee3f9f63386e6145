"""The two commands in the README, without their installation."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forked import python, python_program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """The repository's scripts and configs, with this interpreter as a .venv that counts as installed."""
    for name in ("launch", "configs", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / ".venv" / ".installed-train")
    with python_program(bin_folder / "python"):
        yield tmp_path


def quickstart(checkout, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(checkout / "launch" / "quickstart.sh"), *words]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=300)


def test_quickstart_trains_on_two_ranks_and_shows_the_result_and_again_at_once(checkout):
    words = ["--epochs", "1", "--batch_size", "128", "--tracking.trackers", "[]", "--model.options", "{stem_stride: 2}"]
    first = quickstart(checkout, *words)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "on 359 held-out images of digits" in first.stdout
    assert "runs/quickstart/curves.png" in first.stdout
    assert (checkout / "runs" / "quickstart" / "curves.png").exists()
    assert '"num_processes": 2' in (checkout / "runs" / "quickstart" / "environment.json").read_text()
    again = quickstart(checkout, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming" in again.stdout
    assert "epoch   1/1" not in again.stdout


def test_quickstart_passes_a_mistake_on(checkout):
    result = quickstart(checkout, "--epochs", "0")
    assert result.returncode != 0
    assert "epochs=0" in result.stdout


def test_setup_installs_again_when_the_requirements_have_changed(checkout):
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    probe = checkout / ".venv" / "bin" / "python"
    probe.write_text('#!/bin/sh\n[ "$1" = -m ] && echo "called $*"\nexit 0\n')
    command = f"source '{checkout}/launch/setup.sh' train"
    for expected in (True, False):
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert ("called -m pip install" in result.stdout) is expected


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_tests_of_a_gpu_run_alone_in_parallel_and_within_a_limit(checkout, has_gpu):
    shutil.copytree(ROOT / "tests", checkout / "tests", ignore=lambda *_: set(os.listdir(ROOT / "tests")) - {"run.sh"})
    shutil.copy(checkout / "pyproject.toml", checkout / ".venv" / ".installed-test")
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase $2 in *torch*) exit {int(not has_gpu)} ;; "import sys") exit 0 ;; esac\necho "called $*"\n'
    )
    command = ["bash", str(checkout / "tests" / "run.sh"), "--gpu", "-k", "optim"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if has_gpu:
        assert result.returncode == 0, result.stderr
        assert result.stdout == "called -m pytest -m gpu -n 4 --dist loadfile --timeout 300 -k optim\n"
    else:
        assert result.returncode == 2
        assert "error: --gpu needs a GPU that torch sees" in result.stderr
        assert "called" not in result.stdout


def test_one_process_where_two_were_asked_for_is_refused():
    # Accelerate's own launcher silently starts one process here.
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    code, said = python(*launch, ROOT / "launch" / "train.py", "--epochs", "1", "--tracking.trackers", "[]", cwd=ROOT)
    assert code != 0
    assert "error:" in said
    assert not (ROOT / "runs" / "run" / "metrics.jsonl").exists()
