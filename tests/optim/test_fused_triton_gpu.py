"""What of the CUDA step in Triton only a device can show: graphs, no synchronisation, memory, 2^31 elements."""

import warnings

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, fused_triton
from tests.optim.helpers import gradients, reference, start, step
from tests.optim.interpreted import leaves, snapshot

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
SHAPES = [(5000,), (3, 5), (), (64, 33)]


@pytest.fixture
def cuda():
    """The device, which must have the backend."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert fused_triton.why_not(device) is None
    return device


def with_gradients(device, dtype=torch.float32, seed=0):
    params = leaves(device, SHAPES, dtype)
    for i, param in enumerate(params):
        param.grad = gradients(param.shape, 1, dtype=dtype, seed=seed + i)[0].to(device)
    return params


def test_the_backend_is_taken_unless_it_is_declined(cuda, launches):
    for options, taken in (({}, 1), ({"fused": True}, 1), ({"fused": False}, 0), ({"foreach": True}, 0)):
        launches.clear()
        optimizer = RAdaBeliefW(with_gradients(cuda), **options)
        optimizer.step()
        assert len(launches) == taken, options
        device_type = next(iter(optimizer.state.values()))["step"].device.type
        assert device_type == ("cuda" if taken else "cpu")


@pytest.mark.parametrize("options", [{}, {"averaging": "schedule_free", "rate_guard": 2.0}], ids=str)
def test_no_step_synchronises(cuda, options):
    params = with_gradients(cuda)
    optimizer, loss = RAdaBeliefW(params, lr=0.1, **options), torch.ones((), device=cuda)
    optimizer.observe(loss)
    optimizer.step()
    torch.cuda.synchronize()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=cuda), torch.tensor(0.0, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(4):
            optimizer.param_groups[0].update(lr=0.1 / (t + 2), weight_decay=0.01 * t)
            params[t % 2].grad = None if t == 2 else torch.ones_like(params[t % 2])
            optimizer.observe(loss)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[2]]["step"].item() == 5


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("fresh_gradients", [False, True])
def test_a_captured_step_gives_the_trajectory_of_eager_steps(cuda, as_tensors, fresh_gradients):
    """Gradients that the capture itself allocates have addresses that only the graph knows."""
    params, twins = with_gradients(cuda), with_gradients(cuda)
    numbers = {"lr": 0.1, "weight_decay": 0.05}
    if as_tensors:
        numbers = {name: torch.tensor(value, device=cuda) for name, value in numbers.items()}
    optimizer = RAdaBeliefW(params, capturable=True, **numbers)
    eager = RAdaBeliefW(twins, lr=0.1, weight_decay=0.05)
    scale = torch.ones((), device=cuda)

    def compute():
        for param, source in zip(params, sources, strict=True):
            if fresh_gradients:
                param.grad = source * scale
            else:
                param.grad.copy_(source * scale)
        optimizer.step()

    sources = [param.grad.clone() for param in params]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    for t in range(12):
        value = 1.0 + 0.1 * max(0, t - 2)
        if t >= 3:
            scale.fill_(value)
            if as_tensors:
                optimizer.param_groups[0]["lr"].fill_(0.1 / t)
            graph.replay()
        if as_tensors and t >= 3:
            eager.param_groups[0]["lr"] = 0.1 / t
        step(eager, twins, [source * value for source in sources])
    assert [optimizer.state[p]["step"].item() for p in params] == [12] * len(params)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)


def test_an_eager_step_between_replays_disturbs_no_graph(cuda):
    params, twins = with_gradients(cuda), with_gradients(cuda)
    optimizer, eager = RAdaBeliefW(params, capturable=True), RAdaBeliefW(twins)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    held = [param.grad for param in params]
    for param, grad in zip(params, held, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    graph.replay()
    for _ in range(4):
        eager.step()
    assert snapshot(optimizer) == snapshot(eager)


def test_an_overflow_is_skipped_in_a_graph(cuda):
    params = with_gradients(cuda)
    optimizer = RAdaBeliefW(params, capturable=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device=cuda), torch.tensor(0.0, device=cuda)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert snapshot(optimizer) == before
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert snapshot(optimizer) != before


def test_a_capture_without_capturable_is_refused(cuda):
    optimizer = RAdaBeliefW(with_gradients(cuda))
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=cuda)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="needs capturable=True"):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_no_memory_beyond_the_state(cuda, dtype):
    params = [torch.ones(1 << 24, dtype=dtype, device=cuda, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = RAdaBeliefW(params)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for t in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_the_end_of_a_tensor_of_more_than_2_31_elements_is_stepped(cuda):
    numel = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 15 * numel:
        pytest.skip("needs 32 GB of the device's memory")
    param = torch.zeros(numel, dtype=torch.bfloat16, device=cuda, requires_grad=True)
    param.grad = torch.zeros_like(param)
    ends = gradients((7,), 1, dtype=torch.bfloat16)[0]
    param.grad[:3], param.grad[-4:] = ends[:3].to(cuda), ends[3:].to(cuda)
    RAdaBeliefW([param], weight_decay=0.0).step()
    expected, _, _ = reference(torch.zeros(7), [ends], weight_decay=0.0)
    found = torch.cat([param.detach()[:3], param.detach()[-4:]]).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert param.detach()[3:-4].count_nonzero().item() == 0


def test_a_grad_scaler_skips_the_overflow_without_synchronising(cuda):
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    param, twin = (start((4,), dtype=torch.float32).to(cuda).requires_grad_() for _ in range(2))
    optimizer, other = RAdaBeliefW([param]), RAdaBeliefW([twin])
    for t, grad in enumerate(gradients((4,), 6, dtype=torch.float32)):
        optimizer.zero_grad()
        scaler.scale((param * (grad.to(cuda) / (0 if t == 3 else 1))).sum()).backward()
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        if t != 3:
            step(other, [twin], [grad.to(cuda)])
    assert optimizer.state[param]["step"].item() == 5
    torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-6, atol=1e-7)


def test_nothing_is_compiled_anew_when_numbers_and_tensors_change(cuda):
    step_kernel, advance = fused_triton.kernels().step, fused_triton.kernels().advance
    params = with_gradients(cuda)
    optimizer = RAdaBeliefW(params)
    optimizer.step()
    before = [compiled_versions(kernel) for kernel in (step_kernel, advance)]
    for count in (1, 2, 3):
        own = with_gradients(cuda)[:count]
        one = RAdaBeliefW(own, lr=0.3 / count)
        for _ in range(3):
            one.param_groups[0].update(lr=one.param_groups[0]["lr"] / 2, weight_decay=0.0)
            one.step()
    assert [compiled_versions(kernel) for kernel in (step_kernel, advance)] == before


def compiled_versions(kernel):
    caches = getattr(kernel, "device_caches", None) or kernel.cache
    return sum(len(cache[0] if isinstance(cache, tuple) else cache) for cache in caches.values())


def test_a_compiled_step_on_the_device_equals_the_eager_one(cuda):
    params, twins = with_gradients(cuda), with_gradients(cuda)
    compiled, eager = RAdaBeliefW(params), RAdaBeliefW(twins)
    compiled_step = torch.compile(compiled.step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(6):
            for optimizer in (compiled, eager):
                optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            compiled_step()
            eager.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)
    assert all(state["step"].device.type == "cuda" for state in compiled.state.values())
