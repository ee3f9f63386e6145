"""The optimizer's benchmark."""

import pytest
import torch

from robust_dist.bench import optimizer
from robust_dist.bench.optimizer import SETS, bench_optimizer, main, run


@pytest.fixture(autouse=True)
def _a_small_set(monkeypatch):
    monkeypatch.setitem(SETS, "tiny", lambda: [(3, 2), (4,), ()])


def _elements(name):
    return sum(torch.Size(shape).numel() for shape in SETS[name]())


def test_the_sets_have_the_sizes_of_the_models_they_are_named_after():
    assert (len(SETS["resnet56"]()), _elements("resnet56")) == (167, 853_018)
    assert (len(SETS["resnet18"]()), _elements("resnet18")) == (62, 11_173_962)
    assert (len(SETS["resnet50"]()), _elements("resnet50")) == (161, 25_557_032)
    assert (len(SETS["vit_l"]()), _elements("vit_l")) == (296, 304_326_632)


def test_ratios_are_to_the_peers_of_the_same_run():
    rows, _ = run(sets=["tiny"], rounds=1, threads=1)
    by_name = {row.optimizer: row for row in rows}
    assert by_name[optimizer.RADAM].to_radam == by_name[optimizer.ADAMW_FUSED].to_adamw_fused == 1.0
    own = by_name["RAdaBeliefW"]
    assert own.to_radam == own.timing.median / by_name[optimizer.RADAM].timing.median
    assert own.bandwidth == 28 * 11 / own.timing.median


def test_an_uninstalled_peer_is_named_and_left_out(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(optimizer.importlib, "import_module", absent)
    table = bench_optimizer(sets=["tiny"], rounds=1, threads=1)
    assert "left out, not installed: timm AdaBelief, timm RAdaBelief, adabelief-pytorch" in table
    assert "| tiny | RAdaBeliefW |" in table


def test_the_command_prints_the_table(capsys):
    main(["--sets", "tiny", "--rounds", "1", "--threads", "1"])
    assert "| parameters | optimizer | ms |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"sets": ["vgg"]}, "sets must name"), ({"rounds": 0}, "rounds"), ({"threads": 0}, "threads")],
)
def test_wrong_arguments_are_errors_that_name_them(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(**kwargs)


def test_slow_contenders_are_left_out_of_large_sets_only(monkeypatch):
    monkeypatch.setattr(optimizer, "LARGE", 11)
    small, _ = run(sets=["tiny"], rounds=1, threads=1)
    assert not {row.optimizer for row in small} & set(optimizer.SLOW)
    monkeypatch.setattr(optimizer, "LARGE", 12)
    whole, _ = run(sets=["tiny"], rounds=1, threads=1)
    assert {row.optimizer for row in whole} > {"RAdaBeliefW foreach=False"}
