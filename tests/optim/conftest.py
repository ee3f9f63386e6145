"""Fixtures of the tests of the Triton backend."""

import pytest
import torch

from robust_dist.optim import fused_triton
from tests.optim import interpreted


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run in this test."""
    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    interpreted.on_the_cpu(monkeypatch)
    return interpreted.CPU


@pytest.fixture
def launches(monkeypatch):
    """The kinds of every launch of the kernel `step`."""
    found, launch = [], fused_triton._step

    def counted(table, grads, chunks, kinds):
        found.append(kinds)
        launch(table, grads, chunks, kinds)

    monkeypatch.setattr(fused_triton, "_step", counted)
    return found
