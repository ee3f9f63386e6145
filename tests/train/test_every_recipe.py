"""Every shipped recipe under every config, with its own precision and memory format, but small data and models."""

from pathlib import Path

import pytest
import torch.distributed as dist

from robust_dist.train.recipe import load_recipe
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks
from tests.train import streamed
from tests.train.under_engines import ROOT, train_under

pytest.importorskip("datasets")
pytest.importorskip("deepspeed")
# Engines that cast batch normalisation's weights, which torch does not support on a CPU, use a model without it.
ENGINES = {"ddp": [], "fsdp1": []} | dict.fromkeys(("fsdp2", "zero1", "zero2", "zero3", "zero3_offload"), streamed.VIT)
DIGITS = ["--data.name", "digits", "--batch_size", "256", "--epochs", "1", "--schedule.warmup_steps", "0"]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))


def small(name: str, sets: str) -> list[str]:
    if not load_recipe(str(ROOT / "configs" / "recipes" / f"{name}.yaml")).data.streamed:
        return [*DIGITS, *streamed.RESNET]
    return [*streamed.SMALL, *streamed.recipes(sets)[name]]


def trains(engine: str, name: str, sets: str, folder: str) -> None:
    config = str(ROOT / "configs" / "recipes" / f"{name}.yaml")
    words = [*small(name, sets), *ENGINES[engine], "--run_dir", f"{folder}/{name}"]
    out = train_under(engine, f"{folder}/{name}", "--config", config, *streamed.QUIET, *words)
    assert dist.get_rank() or "held-out images" in out, out
    assert [*Path(f"{folder}/{name}").glob("checkpoints/step-*")]


def on_two(engine: str, sets: str, folder: str) -> dict[str, str | None]:
    return run_scenarios({name: lambda name=name: trains(engine, name, sets, folder) for name in NAMES})


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    streamed.write_sets(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_recipe_trains(engine, sets, tmp_path):
    results = run_ranks(on_two, 2, engine, sets, str(tmp_path), timeout=120.0)
    for name in NAMES:
        assert_passed(results, name)
