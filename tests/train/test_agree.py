"""Ranks share settings, backends, buffers, scores and figures."""

import copy
import json
import tempfile
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from robust_dist.augment import RobustAugment
from robust_dist.data import DATASETS, load_dataset
from robust_dist.measure.dispatch import Watch
from robust_dist.optim import RAdaBeliefW
from robust_dist.ranks.talk import on_rank_0, ranks_text
from robust_dist.train.display import Figures, Meter, measured
from robust_dist.train.evaluate import average_buffers, broadcast_buffers, evaluate
from robust_dist.train.main import check_ranks_agree
from robust_dist.train.opening import backends_of
from robust_dist.train.recipe import DataConfig, Recipe
from robust_dist.train.sources import load_sets
from tests.ranks import run_ranks


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 10)).eval()


def digits():
    images = load_dataset("digits", "data", train=False)
    return images, RobustAugment(10, 32, (0.3,) * 3, (0.3,) * 3)


def score(rank, world_size):
    images, augment = digits()
    return evaluate(net(), images, augment, batch_size=50, rank=rank, world_size=world_size)


def fetched(accelerator):
    """The rank that was told to download, and whether the files existed when the others looked."""
    calls = []

    def loader(root, train, download):
        calls.append(download)
        if download:
            time.sleep(0.3)
            (root / "file").touch()
        assert (root / "file").exists()
        return load_dataset("digits", root, train=train)

    with tempfile.TemporaryDirectory() as folder:
        root = on_rank_0(lambda: folder)
        DATASETS["slow"] = replace(DATASETS["digits"], loader=loader)
        load_sets(Recipe(data=DataConfig(name="slow", root=root)), accelerator)
        accelerator.wait_for_everyone()
    return calls


PIPELINE = RobustAugment(3, 8, (0.5,), (0.2,))


def copies_of_buffers(norm):
    """Number of copies made by averaging and broadcasting the buffers of ten layers."""
    layers = nn.Sequential(*(copy.deepcopy(norm) for _ in range(10)))
    calls = Calls()
    with calls:
        average_buffers(layers)
        broadcast_buffers(layers)
    return calls.count("aten::_foreach_copy_"), calls.count("aten::copy_")


class Calls(Watch):
    """The names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def note(self, func, args, kwargs, result):
        self.names.append(func._schema.name)

    def count(self, name):
        return self.names.count(name)


def stepped_by(*, foreach):
    return RAdaBeliefW([nn.Parameter(torch.zeros(2))], foreach=foreach)


def scenarios():
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(rank))
    average_buffers(norm)
    return {
        "seeds": message(lambda: check_ranks_agree(Recipe(seed=rank))),
        "backends": message(lambda: backends_of(Recipe(), accelerator, stepped_by(foreach=rank == 0), PIPELINE)),
        "one backend": backends_of(Recipe(), accelerator, stepped_by(foreach=True), PIPELINE).optimizer,
        "same": message(lambda: check_ranks_agree(Recipe())),
        "buffers": norm.running_mean.tolist(),
        "copies": copies_of_buffers(norm),
        "score": score(rank, world),
        "fetched": fetched(accelerator),
        "measured": measured(Meter(world, 6, 2.0), Figures(1.0 + rank, 12, wait_seconds=0.5), accelerator),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_settings_backends_buffers_and_scores_are_the_same_on_every_rank(world_size):
    results = run_ranks(scenarios, world_size)
    for result in results:
        assert "seed: rank 0: 0; rank 1: 1" in result["seeds"]
        assert result["same"] is None
        assert "different backends" in result["backends"]
        others = ranks_text(range(1, world_size))
        assert f"optimizer: rank 0: 'foreach'; {others}: 'single-tensor'" in result["backends"]
        assert result["one backend"] == "foreach"
        assert result["buffers"] == [(world_size - 1) / 2] * 3
        assert result["copies"] == (2, 0)
        assert result["score"].samples == 359
    assert [result["fetched"] for result in results] == [[True] * 2] + [[False] * 2] * (world_size - 1)
    assert len({json.dumps(result["measured"]) for result in results}) == 1
    slowest = results[0]["measured"]
    assert slowest["images_per_second"] == 12 / world_size
    assert slowest["images_per_second_per_rank"] == 12 / world_size**2
    assert slowest["mfu"] == 6 * 12 / world_size**2 / 2
    assert slowest["data_wait_share"] == 0.5
    alone = score(0, 1)
    assert all(result["score"].accuracy == alone.accuracy for result in results)
    assert all(result["score"].loss == pytest.approx(alone.loss, rel=1e-6) for result in results)


def test_evaluation_leaves_the_model_in_the_mode_it_was_in():
    images, augment = digits()
    model = net().train()
    evaluate(model, images, augment, batch_size=400)
    assert model.training
