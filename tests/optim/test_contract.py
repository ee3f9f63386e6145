"""What torch expects of an optimizer: state, groups, hooks, closures, errors."""

import copy
import io
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.settings import DEFAULTS
from robust_dist.optim.state import complete, completed
from tests.optim.helpers import BACKENDS, backends, bits, gradients, start, step, train

OPTIONS = [
    {},
    {"lr": 0.03, "weight_decay": 0.2},
    {"betas": (0.5, 0.9), "eps": 1e-6},
    {"maximize": True},
    {"rectify_threshold": 5.0, "eps_placement": "outside", "accumulate_eps": False},
    {"foreach": False},
    {"capturable": True},
]
options = pytest.mark.parametrize("kwargs", OPTIONS, ids=lambda k: ",".join(k) or "defaults")


def _grads(steps, seed=1):
    return list(zip(gradients((3, 2), steps, seed=seed), gradients((4,), steps, seed=seed + 1), strict=True))


def _params(dtype=torch.float64):
    return [start((3, 2), dtype=dtype).requires_grad_(), start((4,), dtype=dtype).requires_grad_()]


def _same_end(first, second):
    return [bits(p) for p in first] == [bits(p) for p in second]


@options
@pytest.mark.parametrize("through_file", [False, True])
def test_a_loaded_state_dict_continues_bit_for_bit(kwargs, through_file):
    params = _params()
    optimizer = train(params, _grads(9), **kwargs)
    saved = copy.deepcopy(optimizer.state_dict())
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = RAdaBeliefW(twins, lr=0.9)
    twin.load_state_dict(saved)
    for grads in _grads(9, seed=5):
        step(optimizer, params, grads)
        step(twin, twins, grads)
    assert _same_end(params, twins)


@options
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_bit_for_bit_with_every_option(kwargs, clone):
    params = _params()
    optimizer = train(params, _grads(9), **kwargs)
    twin = clone(optimizer)
    twins = twin.param_groups[0]["params"]
    for grads in _grads(9, seed=5):
        step(optimizer, params, grads)
        step(twin, twins, grads)
    assert _same_end(params, twins)
    assert twin._step_supports_amp_scaling


def test_state_is_made_at_the_first_step_and_has_the_names_that_converters_know():
    params = _params()
    optimizer = RAdaBeliefW(params)
    assert not optimizer.state
    step(optimizer, params, _grads(1)[0])
    state = optimizer.state[params[0]]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert (state["step"].dtype, state["step"].dim(), state["step"].device.type) == (torch.float32, 0, "cpu")
    assert not any(t.requires_grad for t in state.values())


@backends
@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq"])
def test_missing_state_is_made_key_by_key(backend, missing):
    params = _params()
    optimizer = train(params, _grads(6), **backend)
    kept = {k: v.clone() for k, v in optimizer.state[params[0]].items() if k != missing}
    del optimizer.state[params[0]][missing]
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, _grads(1)[0])
    state = optimizer.state[params[0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == (1 if missing == "step" else 7)
    if missing == "exp_avg":
        assert (state["exp_avg_sq"] > 0.999 * kept["exp_avg_sq"]).all()


@backends
def test_one_step_tensor_shared_by_all_parameters_counts_once(backend):
    params, twins = _params(), _params()
    optimizer, twin = train(params, _grads(5), **backend), train(twins, _grads(5), **backend)
    shared = torch.tensor(5.0)
    for param in params:
        optimizer.state[param]["step"] = shared
    for grads in _grads(3, seed=7):
        step(optimizer, params, grads)
        step(twin, twins, grads)
    assert shared.item() == 5
    assert _same_end(params, twins)


@pytest.mark.parametrize(
    "saved_step", [5, 5.0, torch.tensor(5), torch.tensor([5.0]), torch.tensor(5.0).double()], ids=str
)
def test_a_step_of_any_kind_is_loaded_as_a_0d_float32_tensor(saved_step):
    params, twins = _params(), _params()
    optimizer, twin = train(params, _grads(5)), RAdaBeliefW(twins)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = saved_step
    twin.load_state_dict(saved)
    loaded = twin.state[twins[0]]["step"]
    assert (loaded.dtype, loaded.dim(), loaded.item()) == (torch.float32, 0, 5)
    others = [saved_step, twin.state[twins[1]]["step"]]
    assert all(loaded.data_ptr() != t.data_ptr() for t in others if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_low_precision_parameters_stays_float32_bit_for_bit_when_loaded(dtype):
    params = _params(dtype)
    grads = [[g.to(dtype) for g in pair] for pair in _grads(6)]
    optimizer = train(params, grads)
    twin = RAdaBeliefW([p.detach().clone().requires_grad_() for p in params])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, twin.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert twin.state[other][key].dtype == torch.float32
            assert bits(twin.state[other][key]) == bits(optimizer.state[param][key])


def test_loading_sees_what_the_users_pre_hook_returns_and_their_post_hook_sees_float32():
    params = _params(torch.bfloat16)
    optimizer = train(params, [[g.to(torch.bfloat16) for g in pair] for pair in _grads(3)])
    twin, seen = copy.deepcopy(optimizer), []

    def halve(_, state_dict):
        halved = {i: {**s, "exp_avg": s["exp_avg"] / 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": halved}

    twin.register_load_state_dict_pre_hook(halve)
    twin.register_load_state_dict_post_hook(lambda o: seen.extend(s["exp_avg"].dtype for s in o.state.values()))
    for _ in range(2):
        twin.load_state_dict(optimizer.state_dict())
    own = twin.state[twin.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(own, optimizer.state[params[0]]["exp_avg"] / 2)
    assert set(seen) == {torch.float32}


def test_groups_of_an_older_file_get_the_missing_options():
    optimizer = train(_params(), _grads(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("rectify_threshold", "eps_placement", "accumulate_eps", "fused", "capturable", "differentiable"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert {k: optimizer.param_groups[0][k] for k in DEFAULTS} == DEFAULTS


NUMBERS = {
    "lr": np.float32(0.5),
    "weight_decay": np.int64(0),
    "eps": Fraction(1, 4),
    "rectify_threshold": np.float16(5),
}
SETTINGS = [
    {"exp_avg_dtype": torch.bfloat16},
    {"exp_avg_dtype": "torch.bfloat16", "betas": [0.5, 0.75]},
    {"betas": (np.float32(0.5), np.float32(0.75)), **NUMBERS},
    {"lr": torch.tensor(0.5), "exp_avg_dtype": "bfloat16", "stochastic_rounding": True, "seed": 5},
]


def _by_constructor(model, settings):
    return RAdaBeliefW(model.parameters(), **settings)


def _by_group(model, settings):
    return RAdaBeliefW([{"params": model.parameters(), **settings}])


def _by_an_older_file(model, settings):
    optimizer = RAdaBeliefW(model.parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= settings
    optimizer.load_state_dict(saved)
    return optimizer


def _by_an_older_pickle(model, settings):
    optimizer = RAdaBeliefW(model.parameters())
    for holder in (optimizer.defaults, *optimizer.param_groups):
        holder.update(settings)
    optimizer.__setstate__(optimizer.__getstate__())
    return optimizer


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("way", [_by_constructor, _by_group, _by_an_older_file, _by_an_older_pickle])
def test_groups_hold_what_json_and_torchs_full_state_dicts_can_take(way, settings):
    from torch.distributed.checkpoint import state_dict as dcp

    plain = {
        name: tuple(map(float, value)) if name == "betas" else "bfloat16" if name == "exp_avg_dtype" else value
        for name, value in settings.items()
    }
    model = nn.Linear(3, 2)
    optimizer = way(model, settings)
    both = way in (_by_constructor, _by_an_older_pickle)
    for holder in (optimizer.defaults, *optimizer.param_groups) if both else optimizer.param_groups:
        assert {name: holder[name] for name in plain} == plain
        values = [value for name, value in holder.items() if name != "params"]
        json.dumps([value.item() if isinstance(value, torch.Tensor) else value for value in values])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for options in ({"full_state_dict": True, "cpu_offload": True}, {"flatten_optimizer_state_dict": True}):
        options = dcp.StateDictOptions(**options)
        saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        twin = way(model, settings)
        dcp.set_optimizer_state_dict(model, twin, saved, options=options)
        assert {name: twin.param_groups[0][name] for name in plain} == plain


def test_options_may_differ_by_group_and_groups_may_be_added():
    params, twins = _params(), _params()
    optimizer = RAdaBeliefW([{"params": [params[0]], "lr": 0.5, "weight_decay": 0.0}], lr=0.01)
    optimizer.add_param_group({"params": params[1], "betas": [0.8, 0.95], "eps_placement": "outside"})
    first = RAdaBeliefW([twins[0]], lr=0.5, weight_decay=0.0)
    second = RAdaBeliefW([twins[1]], betas=(0.8, 0.95), eps_placement="outside")
    for a, b in _grads(9):
        step(optimizer, params, (a, b))
        step(first, [twins[0]], [a])
        step(second, [twins[1]], [b])
    assert _same_end(params, twins)


def test_named_parameters_and_empty_groups_are_taken_as_by_torch():
    params = _params()
    named = RAdaBeliefW([("a", params[0]), ("b", params[1])])
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    empty = RAdaBeliefW([{"params": []}, {"params": params}])
    step(empty, params, _grads(1)[0])
    with pytest.raises(ValueError, match="empty parameter list"):
        RAdaBeliefW([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        RAdaBeliefW([{"params": params}, {"params": params[:1]}])
    with pytest.raises(ValueError, match="non-leaf"):
        RAdaBeliefW([params[0] * 2])


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    model = nn.Linear(4, 1)
    optimizer = RAdaBeliefW(model.parameters(), lr=0.1)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


def test_step_hooks_run_and_schedulers_drive_the_learning_rate():
    params, calls = _params(), []
    optimizer = RAdaBeliefW(params, lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(optimizer, params, _grads(1)[0])
    scheduler.step()
    assert calls == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5


@backends
def test_gradients_are_never_written_to(backend):
    params = _params()
    optimizer = RAdaBeliefW(params, **backend)
    for grads in _grads(7):
        step(optimizer, params, grads)
        assert [bits(p.grad) for p in params] == [bits(g) for g in grads]
        assert [p.grad._version for p in params] == [0, 0]


def test_a_sparse_gradient_is_an_error_before_anything_has_moved():
    dense, table = _params()
    optimizer = RAdaBeliefW([{"params": [dense]}, {"params": [table]}])
    dense.grad, table.grad = torch.ones_like(dense), torch.ones_like(table).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(dense.detach(), start((3, 2)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"lr": torch.tensor(-1.0)}, "lr must be"),
        ({"lr": torch.ones(2)}, "1 element"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "needs capturable=True"),
        ({"weight_decay": torch.tensor(0.1), "foreach": True}, "needs capturable=True"),
        ({"eps": -1e-8}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"betas": (0.9,)}, "pair"),
        ({"betas": (0.9, 0.99, 0.999)}, "pair"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and less than 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"betas": (0.9, math.nan)}, r"betas\[1\]"),
        ({"rectify_threshold": 3.0}, "rectify_threshold must be a finite number of at least 4"),
        ({"eps_placement": "under"}, "eps_placement must be one of"),
        ({"foreach": True, "fused": True}, "exclude each other"),
        ({"fused": True, "capturable": True}, "with capturable=True there is none on the CPU"),
        ({"fused": True, "differentiable": True}, "fused=True does not support differentiable=True"),
        ({"foreach": True, "differentiable": True}, "does not support differentiable"),
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype must be None or torch.bfloat16, got torch.float16"),
        ({"exp_avg_dtype": "float16"}, "exp_avg_dtype must be None or torch.bfloat16, got"),
        ({"seed": -1}, "seed=-1 is below 0: it must be a whole number in range"),
        ({"seed": 2**63}, "seed=9223372036854775808 is above"),
        ({"master_weights": True, "differentiable": True}, "does not support master_weights=True"),
    ],
)
def test_a_setting_out_of_range_is_a_value_error_that_names_it(kwargs, message):
    params = _params()
    with pytest.raises(ValueError, match=message):
        RAdaBeliefW(params, **kwargs)
    optimizer = RAdaBeliefW(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **kwargs})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": "0.1"},
        {"lr": None},
        {"eps": True},
        {"betas": 0.9},
        {"betas": ("a", 0.9)},
        {"maximize": 1},
        {"fused": "yes"},
        {"exp_avg_dtype": "bfloat"},
        {"exp_avg_dtype": 16},
        {"master_weights": 1},
        {"stochastic_rounding": None},
        {"seed": 1.0},
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_type_is_a_type_error_that_names_it(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        RAdaBeliefW(_params(), **kwargs)


def test_torch_schedules_and_dcp_save_a_state_made_by_a_dry_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    before = [bits(p) for p in model.parameters()]
    optimizer = RAdaBeliefW(model.parameters(), weight_decay=0.5)
    saved = get_optimizer_state_dict(model, optimizer)
    assert [bits(p) for p in model.parameters()] == before
    assert set(saved["state"]["weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    twin = RAdaBeliefW(model.parameters(), lr=3.0)
    set_optimizer_state_dict(model, twin, saved)
    assert twin.param_groups[0]["lr"] == 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("backend", [{}, BACKENDS["capturable_foreach"]], ids=["default", "capturable"])
def test_a_compiled_step_with_tensor_settings_is_compiled_once(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    lr, counter = torch.tensor(0.1), CompileCounterWithBackend("aot_eager")
    params, twins = ([start((5,), dtype=torch.float32).requires_grad_()] for _ in range(2))
    compiled, eager = RAdaBeliefW(params, lr=lr, **backend), RAdaBeliefW(twins, lr=lr)
    compiled_step = torch.compile(compiled.step, backend=counter)
    for t, grad in enumerate(gradients((5,), 8, dtype=torch.float32)):
        lr.fill_(0.1 / (t + 1))
        params[0].grad = grad
        compiled_step()
        step(eager, twins, [grad])
    assert counter.frame_count == 1
    assert compiled.state[params[0]]["step"].item() == 8
    torch.testing.assert_close(params[0].detach(), twins[0].detach(), rtol=1e-5, atol=1e-6)


def test_a_count_on_another_device_than_its_parameter_is_made_anew():
    """As after model.to("cuda:1") with counts on cuda:0; the meta device stands for the other one."""
    near, far = (torch.ones(3, device=device) for device in ("cpu", "meta"))
    group = RAdaBeliefW([near.requires_grad_()], capturable=True).param_groups[0]
    state = {"step": torch.tensor(4.0), "exp_avg": far, "exp_avg_sq": far}
    assert completed([{**state, "exp_avg": near, "exp_avg_sq": near}], [near], on_device=True) is not None
    assert completed([state], [far], on_device=True) is None
    complete(state, far, group, on_device=True)
    assert state["step"].device == far.device
