"""Hours on a GPU that is not here: what is counted, and what the counts make."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from robust_dist.cli import main
from robust_dist.measure.dispatch import Operation, training_flops
from robust_dist.measure.gpus import find_gpu
from robust_dist.models import build_model
from robust_dist.study.measure import (
    ARITHMETIC_SHARE,
    MEMORY_SHARE,
    START_SECONDS,
    operations,
    run_hours,
    seconds,
)
from robust_dist.study.parse import load_study
from tests.study.studies import ROOT, write

H100 = find_gpu("h100")


def counted(build, shape: tuple[int, ...], precision: str = "no"):
    with FakeTensorMode():
        return operations(build(), torch.empty(shape), precision)


def test_a_layer_s_products_and_bytes_are_counted_and_its_views_are_not():
    forward, both = counted(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10, bias=False)), (8, 3, 2, 2))
    product = 2 * 8 * 12 * 10
    assert forward == [Operation(product, 4 * (8 * 12 + 12 * 10 + 8 * 10))]
    # Of the backward pass the weight's gradient alone: images need none.
    assert sum(one.flops for one in both) == 2 * product


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_network_s_arithmetic_is_what_the_meter_counts(precision):
    forward, both = counted(lambda: build_model("resnet8", 10), (4, 3, 32, 32), precision)
    assert sum(one.flops for one in both) == 4 * training_flops(build_model("resnet8", 10), (3, 32, 32))
    assert 0 < len(forward) < len(both)


def test_half_precision_moves_fewer_bytes():
    whole, half = (
        sum(one.bytes for one in counted(lambda: build_model("resnet8", 10), (64, 3, 32, 32), precision)[0])
        for precision in ("no", "bf16")
    )
    assert half < whole


def test_an_operation_takes_as_long_as_the_slowest_of_arithmetic_memory_and_host():
    by_arithmetic, by_memory = Operation(1e12, 0), Operation(0, 10**9)
    peak, rate = ARITHMETIC_SHARE * H100.tflops("bf16"), MEMORY_SHARE * H100.memory_gbytes
    assert seconds([by_arithmetic, by_memory], H100, "bf16") == pytest.approx(1 / peak + 1 / rate)
    assert seconds([Operation(1, 1)] * 1000, H100, "bf16") == pytest.approx(1000 * START_SECONDS)


def test_the_paper_s_runs_scale_with_their_epochs():
    _, recipes = load_study(ROOT / "configs" / "studies" / "table3.yaml")
    recipe = next(iter(recipes.values()))
    assert recipe.model.channels_last
    whole = run_hours(recipe, H100)
    assert run_hours(replace(recipe, epochs=150), H100) == pytest.approx(whole / 2)
    assert run_hours(recipe, find_gpu("a100-80")) > whole


def test_a_gpu_that_is_not_in_the_table_is_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write(tmp_path / "grid.yaml", axes={"optimizer.lr": [0.1]})
    assert main(["study", "run", str(path), "--dry-run", "--gpu", "h1000"]) == 2
    assert "--gpu='h1000' is not in the table. Did you mean h100?" in capsys.readouterr().err
