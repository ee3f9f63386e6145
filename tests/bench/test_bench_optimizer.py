"""The optimizer's benchmark."""

import math
import re

import pytest
import torch

from robust_dist.bench import optimizer
from robust_dist.bench.optimizer import ADAMW_FUSED, SETS, TRIAD, bench_optimizer, makers, run
from robust_dist.cli import main

CPU = torch.device("cpu")
SOME = ("RAdaBeliefW foreach", "RAdaBeliefW single", ADAMW_FUSED, "torch RAdam foreach")


def _broken(params):
    raise RuntimeError("nvcc was not found\nlong log")


def _breaking(params):
    found = torch.optim.SGD(params, lr=0.0)
    found.step = lambda: _broken(params)
    return found


@pytest.fixture
def contend(monkeypatch):
    """Decides which contenders there are: those of these names, and others by name and maker."""

    def only(*names, **others):
        some = {name: makers(CPU)[name] for name in names}
        monkeypatch.setattr(optimizer, "makers", lambda device: others | some)

    return only


@pytest.fixture(autouse=True)
def _few_and_small(monkeypatch, contend):
    monkeypatch.setitem(SETS, "tiny", lambda: [(3, 2), (4,), ()])
    # DeepSpeed's would be compiled.
    contend(*SOME)


def test_the_sets_have_the_sizes_of_the_models_they_are_named_after():
    found = {name: (len(SETS[name]()), sum(map(math.prod, SETS[name]()))) for name in SETS}
    assert found["resnet56"] == (167, 853_018)
    assert found["resnet18"] == (62, 11_173_962)
    assert found["resnet50"] == (161, 25_557_032)
    assert found["vit_l"] == (296, 304_326_632)
    assert found["flat"] == (1, 100_000_000)


def test_ratios_are_to_the_yardsticks_of_the_same_run():
    by_name = {row.optimizer: row for row in run(sets=["tiny"], rounds=1, threads=1).rows}
    assert set(by_name) == {TRIAD, *SOME}
    assert by_name[ADAMW_FUSED].to_adamw_fused == by_name[TRIAD].of_limit == 1.0
    own = by_name["RAdaBeliefW foreach"]
    assert own.to_adamw_fused == own.timing.median / by_name[ADAMW_FUSED].timing.median
    assert own.of_limit == by_name[TRIAD].timing.median / own.timing.median
    assert own.bandwidth == 28 * 11 / own.timing.median


def test_every_contender_that_is_asked_for_is_known_on_both_devices():
    shared = {*SOME, "torch AdamW foreach", "timm AdaBelief", "timm RAdaBelief", "adabelief-pytorch"}
    shared |= {"pytorch_optimizer AdaBelief", "pytorch_optimizer RAdaBelief"}
    assert set(makers(CPU)) == shared | {"RAdaBeliefW fused", "DeepSpeedCPUAdam"}
    assert set(makers(torch.device("cuda"))) == shared | {"RAdaBeliefW triton", "DeepSpeed FusedAdam"}


@pytest.mark.parametrize("name", ["timm AdaBelief", "timm RAdaBelief", "adabelief-pytorch"])
def test_peers_that_are_installed_can_step(name, capsys):
    pytest.importorskip(name.split()[0].replace("-", "_"))
    params = [torch.ones(3, requires_grad=True)]
    params[0].grad = torch.ones(3)
    makers(CPU)[name](params).step()
    assert (params[0] < 1).all()
    assert capsys.readouterr().out == ""


def test_a_peer_that_is_absent_cannot_be_built_or_fails_becomes_a_line(contend):
    contend(*SOME, absent=lambda params: __import__("no_such_package"), unbuilt=_broken, breaking=_breaking)
    text = bench_optimizer(sets=["tiny"], rounds=1, threads=1)
    assert "- left out: absent: no_such_package is not installed" in text
    assert "- left out: unbuilt: RuntimeError: nvcc was not found" in text
    assert "- left out: breaking on tiny: RuntimeError: nvcc was not found" in text
    assert "| tiny | RAdaBeliefW foreach |" in text


def test_contenders_are_timed_in_groups_where_memory_is_short_each_beside_the_yardstick(monkeypatch):
    # Room for two states of 8 bytes a parameter, beside temporaries and the limit's arrays.
    free = (8 * (11 + optimizer.LIMIT_ELEMENTS) + 17 * 11) / optimizer.SHARE_OF_MEMORY
    monkeypatch.setattr(optimizer, "free_memory", lambda: free)
    groups = optimizer._groups(SOME, 11, CPU)
    assert groups == [
        [name, ADAMW_FUSED] if name != SOME[-1] else [ADAMW_FUSED, name] for name in SOME if name != SOME[2]
    ]
    rows = run(sets=["tiny"], rounds=1, threads=1).rows
    assert [row.optimizer for row in rows] == [TRIAD, *SOME]


def test_the_command_prints_the_table_and_writes_it_with_a_picture(capsys, tmp_path):
    words = ["bench", "optimizer", "--sets", "tiny", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    threads = torch.get_num_threads()
    try:
        assert main([*words, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (
        "| parameters | optimizer | ms | lowest to highest | GB/s | of the memory's speed | / AdamW fused |" in printed
    )
    assert len(re.findall(r"^\| tiny \|", printed, re.MULTILINE)) == 1 + len(SOME)
    assert (tmp_path / "optimizer.md").read_text() in printed + "\n"
    assert (tmp_path / "optimizer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"sets": ["vgg"]}, "sets must name"), ({"rounds": 0}, "rounds"), ({"threads": 0}, "threads")],
)
def test_wrong_arguments_are_errors_that_name_them(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(**kwargs)


@pytest.mark.slow
def test_deepspeeds_step_is_built_and_timed(contend):
    pytest.importorskip("deepspeed")
    contend(*SOME, "DeepSpeedCPUAdam")
    assert "DeepSpeedCPUAdam" in [row.optimizer for row in run(sets=["tiny"], rounds=1, threads=1, device="cpu").rows]
