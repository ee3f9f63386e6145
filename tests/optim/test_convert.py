"""Runs of timm's and adabelief-pytorch's AdaBelief that go on with RAdaBeliefW."""

import contextlib
import copy
import io

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, from_adabelief_pytorch, from_timm_adabelief
from tests.optim.helpers import gradients, start, step


def _timm(params, **kwargs):
    return pytest.importorskip("timm.optim").AdaBelief(params, **kwargs)


def _original(params, **kwargs):
    module = pytest.importorskip("adabelief_pytorch")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.AdaBelief(params, print_change_log=False, **kwargs)


SOURCES = {"timm": (_timm, from_timm_adabelief), "adabelief-pytorch": (_original, from_adabelief_pytorch)}
sources = pytest.mark.parametrize(("make", "convert"), list(SOURCES.values()), ids=list(SOURCES))


@sources
@pytest.mark.parametrize("steps_before", [0, 2, 5, 10])
@pytest.mark.parametrize("eps", [1e-16, 1e-8, 1e-3])
def test_training_goes_on_with_their_numbers(make, convert, steps_before, eps):
    theirs = [start((3, 4)).requires_grad_(), start((5,)).requires_grad_()]
    grads = list(zip(gradients((3, 4), steps_before + 10), gradients((5,), steps_before + 10, seed=2), strict=True))
    groups = [{"params": theirs[:1], "lr": 0.02, "weight_decay": 0.3}, {"params": theirs[1:]}]
    optimizer = make(groups, lr=0.05, eps=eps, weight_decay=0.1)
    for pair in grads[:steps_before]:
        step(optimizer, theirs, pair)
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    converted = RAdaBeliefW([{"params": ours[:1]}, {"params": ours[1:]}])
    converted.load_state_dict(convert(optimizer.state_dict()))
    for pair in grads[steps_before:]:
        step(optimizer, theirs, pair)
        step(converted, ours, pair)
    for param, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-13)
        assert converted.state[param]["step"].item() == steps_before + 10


@sources
def test_the_source_is_left_alone_and_foreign_group_keys_are_kept(make, convert):
    param = start((3,)).requires_grad_()
    optimizer = make([param], lr=0.05)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for grad in gradients((3,), 3):
        step(optimizer, [param], [grad])
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"][0])
    result = convert(saved)
    result["state"][0]["exp_avg_sq"].zero_()
    assert torch.equal(saved["state"][0]["exp_avg_var"], before["exp_avg_var"])
    assert result["param_groups"][0]["initial_lr"] == 0.05
    assert not {"amsgrad", "buffer", "rectify", "fixed_decay"} & set(result["param_groups"][0])


@pytest.mark.parametrize(
    ("setting", "kwargs"),
    [
        ("amsgrad", {"amsgrad": True}),
        ("rectify", {"rectify": False}),
        ("degenerated_to_sgd", {"degenerated_to_sgd": False}),
        ("fixed_decay", {"fixed_decay": True, "weight_decay": 0.1}),
        ("decoupled_decay", {"decoupled_decay": False, "weight_decay": 0.1}),
    ],
)
def test_an_option_of_timm_without_an_equivalent_is_an_error_that_names_it(setting, kwargs):
    with pytest.raises(ValueError, match=setting):
        from_timm_adabelief(_timm([start((2,)).requires_grad_()], **kwargs).state_dict())


@pytest.mark.parametrize(
    ("setting", "kwargs"),
    [
        ("rectify", {"rectify": False}),
        ("degenerated_to_sgd", {"degenerated_to_sgd": False}),
        ("fixed_decay", {"fixed_decay": True}),
        ("weight_decouple", {"weight_decouple": False}),
    ],
)
def test_an_option_of_adabelief_pytorch_without_an_equivalent_is_an_error_that_names_it(setting, kwargs):
    saved = _original([start((2,)).requires_grad_()], weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match=setting):
        from_adabelief_pytorch(saved, **kwargs)


def test_another_optimizers_state_is_an_error():
    param = start((2,)).requires_grad_()
    adam = torch.optim.AdamW([param])
    step(adam, [param], gradients((2,), 1))
    with pytest.raises(ValueError, match=r"not a state of AdaBelief: \['exp_avg_var'\] missing"):
        from_timm_adabelief(adam.state_dict())
    with pytest.raises(ValueError, match="'state' missing"):
        from_timm_adabelief({})
