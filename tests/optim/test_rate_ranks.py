"""A measured rate is that of one process under DDP, FSDP1, FSDP2, HSDP and tensor parallelism, on 2 to 4 gloo ranks."""

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
    """The rate of each step, with an evaluation before the last ones; every rank sees its part of the batch."""
    found = []
    for step, (x, y) in enumerate(batches()):
        if step == 5:
            evaluated(model, optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.chunk(world)[rank]), y.chunk(world)[rank])
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
        found.append(optimizer.measured_rate)
    return found, evaluated(model, optimizer)


def evaluated(model, optimizer):
    optimizer.eval()
    with torch.no_grad():
        outputs = model(batches()[0][0])
    optimizer.train()
    return outputs


def under_engines():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

    from robust_dist.engines.fsdp import check

    rank, world = dist.get_rank(), dist.get_world_size()

    def ddp():
        return nn.parallel.DistributedDataParallel(net())

    def fsdp1(*, orig, strategy=ShardingStrategy.FULL_SHARD, group=None):
        settings = {"sharding_strategy": strategy, "process_group": group}
        return FullyShardedDataParallel(net(), use_orig_params=orig, device_id=torch.device("cpu"), **settings)

    def hsdp1():
        shards, replicas = (
            [dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        )
        return fsdp1(orig=True, strategy=ShardingStrategy.HYBRID_SHARD, group=(shards[rank // 2], replicas[rank % 2]))

    def fsdp2(mesh=None):
        model = net()
        fully_shard(model[0], mesh=mesh or init_device_mesh("cpu", (world,)))
        fully_shard(model, mesh=mesh or init_device_mesh("cpu", (world,)))
        return model

    makers = {"ddp": ddp, "fsdp2": fsdp2}
    makers["fsdp1"] = lambda: fsdp1(orig=True)
    makers["fsdp1 flat"] = lambda: fsdp1(orig=False)
    makers["fsdp1, grad op"] = lambda: fsdp1(orig=True, strategy=ShardingStrategy.SHARD_GRAD_OP)
    if world == 4:
        makers["hsdp"] = lambda: fsdp2(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        makers["hsdp1"] = hsdp1
    found = {}
    for name, make in makers.items():
        model = make()
        optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
        if name == "fsdp1":
            nn.functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
            with pytest.raises(RuntimeError, match=r"flat shard of FSDP1.*measure_over"):
                optimizer.observe_gradients()
            optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
        check(model, optimizer)
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
        by.train()
        again, _ = rates(of, by, dist.get_rank(), dist.get_world_size())
        found.append((again, [p.to_local().tolist() for p in by.param_groups[0]["params"]]))
    return found


def test_a_measured_rate_goes_on_bit_for_bit_under_fsdp2(tmp_path):
    for whole, resumed in run_ranks(gone_on, 2, str(tmp_path)):
        assert whole == resumed


def wider():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


def under_tensor_parallelism():
    """FSDP2 over pairs of ranks that share each layer, and then a replicated parameter whose gradient is partial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = wider()
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    found = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS), mesh["dp"].get_local_rank(), 2)

    param = nn.Parameter(distribute_tensor(torch.ones(5), mesh["tp"], [Replicate()]))
    optimizer = RAdaBeliefW([param], rate_guard=1.0)
    param.grad = DTensor.from_local(torch.arange(5.0) - 2 * mesh["tp"].get_local_rank(), mesh["tp"], [Partial()])
    optimizer.observe(1.0)
    optimizer.step()
    return found, optimizer.state_dict()["param_groups"][0]["rate_mean_gradient"]


def test_each_element_counts_once_under_fsdp2_with_tensor_parallelism():
    model = wider()
    expected, outputs = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    for (found, theirs), partial in run_ranks(under_tensor_parallelism, 4):
        assert found == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(theirs, outputs, rtol=1e-6, atol=1e-8)
        # |2 g - 2| of 0 to 4 is 2 + 0 + 2 + 4 + 6
        assert partial == pytest.approx(0.1 * 14, rel=1e-12)
