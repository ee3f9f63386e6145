import math

import pytest
import torch
import torch.distributed as dist

from robust_dist.bench import scale


def shard_rows(rows, shards, rank):
    """FSDP2's share of dimension 0: equal shares, rounded up, for the first ranks."""
    share = -(-rows // shards)
    return share, max(0, min(share, rows - rank * share))


def expected(shapes, shards, rank):
    """(shapes, bytes): the shard is stored with its padding, the two moments without, and a step of 4 bytes."""
    held, size = [], 0
    for shape in shapes:
        share, own = shard_rows(shape[0], shards, rank)
        rest = math.prod(shape[1:])
        held.append((own, *shape[1:]))
        size += 4 * share * rest + 8 * own * rest + 4
    return held, size


def check(case, shards):
    shapes = scale.SETS[case.name]()
    assert case.ideal_bytes == 12 * sum(map(math.prod, shapes)) / shards
    for held, rank in ((case.first, 0), (case.last, shards - 1)):
        assert (held.shapes, held.bytes) == expected(shapes, shards, rank)
        assert held.empty == sum(shard_rows(shape[0], shards, rank)[1] == 0 for shape in shapes)
        assert held.misplaced == 0
        assert held.collectives == 0
    assert case.switch == 0


@pytest.mark.parametrize("world", [8, 64])
def test_a_rank_holds_its_shards_and_their_state_and_a_step_sends_nothing(world):
    for layout, shards in (("FSDP2", world), ("HSDP", 8)):
        (case,) = scale.measure(layout, world, ["ResNet-50"])
        check(case, shards)


def test_at_16384_ranks_most_shards_are_empty_and_the_switch_needs_no_collective():
    (case,) = scale.measure("FSDP2", 16384, ["ViT-L/16"])
    check(case, 16384)
    assert case.first.empty == 0
    assert case.last.empty == len(case.last.shapes)
    assert case.mesh_seconds > 0


def test_a_collective_inside_a_step_would_be_counted():
    from torch.distributed.tensor import DTensor, Partial

    with scale.fake_rank(8, 0):
        mesh = scale.build_mesh("FSDP2", 8)
        params = scale.sharded([(16, 2), (16, 2)], mesh)
        params[0].grad = DTensor.from_local(torch.ones(16, 2), mesh, [Partial()], run_check=False)
        assert scale.step_once(params).collectives == 1


def test_the_table_has_a_line_for_each_set_layout_and_world_and_leaves_no_process_group(monkeypatch):
    monkeypatch.setattr(scale, "SETS", {"one": lambda: [(16, 512), (5,)]})
    text = scale.bench_scale((8, 16))
    assert not dist.is_initialized()
    lines = text.splitlines()
    assert [len(line.split("|")) for line in lines[:6]] == [12] * 6
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert [line[1:5] for line in cells] == [
        ["FSDP2", "8", "2x512 / 2x512", "0 / 1 of 2"],
        ["HSDP", "8", "2x512 / 2x512", "0 / 1 of 2"],
        ["FSDP2", "16", "1x512 / 1x512", "0 / 1 of 2"],
        ["HSDP", "16", "2x512 / 2x512", "0 / 1 of 2"],
    ]
    assert all(line[7:] == ["0", "0", "0"] for line in cells)


@pytest.mark.parametrize(("layout", "world", "said"), [("FSDP2", 12, "world_size=12"), ("DDP", 8, "layout='DDP'")])
def test_a_layout_or_world_that_there_is_not_is_named(layout, world, said):
    with pytest.raises(ValueError, match=said):
        scale.measure(layout, world)
    assert not dist.is_initialized()


def test_within_a_process_group_the_command_says_so():
    with scale.fake_rank(8, 3), pytest.raises(RuntimeError, match="rank 3 of 8 already"):
        scale.bench_scale((8,))


def test_the_sets_are_the_parameters_of_the_models():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    with torch.device("meta"):
        models = {"ResNet-50": torchvision.models.resnet50(), "ViT-L/16": timm.create_model("vit_large_patch16_224")}
    for name, model in models.items():
        assert sorted(scale.SETS[name]()) == sorted(tuple(p.shape) for p in model.parameters())
