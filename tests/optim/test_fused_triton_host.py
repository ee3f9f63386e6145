"""The host's side of the CUDA step in Triton: what it sends, what it remembers, when it takes another backend."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

from robust_dist import optim
from robust_dist.optim import RAdaBeliefW, fused_triton, fused_triton_table
from robust_dist.optim.fused_triton_table import upload, words_of, written
from robust_dist.optim.reference import reference_step
from tests.forked import python
from tests.optim import interpreted
from tests.optim.helpers import gradients, reference, start, step
from tests.optim.interpreted import CPU, leaves, snapshot

# The interpreter of older ones breaks on NumPy 2.4.
pytest.importorskip("triton", minversion="3.3")


def memory_of(optimizer, device):
    return optimizer._memories["fused_triton"][device]


@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_moving_schedule_uploads_nothing(device, as_tensors):
    params, grads = leaves(device, [(4,)], torch.float64), gradients((4,), 7)
    settings_ = {"lr": 0.0, "weight_decay": 0.0}
    if as_tensors:
        settings_ = {name: torch.tensor(0.0, dtype=torch.float64, device=device) for name in settings_}
    optimizer = RAdaBeliefW(params, capturable=as_tensors, **settings_)
    expected, m, v = start((4,)), torch.zeros(4).double(), torch.zeros(4).double()
    params[0].grad = torch.zeros(4, dtype=torch.float64, device=device)
    sent = []
    for t, grad in enumerate(grads, 1):
        now = {"lr": 0.1 / t, "weight_decay": 0.3 if t < 5 else 0.0}
        for name, value in now.items():
            if as_tensors:
                optimizer.param_groups[0][name].fill_(value)
            else:
                optimizer.param_groups[0][name] = value
        params[0].grad.copy_(grad)
        optimizer.step()
        (plan,) = memory_of(optimizer, params[0].device).plans.values()
        sent.append([plan.table, *(where for _, where in plan.sent.values())])
        expected, m, v = reference_step(expected, grad, m, v, t, **now)
    torch.testing.assert_close(params[0].detach().cpu(), expected, rtol=1e-12, atol=1e-13)
    assert len(sent[0]) == 3  # the table, addresses of gradients, settings: sent at the first step
    assert all(one is first for later in sent for one, first in zip(later, sent[0], strict=True))


def test_which_have_gradients_may_change_from_step_to_step(device, monkeypatch):
    monkeypatch.setattr(fused_triton, "PLANNED_ROWS", 3)
    params, grads = leaves(device, [(3,), (2,), (4,)], torch.float64), gradients((9,), 6)
    optimizer = RAdaBeliefW(params)
    seen = [[], [], []]
    for t, grad in enumerate(grads):
        row = [grad[: p.numel()] if (t + 1) >> i & 1 else None for i, p in enumerate(params)]
        for own, g in zip(seen, row, strict=True):
            own.extend([] if g is None else [g])
        step(optimizer, params, [None if g is None else g.to(device) for g in row])
    assert sum(plan.num_rows for plan in memory_of(optimizer, params[0].device).plans.values()) <= 3
    for i, (param, own) in enumerate(zip(params, seen, strict=True)):
        expected = reference(start(param.shape, seed=i), own)[0]
        torch.testing.assert_close(param.detach().cpu(), expected, rtol=1e-12, atol=1e-13)


def test_autograd_notices_a_parameter_that_was_stepped_between_forward_and_backward(device):
    weight = torch.ones(3, device=device, requires_grad=True)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3, device=device)
    RAdaBeliefW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("move", ["load", "deepcopy", "data"])
def test_tensors_that_moved_are_found(device, move):
    params, grads = leaves(device, [(4,)], torch.float64), gradients((4,), 4)
    optimizer = RAdaBeliefW(params)
    for t, grad in enumerate(grads):
        if t == 2 and move == "load":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif t == 2 and move == "deepcopy":
            optimizer = copy.deepcopy(optimizer)
            params = optimizer.param_groups[0]["params"]
        elif t == 2:
            for tensor in (params[0], optimizer.state[params[0]]["exp_avg"]):
                kept, tensor.data = tensor.data, tensor.data.clone()
                kept.zero_()
        step(optimizer, params, [grad.to(device)])
    torch.testing.assert_close(params[0].detach().cpu(), reference(start((4,)), grads)[0], rtol=1e-12, atol=1e-13)
    assert optimizer.state[params[0]]["step"].item() == 4


def test_one_step_tensor_shared_by_all_parameters_counts_once(device):
    params = leaves(device, [(2,), (3,)], torch.float64)
    optimizer = RAdaBeliefW(params)
    shared = torch.tensor(5.0, device=device)
    for param in params:
        optimizer.state[param]["step"] = shared
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [6, 6]
    assert shared.item() == 5


def test_words_are_written_as_they_are_uploaded():
    words = [0, -1, 2**63 - 1, -(2**63), *words_of([0.1, -0.0, 1e300]), 140_000_000_000_123]
    assert written(words, CPU).tolist() == upload(words, CPU).tolist() == words


def test_a_captured_step_leaves_nothing_behind_that_only_its_graph_writes(monkeypatch):
    interpreted.on_the_cpu(monkeypatch)
    params, twins = (leaves(CPU, [(3,), (2,)], torch.float64) for _ in range(2))
    grads = list(zip(gradients((3,), 4), gradients((2,), 4), strict=True))
    optimizer, twin = RAdaBeliefW(params, capturable=True), RAdaBeliefW(twins)
    for t, row in enumerate(grads):
        with monkeypatch.context() as patch:
            if t in (1, 2):
                for module in (fused_triton, fused_triton_table):
                    patch.setattr(module, "is_capturing", lambda device: True)
            step(optimizer, params, row if t != 2 else [row[0], None])
        step(twin, twins, row if t != 2 else [row[0], None])
        if t == 0:
            before = dict(next(iter(memory_of(optimizer, CPU).plans.values())).sent)
    assert snapshot(optimizer) == snapshot(twin)
    memory = memory_of(optimizer, CPU)
    assert len(memory.plans) == len(memory.captured) == 1
    assert memory.captured[0] is next(iter(memory.plans.values()))
    assert memory.captured[0].sent["settings"] is before["settings"]


@pytest.fixture
def two_ranks():
    """This process as the first of two ranks whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_dtensors_are_stepped_on_their_local_tensors(monkeypatch, launches, two_ranks):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    interpreted.on_the_cpu(monkeypatch)
    grads = gradients((3, 2), 3)

    def sharded(local, placement=Shard(0)):  # noqa: B008 -- frozen
        return DTensor.from_local(local, two_ranks, [placement], run_check=False)

    param, plain = nn.Parameter(sharded(start((3, 2)))), nn.Parameter(start((3, 2)))
    optimizer = RAdaBeliefW([param, plain])
    for t, grad in enumerate(grads):
        whole = sharded(torch.cat([grad, grad]), Replicate())
        param.grad, plain.grad = sharded(grad.clone()) if t != 1 else whole, grad.clone()
        optimizer.step()
    assert torch.equal(param.detach().to_local(), plain.detach())
    assert optimizer.state[param]["exp_avg"].placements == param.placements
    assert len(launches) == 3


@pytest.fixture
def kernels_are(monkeypatch):
    """Puts a module in the place of the kernels', for a backend that takes CPU tensors as it takes a GPU's."""
    monkeypatch.setattr(fused_triton, "DEVICE_TYPES", frozenset({"cpu"}))
    monkeypatch.setattr(fused_triton, "_reasons", {})
    monkeypatch.delattr(optim, "fused_triton_kernel", raising=False)
    fused_triton.kernels.cache_clear()
    yield lambda module: monkeypatch.setitem(sys.modules, "robust_dist.optim.fused_triton_kernel", module)
    fused_triton.kernels.cache_clear()


# The pass in C does not take them, so that foreach is the next.
ON_DEVICE = {"capturable": True}


def test_without_triton_foreach_takes_over_and_fused_says_what_is_missing(kernels_are):
    kernels_are(None)
    with pytest.raises(ValueError, match=r"fused=True: .* on cpu \(Triton cannot be imported: import of"):
        RAdaBeliefW([start((3,)).requires_grad_()], fused=True, **ON_DEVICE)
    params, grads = leaves(CPU, [(3,)], torch.float64), gradients((3,), 3)
    with pytest.warns(UserWarning, match="Triton cannot be imported: import of") as said:
        optimizer = interpreted.train(params, [[g] for g in grads], **ON_DEVICE)
    assert len(said) == 1
    assert optimizer.backend_in_use() == "foreach"
    assert torch.allclose(params[0].detach(), reference(start((3,)), grads)[0], rtol=1e-12)


@pytest.mark.parametrize(("error", "trials"), [("Failed to find C compiler", 1), ("CUDA out of memory. Tried", 4)])
def test_a_triton_that_cannot_run_is_told_once_and_asked_again_only_where_memory_was_short(kernels_are, error, trials):
    tried = []

    class Failing:
        def __getitem__(self, grid):
            tried.append(grid)
            raise (torch.OutOfMemoryError if "memory" in error else RuntimeError)(error)

    kernels_are(SimpleNamespace(advance=Failing()))
    params = leaves(CPU, [(3,)], torch.float64)
    with pytest.warns(UserWarning, match=f"Triton cannot run a kernel: .*{error}") as said:
        interpreted.train(params, [[g] for g in gradients((3,), 2)], **ON_DEVICE)
    assert len(said) == 1
    assert (len(tried) > 1) == (trials > 1)
    assert error in fused_triton.why_not(CPU)
    assert interpreted.train(params, [], fused=False, **ON_DEVICE).backend_in_use() == "foreach"


def test_a_step_on_the_cpu_imports_no_kernels():
    code = """
import sys, torch
from robust_dist import RAdaBeliefW
param = torch.ones(3, requires_grad=True)
param.grad = torch.ones(3)
RAdaBeliefW([param]).step()
print("robust_dist.optim.fused_triton_kernel" in sys.modules)
"""
    assert python("-c", code) == (0, "False\n")


def test_the_trial_of_the_kernels_passes_where_they_run(device):
    fused_triton._try(device)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize(("triton", "capturable"), [(False, False), (True, True)], ids=["plain", "triton"])
def test_a_compiled_step_is_not_compiled_anew_when_the_schedule_moves(monkeypatch, triton, capturable):
    """A first number is compiled as a constant, a second as a variable; the third graph is without decay."""
    if triton:
        interpreted.on_the_cpu(monkeypatch)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params, twins = (leaves(CPU, [(5,), (2,)], torch.float32) for _ in range(2))
    compiled, eager = RAdaBeliefW(params, capturable=capturable), RAdaBeliefW(twins)
    compiled_step = torch.compile(compiled.step, backend=counter)
    for t, grads in enumerate(zip(*(gradients(p.shape, 9, dtype=torch.float32) for p in params), strict=True)):
        for optimizer in (compiled, eager):
            optimizer.param_groups[0].update(lr=0.1 / (t + 1), weight_decay=0.3 if t < 6 else 0.0)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        compiled_step()
        step(eager, twins, grads)
    assert counter.frame_count <= 3
    assert [compiled.state[p]["step"].item() for p in params] == [9, 9]
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)


def test_eager_and_compiled_steps_go_on_from_each_other(monkeypatch):
    interpreted.on_the_cpu(monkeypatch)
    torch._dynamo.reset()
    params, grads = leaves(CPU, [(5,)], torch.float64), gradients((5,), 6)
    optimizer = RAdaBeliefW(params)
    compiled_step = torch.compile(optimizer.step, backend="eager")
    for t, grad in enumerate(grads):
        params[0].grad = grad.clone()
        (compiled_step if t % 2 else optimizer.step)()
    assert torch.allclose(params[0].detach(), reference(start((5,)), grads)[0], rtol=1e-12)
