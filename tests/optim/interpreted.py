"""The Triton kernels as Triton's interpreter runs them on the CPU, from the source that a GPU's compiler gets."""

import functools
import importlib.util
from unittest import mock

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, fused_triton
from tests.optim.helpers import bits, start, step

CPU = torch.device("cpu")


@functools.cache
def kernels():
    """The module of the kernels, decorated for the interpreter; the one that a GPU runs is left alone."""
    importlib.import_module("triton")  # before the switch, which is for the kernels alone
    spec = importlib.util.find_spec("robust_dist.optim.fused_triton_kernel")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    for name, helper in list(vars(module).items()):
        # What a kernel calls runs patched already; to patch anew for every call takes half of the time.
        if name.startswith("_") and hasattr(helper, "rewrite"):
            setattr(module, name, helper.rewrite())
    return module


def on_the_cpu(monkeypatch):
    """Let the backend take CPU tensors, and the interpreter run its kernels."""
    monkeypatch.setattr(fused_triton, "DEVICE_TYPES", frozenset({"cpu"}))
    monkeypatch.setattr(fused_triton, "kernels", kernels)
    monkeypatch.setattr(fused_triton, "why_not", lambda device: None)


def away():
    """A context in which CPU tensors go to the other backends again."""
    return mock.patch.object(fused_triton, "DEVICE_TYPES", frozenset({"cuda"}))


def leaves(device, shapes, dtype):
    return [start(shape, dtype=dtype, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]


def train(params, grads_per_step, **kwargs):
    optimizer = RAdaBeliefW(params, **kwargs)
    for grads in grads_per_step:
        step(optimizer, params, [None if g is None else g.to(params[0].device) for g in grads])
    return optimizer


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [bits(t.cpu()) for p in params for t in (p.detach(), *optimizer.state[p].values())]


def at_step_6(params, **options):
    """An optimizer whose next step is rectified."""
    optimizer = RAdaBeliefW(params, **{"lr": 0.03, **options})
    for param in params:
        ones = torch.ones_like(param, dtype=torch.promote_types(param.dtype, torch.float32), requires_grad=False)
        optimizer.state[param].update(step=torch.tensor(6.0), exp_avg=ones * 0.03, exp_avg_sq=ones * 0.01)
        if optimizer.averages_weights:
            optimizer.state[param]["z"] = param.detach().to(ones.dtype) * 1.25 - 0.1
    return optimizer
