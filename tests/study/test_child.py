"""Training processes of a study: forked from a server that has done the imports, or fresh; the same as by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from robust_dist.study.child import Launcher
from tests.study.studies import ROOT, TINY

ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def trained(launcher: Launcher, words: list[str], log: Path) -> int:
    held, other = os.pipe()
    with log.open("wb") as file:
        process = launcher.start(words, ENVIRONMENT | {"ONLY_THE_RUN_S": "1"}, file, held)
        process.join(240)
    assert "ONLY_THE_RUN_S" not in os.environ
    os.close(held)
    os.close(other)
    return process.exitcode


@pytest.mark.parametrize("forks", [True, False])
def test_status_and_output_are_those_of_the_command(tmp_path, forks):
    status = trained(Launcher(forks=forks), ["--config", str(tmp_path / "none.yaml")], tmp_path / "log")
    assert status == 2
    assert "none.yaml" in (tmp_path / "log").read_text()


def test_a_forked_run_is_that_of_a_fresh_process_to_the_bit(tmp_path):
    recipe = yaml.safe_load(Path(TINY["base"]).read_text()) | {"epochs": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", str(tmp_path / "recipe.yaml"), *(f"--{key}={value}" for key, value in TINY["set"].items())]
    assert trained(Launcher(forks=True), [*words, "--run_dir", str(tmp_path / "forked")], tmp_path / "log") == 0, (
        tmp_path / "log"
    ).read_text()
    command = [sys.executable, "launch/train.py", *words, "--run_dir", str(tmp_path / "fresh")]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert metrics(tmp_path / "forked") == metrics(tmp_path / "fresh")


def metrics(run: Path) -> list[str]:
    rows = map(yaml.safe_load, (run / "metrics.jsonl").read_text().splitlines())
    return [repr([row[key] for key in ("step", "train_loss", "eval_loss", "eval_accuracy")]) for row in rows]


def test_the_server_has_one_thread_to_fork():
    # In a process of its own: this one's server may be another.
    code = "import os, robust_dist.study.preload; print(len(os.listdir('/proc/self/task')))"
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout == b"1\n"
