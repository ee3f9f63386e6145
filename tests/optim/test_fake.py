"""Parameters without values: FakeTensorMode, as memory estimates use it, and the meta device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from robust_dist.optim import RAdaBeliefW
from tests.optim.helpers import BACKENDS
from tests.versions import needs_torch_2_7

F32, BF16, COMPLEX = torch.float32, torch.bfloat16, torch.complex64
MEMORY = {"exp_avg_dtype": "bfloat16", "stochastic_rounding": True, "master_weights": True}
# Fake CUDA tensors need no GPU.
CASES = [
    *(("cpu", F32, kwargs) for kwargs in BACKENDS.values()),
    *(("cpu", dtype, {}) for dtype in (BF16, COMPLEX)),
    ("cpu", BF16, MEMORY),
    *(pytest.param("cuda", BF16, kwargs, marks=needs_torch_2_7) for kwargs in ({}, {"fused": True}, MEMORY)),
]


def _steps(params, **kwargs):
    optimizer = RAdaBeliefW(params, **kwargs)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("device", "dtype", "kwargs"), CASES, ids=str)
def test_under_fake_tensor_mode_a_step_runs_and_makes_the_state_that_a_real_one_makes(device, dtype, kwargs):
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in [(3, 2), (4,)]]
        optimizer = _steps(params, **kwargs)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    real = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in [(3, 2), (4,)]]
    expected = _steps(real, **{k: v for k, v in kwargs.items() if k != "fused"})
    for param, twin in zip(params, real, strict=True):
        state = optimizer.state[param]
        assert all(isinstance(value, FakeTensor) and value.device.type == device for value in state.values())
        described = {key: (value.dtype, value.shape) for key, value in state.items()}
        assert described == {key: (value.dtype, value.shape) for key, value in expected.state[twin].items()}


def test_state_that_was_never_real_may_be_made_of_real_state():
    param = nn.Parameter(torch.ones(3))
    real = _steps([param])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(param)
        optimizer = RAdaBeliefW([fake])
        optimizer.state[fake] = {key: mode.from_tensor(value) for key, value in real.state[param].items()}
        fake.grad = torch.zeros_like(fake)
        optimizer.step()


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_parameters_on_the_meta_device_are_stepped(kwargs):
    params = [nn.Parameter(torch.ones(3, 2, device="meta"))]
    state = _steps(params, **kwargs).state[params[0]]
    assert (state["step"].item(), state["exp_avg"].device.type) == (3, "meta")


@needs_torch_2_7
@pytest.mark.parametrize("kwargs", [{}, {"foreach": False}, {"stochastic_rounding": True}], ids=str)
def test_fsdp2_under_fake_tensor_mode_and_a_fake_process_group_is_stepped(kwargs):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        with FakeTensorMode():
            model = fully_shard(nn.Linear(4, 5), mesh=mesh)
            optimizer = RAdaBeliefW(model.parameters(), **kwargs)
            for _ in range(3):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
            moments = optimizer.state[model.weight]["exp_avg"]
        assert (moments.placements, moments.to_local().shape) == (model.weight.placements, (3, 4))
    finally:
        dist.destroy_process_group()


def test_torchs_memory_tracker_counts_the_state():
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model = nn.Linear(64, 64)
        optimizer, tracker = RAdaBeliefW(model.parameters()), MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {str(kind): size for kind, size in tracker.get_tracker_snapshot()[torch.device("cpu")].items()}
    assert found["_MemRefType.OPT"] == sum(4 * (2 * p.numel() + 1) for p in model.parameters())
