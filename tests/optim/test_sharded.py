"""FSDP2 and other DTensor parameters on two gloo ranks give the trajectory of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.optim import RAdaBeliefW, param_groups
from tests.ranks import run_ranks
from tests.versions import TORCH_2_7

STEPS, WORLD = 12, 2


class Net(nn.Module):
    """Rows of 5, 3, 1 and 1 over two ranks: uneven shards and, on the second rank, empty ones."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 5, dtype=dtype), nn.LayerNorm(5, dtype=dtype), nn.Linear(5, 3, dtype=dtype), nn.Tanh()
        )
        self.out = nn.Linear(3, 1, dtype=dtype)
        self.late = nn.Parameter(torch.full((1, 2), 0.3, dtype=dtype))

    def forward(self, x, use_late):
        y = self.out(self.layers(x))
        return y + self.late.sum() if use_late else y


def _batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def _optimizer(model, **kwargs):
    return RAdaBeliefW(param_groups(model, 0.3), lr=0.05, **kwargs)


def _train(model, optimizer, batches, rank=0, world=1, first=0):
    for t, batch in enumerate(batches, first):
        x = batch.chunk(world)[rank].to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x, t >= 4).square().mean().backward()
        optimizer.step()


def _expected(dtype=torch.float64):
    model = Net(dtype)
    optimizer = _optimizer(model)
    _train(model, optimizer, _batches())
    return {n: (p.detach(), optimizer.state[p]) for n, p in model.named_parameters()}


def _check(model, optimizer, expected, tolerance):
    for name, param in model.named_parameters():
        value, state = expected[name]
        own = optimizer.state[param]
        torch.testing.assert_close(param.detach().full_tensor(), value, rtol=tolerance, atol=tolerance)
        assert own["step"].item() == state["step"].item()
        for key in ("exp_avg", "exp_avg_sq"):
            assert own[key].placements == param.placements
            assert own[key].shape == param.shape
            assert own[key].stride() == param.stride()
            assert own[key].to_local().shape == param.to_local().shape
            torch.testing.assert_close(own[key].full_tensor(), state[key], rtol=tolerance, atol=tolerance)


def _sharded(mesh, **kwargs):
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model.layers, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, _optimizer(model, **kwargs)


def _fsdp2_equals_one_process(mesh):
    for kwargs in ({}, {"foreach": False}, {"capturable": True}):
        model, optimizer = _sharded(mesh, **kwargs)
        _train(model, optimizer, _batches(), dist.get_rank(), WORLD)
        _check(model, optimizer, _expected(), 1e-6)
        empty = [p for p in model.parameters() if p.to_local().numel() == 0]
        assert bool(empty) == (dist.get_rank() == 1)
        assert all(optimizer.state[p]["step"].item() > 0 for p in empty)


def _dcp_resumes(mesh):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    model, optimizer = _sharded(mesh)
    _train(model, optimizer, _batches()[:6], dist.get_rank(), WORLD)
    saved = get_state_dict(model, optimizer, options=options)
    twin, other = _sharded(mesh)
    set_state_dict(twin, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    _train(twin, other, _batches()[6:], dist.get_rank(), WORLD, first=6)
    _check(twin, other, _expected(), 1e-6)


def _bfloat16_keeps_float32_state(mesh):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Net(torch.bfloat16), mesh=mesh)
    optimizer = _optimizer(model)
    _train(model, optimizer, _batches(), dist.get_rank(), WORLD)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    for param in model.parameters():
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["exp_avg_sq"].placements == param.placements


def _mixed_and_partial(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    plain, value = torch.arange(6.0), torch.arange(10.0).view(5, 2)
    params = [
        nn.Parameter(plain.clone()),
        nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])),
        nn.Parameter(distribute_tensor(value, mesh, [Replicate()])),
    ]
    optimizer = RAdaBeliefW(params, lr=0.1)
    single = [nn.Parameter(plain.clone()), nn.Parameter(value.clone()), nn.Parameter(value.clone())]
    reference = RAdaBeliefW(single, lr=0.1)
    for t in range(8):
        grads = [torch.sin(p.detach() + t) for p in single]
        params[0].grad = grads[0].clone()
        params[1].grad = distribute_tensor(grads[1], mesh, [Replicate()])
        params[2].grad = DTensor.from_local(grads[2] / WORLD, mesh, [Partial()])
        for param, grad in zip(single, grads, strict=True):
            param.grad = grad
        optimizer.step()
        reference.step()
    found = [params[0].detach(), *(p.detach().full_tensor() for p in params[1:])]
    torch.testing.assert_close(found, [p.detach() for p in single])


def _stochastic_rounding_does_not_depend_on_the_sharding(mesh):
    """Of gradients that are the same on one process and on two ranks, which those of a backward pass are not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kwargs = {"exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 5}
    values = [torch.arange(-10.0, 10.0).view(5, 4).bfloat16(), torch.arange(6.0).bfloat16()]
    whole = [nn.Parameter(value.clone()) for value in values]
    single, ends = RAdaBeliefW(whole, **kwargs), []
    for placement in (Shard(0), Replicate()):
        sharded = [nn.Parameter(distribute_tensor(value, mesh, [placement])) for value in values]
        ends.append((sharded, RAdaBeliefW(sharded, **kwargs)))
    for t in range(6):
        for params, optimizer in [(whole, single), *ends]:
            for param, value in zip(params, values, strict=True):
                grad = torch.sin(value + t)
                param.grad = grad if params is whole else distribute_tensor(grad, mesh, param.placements)
            optimizer.step()
    for params, optimizer in ends:
        for param, expected in zip(params, whole, strict=True):
            assert torch.equal(param.detach().full_tensor(), expected.detach())
            own, state = optimizer.state[param], single.state[expected]
            assert torch.equal(own["exp_avg"].full_tensor(), state["exp_avg"])


def _masters_are_sharded_and_resumed(mesh):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    kwargs = {"master_weights": True, "exp_avg_dtype": torch.bfloat16}
    ends = []
    for stop in (STEPS, 6):
        model = fully_shard(Net(torch.bfloat16), mesh=mesh)
        optimizer = _optimizer(model, **kwargs)
        _train(model, optimizer, _batches()[:stop], dist.get_rank(), WORLD)
        ends.append((model, optimizer))
    saved = get_state_dict(*ends[1])
    twin = fully_shard(Net(torch.bfloat16), mesh=mesh)
    other = _optimizer(twin, **kwargs)
    set_state_dict(twin, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    _train(twin, other, _batches()[6:], dist.get_rank(), WORLD, first=6)
    for param, expected in zip(twin.parameters(), ends[0][0].parameters(), strict=True):
        state, wanted = other.state[param], ends[0][1].state[expected]
        assert [state[key].dtype for key in ("exp_avg", "master")] == [torch.bfloat16, torch.float32]
        assert state["master"].placements == param.placements
        for key in ("exp_avg", "exp_avg_sq", "master"):
            assert torch.equal(state[key].to_local(), wanted[key].to_local())
        assert torch.equal(param.to_local(), state["master"].to_local().bfloat16())


def _compiled_run(mesh, kind, backend):
    """Train under FSDP2 with a compiled step and a rate that moves; returns the model and the number of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    # Rows of 5 and 1 over two ranks.
    model = fully_shard(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)), mesh=mesh)
    optimizer, counter = kind(model.parameters(), lr=0.1), CompileCounterWithBackend(backend or "eager")
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend=counter) if backend else optimizer.step
    for t, batch in enumerate(_batches()[:6]):
        optimizer.zero_grad()
        model(batch.float().chunk(WORLD)[dist.get_rank()]).square().mean().backward()
        step()
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 2)
    return model, counter.frame_count


def _a_compiled_step_equals_the_eager_one_in_no_more_graphs_than_adamw(mesh):
    theirs = _compiled_run(mesh, torch.optim.AdamW, "eager")[1]
    compiled, graphs = _compiled_run(mesh, RAdaBeliefW, "eager")
    eager, _ = _compiled_run(mesh, RAdaBeliefW, None)
    assert 0 < graphs <= theirs
    for param, twin in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(param.to_local(), twin.to_local(), rtol=1e-5, atol=1e-6)


def _a_compiled_step_takes_every_layout_and_draws_the_same_bits(mesh):
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    kwargs = {"exp_avg_dtype": "bfloat16", "stochastic_rounding": True}
    ends, counter, lr = [], CompileCounterWithBackend("aot_eager"), torch.tensor(0.1)
    torch._dynamo.reset()
    for compiled in (False, True):
        values = [torch.arange(-10.0, 10.0).view(5, 4).bfloat16(), torch.ones(1).bfloat16()]
        layouts = [(values[0], [Shard(0)]), (values[1], [Shard(0)]), (values[1], [Replicate()])]
        params = [nn.Parameter(distribute_tensor(value, mesh, layout)) for value, layout in layouts]
        params.append(nn.Parameter(values[0].clone()))
        optimizer = RAdaBeliefW(params, lr=lr.fill_(0.1), capturable=True, **kwargs)
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        for t in range(5):
            *sharded, plain = params
            plain.grad = torch.sin(values[0] + t)
            for param in sharded:
                grad = torch.sin(torch.arange(param.numel()).view(param.shape) + t).bfloat16()
                param.grad = DTensor.from_local(grad / WORLD, mesh, [Partial()])
            step()
            lr.fill_(0.1 / (t + 2))
        ends.append([p.detach() for p in (*(p.to_local() for p in sharded), plain)])
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _full_state_dicts_are_broadcast_from_rank_0(mesh):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    kwargs = {"exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True}
    model, optimizer = _sharded(mesh, **kwargs)
    _train(model.float(), optimizer, _batches()[:6], dist.get_rank(), WORLD)
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(saved) == (dist.get_rank() == 0)
    twin, other = _sharded(mesh, **kwargs)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin.float(), other, saved, options=options)
    for param, new in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[param].items():
            loaded = other.state[new][key]
            assert loaded.dtype == value.dtype
            assert torch.equal(*(getattr(t, "_local_tensor", t) for t in (loaded, value)))
    assert [group["exp_avg_dtype"] for group in other.param_groups] == ["bfloat16", "bfloat16"]


def _all_scenarios():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    _mixed_and_partial(mesh)
    _stochastic_rounding_does_not_depend_on_the_sharding(mesh)
    if TORCH_2_7:
        _a_compiled_step_takes_every_layout_and_draws_the_same_bits(mesh)
        _a_compiled_step_equals_the_eager_one_in_no_more_graphs_than_adamw(mesh)
        _full_state_dicts_are_broadcast_from_rank_0(mesh)
        _fsdp2_equals_one_process(mesh)
        _dcp_resumes(mesh)
        _bfloat16_keeps_float32_state(mesh)
        _masters_are_sharded_and_resumed(mesh)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_dtensor_parameters_on_two_ranks_equal_one_process():
    run_ranks(_all_scenarios, WORLD)
