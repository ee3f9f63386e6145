"""Large state lies on memory for which large pages were asked."""

import re
import sys
from pathlib import Path

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, pages
from tests.optim.helpers import gradients, start, step


def _flags(address):
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        if inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


needs_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here"
)


@needs_large_pages
def test_large_state_asks_for_large_pages_and_for_nothing_else(monkeypatch):
    asked, madvise = [], pages._madvise()
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *words: asked.append(words[:2]) or madvise(*words))
    param = torch.zeros(3_000_000, dtype=torch.bfloat16).requires_grad_()
    optimizer = RAdaBeliefW([param], master_weights=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq", "master")]
    for tensor in state:
        assert "hg" in _flags(tensor.data_ptr() + 6_000_000)
    bounds = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in state]
    assert len(asked) == len(state)
    assert all(any(low <= first and first + size <= high for low, high in bounds) for first, size in asked)


@pytest.mark.parametrize("madvise", [None, lambda *_: -1], ids=["another system", "refused"])
def test_where_there_are_no_large_pages_the_state_is_the_same(monkeypatch, madvise):
    monkeypatch.setattr(pages, "_madvise", lambda: madvise)
    for layout in (torch.contiguous_format, torch.channels_last):
        param = start((2, 64, 64, 64)).to(memory_format=layout).requires_grad_()
        optimizer = RAdaBeliefW([param])
        step(optimizer, [param], gradients((2, 64, 64, 64), 1))
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()
