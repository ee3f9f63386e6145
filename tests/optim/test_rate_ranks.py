"""A measured rate is that of one process under DDP, FSDP1, FSDP2 and HSDP, on 2, 3 and 4 gloo ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.optim import RAdaBeliefW
from tests.ranks import run_ranks

SETTINGS = {"betas": (0.9, 0.9), "rate_guard": 1.0, "averaging": "schedule_free"}
STEPS, BATCH = 8, 12


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def batches():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(BATCH) % 2
    return [(torch.randn(BATCH, 4, generator=generator, dtype=torch.float64), labels) for _ in range(STEPS)]


def rates(model, optimizer, rank=0, world=1):
    """The rate of each step; every rank sees its part of the batch."""
    found = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.chunk(world)[rank]), y.chunk(world)[rank])
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
        found.append(optimizer.measured_rate)
    optimizer.eval()
    with torch.no_grad():
        outputs = model(batches()[0][0])
    optimizer.train()
    return found, outputs


def under_engines():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()

    def ddp():
        return nn.parallel.DistributedDataParallel(net()), None

    def fsdp1(*, orig, strategy=ShardingStrategy.FULL_SHARD):
        model = FullyShardedDataParallel(
            net(), use_orig_params=orig, device_id=torch.device("cpu"), sharding_strategy=strategy
        )
        return model, world if strategy is ShardingStrategy.NO_SHARD else 1

    def fsdp2(mesh=None):
        model = net()
        fully_shard(model[0], mesh=mesh or init_device_mesh("cpu", (world,)))
        fully_shard(model, mesh=mesh or init_device_mesh("cpu", (world,)))
        return model, None

    makers = {"ddp": ddp, "fsdp2": fsdp2}
    makers["fsdp1"] = lambda: fsdp1(orig=True)
    makers["fsdp1 flat"] = lambda: fsdp1(orig=False)
    if world == 4:
        makers["hsdp"] = lambda: fsdp2(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    found = {}
    for name, make in makers.items():
        model, copies = make()
        optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
        if copies is not None:
            nn.functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
            with pytest.raises(RuntimeError, match=r"flat shard of FSDP1.*measure_over"):
                optimizer.observe_gradients()
            optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
            optimizer.measure_over(copies=copies)
        found[name] = rates(model, optimizer, rank, world)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_measured_rate_is_that_of_one_process(world):
    model = net()
    expected, outputs = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    for of_rank in run_ranks(under_engines, world):
        assert set(of_rank) >= {"ddp", "fsdp2", "fsdp1", "fsdp1 flat"}
        for name, (found, theirs) in of_rank.items():
            assert found == pytest.approx(expected, rel=1e-6), name
            torch.testing.assert_close(theirs, outputs, rtol=1e-6, atol=1e-8, msg=name)


def gone_on(folder):
    """FSDP2: the rates and weights of a run that is saved while it is evaluated, and of one that goes on from there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    from robust_dist.engines.fsdp.state import set_state, state_of
    from robust_dist.optim.groups import reshard

    def started():
        model = net()
        fully_shard(model)
        return model, RAdaBeliefW(model.parameters(), **SETTINGS)

    model, optimizer = started()
    rates(model, optimizer, dist.get_rank(), dist.get_world_size())
    optimizer.eval()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    other, theirs = started()
    state = state_of(other, theirs)
    dcp.load(state, checkpoint_id=folder)
    set_state(other, theirs, state)
    found = []
    for of, by in ((model, optimizer), (other, theirs)):
        assert by.param_groups[0]["train_mode"] is False
        reshard(of)  # the evaluation has left the root's whole weights in place
        by.train()
        again, _ = rates(of, by, dist.get_rank(), dist.get_world_size())
        found.append((again, [p.to_local().tolist() for p in by.param_groups[0]["params"]]))
    return found


def test_a_measured_rate_goes_on_bit_for_bit_under_fsdp2(tmp_path):
    for whole, resumed in run_ranks(gone_on, 2, str(tmp_path)):
        assert whole == resumed
