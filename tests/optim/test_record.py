"""A step that finds the tensors of the one before gathers nothing, and one that finds others steps those."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.optimizer import register_optimizer_step_post_hook

from robust_dist.optim import RAdaBeliefW, record
from robust_dist.optim.fused_cpu import library
from tests.optim import interpreted
from tests.optim.helpers import bits, gradients, start

STEPS = 5
SHAPES = [(4, 3), (5,), (2, 2), ()]


class Counting(RAdaBeliefW):
    """Counts the groups that it gathers anew."""

    gathered = 0

    def _init_group(self, *args):
        self.gathered += 1
        super()._init_group(*args)


class Forgetful(RAdaBeliefW):
    """Every step is its first of these tensors."""

    def _remember(self, *_):
        pass


@pytest.fixture(
    params=[
        pytest.param("c", marks=pytest.mark.skipif(library() is None, reason="the C library is not built")),
        "triton",
    ]
)
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", minversion="3.3")
        interpreted.on_the_cpu(monkeypatch)
    return request.param


def make(kind, dtype=torch.float32, **settings):
    params = [start(shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return params, kind(groups, lr=0.05, **settings)


def give_gradients(params, t):
    for i, param in enumerate(params):
        grad = gradients(param.shape, STEPS, seed=i)[t].to(param.dtype)
        param.grad = grad.clone()


def snapshot(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [[bits(param), *(bits(value) for value in optimizer.state[param].values())] for param in params]


def test_a_steady_step_gathers_nothing_and_gives_the_bits_of_one_that_does(backend):
    (params, optimizer), (twins, twin) = make(Counting), make(Forgetful)
    for t in range(STEPS):
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own, t)
            kind.param_groups[0]["lr"] = 0.1 / (t + 1)
            kind.param_groups[0]["weight_decay"] = 0.3 if t < 3 else 0.0
            kind.step()
        assert snapshot(optimizer) == snapshot(twin)
    assert optimizer.gathered == 2  # two groups, once


@pytest.mark.parametrize(
    "settings", [{"stochastic_rounding": True}, {"master_weights": True, "exp_avg_dtype": "bfloat16"}]
)
def test_low_precision_is_stepped_again_with_the_same_bits(backend, settings):
    (params, optimizer), (twins, twin) = (make(kind, torch.bfloat16, **settings) for kind in (Counting, Forgetful))
    for t in range(STEPS):
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own, t)
            kind.step()
    assert snapshot(optimizer) == snapshot(twin)
    assert optimizer.gathered == 2


def _swap(tensor):
    kept, tensor.data = tensor.data, tensor.data.clone()
    kept.zero_()


def _swap_implementations(params, optimizer):
    """What `Module.to` does under torch.__future__.set_swap_module_params_on_conversion."""
    for tensor in (params[1], optimizer.state[params[3]]["exp_avg_sq"]):
        other = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        other.grad = tensor.grad
        torch.utils.swap_tensors(tensor, other)
        other.data.zero_()


def _swap_back_in_less(params, optimizer):
    """The allocator may give the memory of the first dtype to the third."""
    for dtype in (torch.float64, torch.bfloat16):
        for param in params:
            param.grad = None
            param.data = param.data.to(dtype)


def _other_layout(params, optimizer):
    params[0].grad = torch.stack([params[0].grad] * 2, -1)[..., 0]
    params[2].grad = params[2].grad.T


def _swap_states(params, optimizer):
    state = optimizer.state
    state[params[1]]["exp_avg"], state[params[1]]["exp_avg_sq"] = (
        state[params[1]]["exp_avg"].abs() + 1e-3,
        state[params[1]]["exp_avg_sq"].clone(),
    )


def _state_of(params, optimizer, key, index=1):
    return optimizer.state[params[index]][key]


CHANGES = {
    "a parameter's data": lambda p, o: _swap(p[1]),
    "a moment's data": lambda p, o: _swap(_state_of(p, o, "exp_avg")),
    "the other moment's data": lambda p, o: _swap(_state_of(p, o, "exp_avg_sq", 3)),
    "a count's data": lambda p, o: _swap(_state_of(p, o, "step")),
    "implementations of tensors": _swap_implementations,
    "a gradient's data": lambda p, o: _swap(p[2].grad),
    "a moment": _swap_states,
    "a count": lambda p, o: o.state[p[0]].update(step=torch.tensor(40.0)),
    "a count written in place": lambda p, o: _state_of(p, o, "step").fill_(40.0),
    "a moment written in place": lambda p, o: _state_of(p, o, "exp_avg").fill_(0.5),
    "a state deleted": lambda p, o: o.state.pop(p[1]),
    "all state cleared": lambda p, o: o.state.clear(),
    "state loaded": lambda p, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a gradient is None": lambda p, o: setattr(p[1], "grad", None),
    "no gradient in a group": lambda p, o: [setattr(one, "grad", None) for one in p[:2]],
    "gradients of another layout": _other_layout,
    "a lazily negated gradient": lambda p, o: setattr(p[1], "grad", torch._neg_view(p[1].grad)),
    "a wider dtype": lambda p, o: [setattr(one, "data", one.data.double()) or setattr(one, "grad", None) for one in p],
    "a narrower dtype": _swap_back_in_less,
    "betas": lambda p, o: o.param_groups[0].update(betas=(0.8, 0.9)),
    "eps_placement": lambda p, o: o.param_groups[1].update(eps_placement="outside"),
    "maximize": lambda p, o: o.param_groups[1].update(maximize=True),
    "another backend": lambda p, o: o.param_groups[0].update(foreach=True),
    "a smaller group": lambda p, o: o.param_groups[0].update(params=p[1:2]),
    "a group in order": lambda p, o: o.param_groups[0]["params"].reverse(),
    "a parameter moved": lambda p, o: o.param_groups[1]["params"].append(o.param_groups[0]["params"].pop()),
    "lr is 0": lambda p, o: o.param_groups[0].update(lr=0.0),
    "an overflow": lambda p, o: (
        setattr(o, "found_inf", torch.tensor(1.0)),
        setattr(o, "grad_scale", torch.tensor(4.0)),
    ),
    "a scale": lambda p, o: (setattr(o, "found_inf", torch.tensor(0.0)), setattr(o, "grad_scale", torch.tensor(4.0))),
}


# The others of the kind are seen by the same code on every backend, and Triton's interpreter is slow.
IN_TRITON = ("a parameter's data", "a moment's data", "a count", "state loaded", "a gradient is None", "a scale")


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changed_between_two_steps_is_noticed(backend, change):
    if backend == "triton" and change not in IN_TRITON:
        pytest.skip("seen on the other backend")
    (params, optimizer), (twins, twin) = make(Counting), make(Forgetful)
    for t in range(STEPS):
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own, t)
            if t == 3:
                CHANGES[change](own, kind)
                for param in own if "dtype" in change else ():
                    param.grad = gradients(param.shape, STEPS, seed=5)[t].to(param.dtype)
            kind.step()
            for name in ("found_inf", "grad_scale"):
                vars(kind).pop(name, None)
        assert snapshot(optimizer) == snapshot(twin), t


def test_a_frozen_group_before_others_leaves_each_its_own_settings(backend):
    (params, optimizer), (twins, twin) = make(Counting), make(Forgetful)
    for t in range(STEPS):
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own[2:], t)
            kind.param_groups[0]["lr"] = 0.3 / (t + 1)
            kind.step()
        assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert optimizer.gathered == 2


@pytest.mark.parametrize("as_tensors", [False, True])
def test_more_groups_than_a_launch_has_arguments_for_keep_their_own_rates(backend, as_tensors):
    pairs = []
    for kind in (Counting, Forgetful):
        params = [start((3,), dtype=torch.float32, seed=i).requires_grad_() for i in range(6)]
        pairs.append((params, kind([{"params": [p]} for p in params])))
    for t in range(STEPS):
        for own, kind in pairs:
            give_gradients(own, t)
            for i, group in enumerate(kind.param_groups):
                rate, decay = 0.1 / (i + t + 1), 0.3 * (i % 2)
                group["lr"] = torch.tensor(rate) if as_tensors and i == 1 else rate
                group["weight_decay"] = decay
            kind.step()
        assert [bits(p) for p in pairs[0][0]] == [bits(p) for p in pairs[1][0]]
    assert pairs[0][1].gathered == 6


def test_a_group_that_is_added_is_stepped(backend):
    (params, optimizer), (twins, twin) = make(Counting), make(Forgetful)
    for t in range(STEPS):
        for own, kind in ((params, optimizer), (twins, twin)):
            if t == 3:
                own.append(start((3,), seed=9).requires_grad_())
                kind.add_param_group({"params": [own[-1]]})
            give_gradients(own, t)
            kind.step()
    assert snapshot(optimizer) == snapshot(twin)
    assert bits(params[-1]) != bits(start((3,), seed=9))
    assert optimizer.gathered == 2 + 3


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_steps_its_own_tensors(backend, again):
    (params, optimizer), (twins, twin) = make(RAdaBeliefW), make(Forgetful)
    for t in range(STEPS):
        if t == 3:
            before = snapshot(optimizer)
            copied_params, copied = again((params, optimizer))
            give_gradients(copied_params, 0)
            copied.step()
            assert snapshot(optimizer) == before != snapshot(copied)
            params, optimizer = again((params, optimizer))
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own, t)
            kind.step()
    assert snapshot(optimizer) == snapshot(twin)


def test_a_sparse_gradient_is_refused_after_steps_with_dense_ones(backend):
    params, optimizer = make(RAdaBeliefW)
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    before = snapshot(optimizer)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_parts_that_are_stepped_in_turn_are_each_stepped_again(backend):
    """As ZeRO-3 steps its sub-groups: one optimizer, whose group holds another tensor at each step."""
    sizes = [3, 5, 4]
    parts, twins = ([start((size,), seed=size).requires_grad_() for size in sizes] for _ in range(2))
    optimizer, twin = Counting([start((1,)).requires_grad_()]), Forgetful([start((1,)).requires_grad_()])
    for t in range(STEPS):
        for own, kind in ((parts, optimizer), (twins, twin)):
            give_gradients(own, t)
            for param in own:
                kind.param_groups[0]["params"] = [param]
                kind.step()
                kind.param_groups[0]["params"] = []
        assert [bits(p) for p in parts] == [bits(p) for p in twins]
    assert optimizer.gathered < 2 * len(sizes)


def test_gradients_that_alternate_cost_no_more_than_a_few_records(backend, monkeypatch):
    made, real = [], record._record
    monkeypatch.setattr(record, "_record", lambda *args: made.append(1) or real(*args))
    (params, optimizer), (twins, twin) = make(Counting), make(Forgetful)
    for t in range(16):
        for own, kind in ((params, optimizer), (twins, twin)):
            give_gradients(own, t % STEPS)
            own[t % 2].grad = None
            kind.step()
    assert snapshot(optimizer) == snapshot(twin)
    assert len(made) <= 2 * record.TRIES


def test_no_gradient_and_no_forgotten_state_is_kept_alive(backend):
    params, optimizer = make(RAdaBeliefW)
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    watched = [weakref.ref(param.grad) for param in params]
    watched += [weakref.ref(value) for param in params for value in optimizer.state[param].values()]
    for param in params:
        param.grad = None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_local_tensors_of_dtensors_that_are_swapped_are_stepped(backend):
    """FSDP2 puts other local tensors into the parameters that an optimizer holds."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))

        def sharded(local):
            return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

        param, plain = nn.Parameter(sharded(start((3, 2)))), nn.Parameter(start((3, 2)))
        optimizer, twin = Counting([param]), Forgetful([plain])
        for t, grad in enumerate(gradients((3, 2), STEPS)):
            grad_ = sharded(grad.clone())
            grad_._spec = param._spec
            param.grad, plain.grad = grad_, grad.clone()
            if t == 3:
                old, param._local_tensor = param._local_tensor, param._local_tensor.clone()
                old.zero_()
            optimizer.step()
            twin.step()
            assert bits(param.detach().to_local()) == bits(plain), t
        assert optimizer.gathered == 2
    finally:
        dist.destroy_process_group()


def test_hooks_and_a_profiler_see_every_step():
    params, optimizer = make(RAdaBeliefW)
    seen = []

    def one(name):
        return lambda *_: seen.append(name)

    def a_step():
        seen.clear()
        give_gradients(params, 0)
        optimizer.step()
        return list(seen)

    for _ in range(3):
        assert a_step() == []
    handles = [optimizer.register_step_pre_hook(one("before")), optimizer.register_step_post_hook(one("after"))]
    assert a_step() == ["before", "after"]
    for handle in handles:
        handle.remove()
    handle = register_optimizer_step_post_hook(one("after any"))
    assert a_step() == ["after any"]
    handle.remove()
    assert a_step() == []
    with torch.profiler.profile() as profiler:
        a_step()
    assert [event.count for event in profiler.key_averages() if event.key == "Optimizer.step#RAdaBeliefW.step"] == [1]
