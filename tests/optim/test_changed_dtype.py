"""Parameters whose dtype changes between two steps, as model.double() changes it: state follows, and loses nothing."""

import copy

import pytest
import torch
from torch import nn

from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.state import state_dtype
from tests.optim import interpreted
from tests.optim.helpers import BACKENDS, backends, bits, gradients, reference, start, step

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHANGES = [
    (F32, F64),
    (BF16, F64),
    (BF16, F32),
    (F16, F32),
    (F32, BF16),
    (F64, F32),
    (torch.complex64, torch.complex128),
]
SHAPES = [(4, 3), (7,)]
# "default" is one of the others
some_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "default"])


def _model(dtype):
    return nn.ParameterList([nn.Parameter(start(s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)])


def _grads(steps, seed=1):
    return list(zip(*(gradients(s, steps, seed=seed + i) for i, s in enumerate(SHAPES)), strict=True))


def _steps(optimizer, model, grads):
    for row in grads:
        step(optimizer, list(model), [g.to(p.dtype) for g, p in zip(row, model, strict=True)])


def _twin(optimizer, model, backend, **kwargs):
    """A new optimizer of a copy of the model, with the same state, cast by hand to what such parameters' state is."""
    other = copy.deepcopy(model)
    twin = RAdaBeliefW(other.parameters(), lr=0.03, **backend, **kwargs)
    for param, new in zip(model, other, strict=True):
        state = optimizer.state[param]
        twin.state[new] = {k: v.to(F32 if k == "step" else state_dtype(new), copy=True) for k, v in state.items()}
    return twin, other


def _check_goes_on(before, after, backend):
    model = _model(before)
    optimizer = RAdaBeliefW(model.parameters(), lr=0.03, **backend)
    _steps(optimizer, model, _grads(7))
    model.to(after)
    twin, other = _twin(optimizer, model, backend)
    _steps(optimizer, model, _grads(4, seed=5))
    _steps(twin, other, _grads(4, seed=5))
    for param, same in zip(model, other, strict=True):
        dtypes = {key: value.dtype for key, value in optimizer.state[param].items()}
        assert dtypes == {"step": F32, "exp_avg": state_dtype(param), "exp_avg_sq": state_dtype(param)}
        assert bits(param) == bits(same)


@some_backends
@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_a_changed_dtype_goes_on_from_the_very_same_state(backend, before, after):
    _check_goes_on(before, after, BACKENDS[backend])


def test_a_changed_dtype_goes_on_from_the_very_same_state_in_triton(monkeypatch):
    pytest.importorskip("triton")
    interpreted.on_the_cpu(monkeypatch)
    _check_goes_on(F32, F64, {})


@backends
def test_a_model_made_double_is_stepped_in_float64_and_not_cut_to_float32(backend):
    model = _model(F32)
    optimizer = RAdaBeliefW(model.parameters(), **backend)
    model.double()
    _steps(optimizer, model, _grads(9))
    for index, (param, shape) in enumerate(zip(model, SHAPES, strict=True)):
        grads = gradients(shape, 9, seed=1 + index)
        expected = reference(start(shape, seed=index).float(), grads)[0]
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-13)
        assert not torch.equal(param.float().double(), param)


@backends
def test_only_the_parameters_that_have_changed_get_other_state(backend):
    model = _model(F32)
    optimizer = RAdaBeliefW(model.parameters(), lr=0.03, **backend)
    _steps(optimizer, model, _grads(7))
    alone = copy.deepcopy(model[0])
    twin = RAdaBeliefW([alone], lr=0.03, **backend)
    twin.state[alone] = copy.deepcopy(optimizer.state[model[0]])
    model[1].data, model[1].grad = model[1].data.double(), None
    _steps(optimizer, model, _grads(3, seed=5))
    for row in _grads(3, seed=5):
        step(twin, [alone], [row[0].float()])
    assert bits(model[0]) == bits(alone)
    assert [optimizer.state[p]["exp_avg_sq"].dtype for p in model] == [F32, F64]


@some_backends
def test_a_first_moment_in_bfloat16_is_widened_with_a_double_parameter_and_narrowed_again(backend):
    model = _model(F32)
    optimizer = RAdaBeliefW(model.parameters(), exp_avg_dtype="bfloat16", **BACKENDS[backend])
    for dtype, kept in ((F32, BF16), (F64, F64), (F32, BF16), (BF16, BF16)):
        model.to(dtype)
        _steps(optimizer, model, _grads(2))
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {kept}


@some_backends
def test_a_widened_parameter_takes_the_value_of_its_master_and_a_narrowed_one_gets_a_new_master(backend):
    model = _model(BF16)
    optimizer = RAdaBeliefW(model.parameters(), lr=0.03, master_weights=True, **BACKENDS[backend])
    _steps(optimizer, model, _grads(7))
    model.float()
    twin, other = _twin(optimizer, model, BACKENDS[backend])
    for new in other:
        new.data.copy_(twin.state[new].pop("master"))
    _steps(optimizer, model, _grads(3, seed=5))
    _steps(twin, other, _grads(3, seed=5))
    assert [bits(p) for p in model] == [bits(p) for p in other]
    assert not any("master" in state for state in optimizer.state.values())
    model.bfloat16()
    _steps(optimizer, model, _grads(1))
    assert all(torch.equal(optimizer.state[p]["master"].bfloat16(), p) for p in model)


@some_backends
def test_a_step_with_a_learning_rate_of_0_leaves_a_widened_parameter_and_its_master_alone(backend):
    model = _model(BF16)
    optimizer = RAdaBeliefW(model.parameters(), lr=0.03, master_weights=True, **BACKENDS[backend])
    _steps(optimizer, model, _grads(2))
    model.float()
    before = [bits(p) + bits(optimizer.state[p]["master"]) for p in model]
    optimizer.param_groups[0]["lr"] = 0.0
    _steps(optimizer, model, _grads(1))
    assert before == [bits(p) + bits(optimizer.state[p]["master"]) for p in model]


@backends
@pytest.mark.parametrize(("before", "after"), [(F32, torch.complex64), (torch.complex64, F32)], ids=str)
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
def test_real_state_of_a_complex_parameter_is_an_error_before_anything_has_moved(backend, before, after):
    first, model = start((3,)).requires_grad_(), _model(before)
    optimizer = RAdaBeliefW([{"params": [first]}, {"params": model.parameters()}], **backend)
    for row in _grads(2):
        step(optimizer, [first, *model], [torch.ones(3).double(), *(g.to(before) for g in row)])
    for param in model:
        param.data, param.grad = param.data.to(after), None
        param.grad = torch.ones_like(param)
    values = [bits(p) for p in (first, *model)]
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\) is torch.\w+, and its moments are .* optimizer.state"):
        optimizer.step()
    assert values == [bits(p) for p in (first, *model)]
    for param in model:
        del optimizer.state[param]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in model] == [1, 1]


@pytest.mark.parametrize(("saved", "dtype"), [(F32, F64), (F64, F32), (F64, BF16), (BF16, F64), (F16, BF16)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"exp_avg_dtype": "bfloat16"}, {"master_weights": True}], ids=str)
def test_state_is_loaded_into_a_model_of_another_dtype(saved, dtype, kwargs):
    model, other = _model(saved), _model(dtype)
    optimizer, loaded = RAdaBeliefW(model.parameters(), **kwargs), RAdaBeliefW(other.parameters())
    _steps(optimizer, model, _grads(7))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _steps(loaded, other, _grads(1))
    for param, new in zip(model, other, strict=True):
        low = "exp_avg_dtype" in kwargs and dtype is not F64
        assert loaded.state[new]["exp_avg"].dtype is (BF16 if low else state_dtype(new))
        assert loaded.state[new]["exp_avg_sq"].dtype is state_dtype(new)
        assert loaded.state[new]["step"].item() == optimizer.state[param]["step"].item() + 1 == 8
