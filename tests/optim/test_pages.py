"""Large state lies on memory for which large pages were asked."""

import re
import sys
from pathlib import Path

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, pages
from tests.optim.helpers import gradients, start, step

LARGE = 2 << 20


def _asked():
    """The large pages, by number, that were asked for, as the kernel has them."""
    found, place = set(), range(0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            # Memory that was given back may have left a part of a page.
            place = range(-(-int(bounds[1], 16) // LARGE), int(bounds[2], 16) // LARGE)
        elif line.startswith("VmFlags:") and "hg" in line.split():
            found |= set(place)
    return found


needs_large_pages = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here"
)


@needs_large_pages
def test_large_state_asks_for_large_pages_and_for_nothing_else():
    before = _asked()
    param = torch.zeros(3_000_000, dtype=torch.bfloat16).requires_grad_()
    optimizer = RAdaBeliefW([param], master_weights=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq", "master")]
    whole = [range(-(-tensor.data_ptr() // LARGE), (tensor.data_ptr() + tensor.nbytes) // LARGE) for tensor in state]
    assert all(len(pages) >= 2 for pages in whole)
    asked = _asked()
    assert asked >= set().union(*whole)
    assert asked - before <= set().union(*whole)


@pytest.mark.parametrize("madvise", [None, lambda *_: -1], ids=["another system", "refused"])
def test_where_there_are_no_large_pages_the_state_is_the_same(monkeypatch, madvise):
    monkeypatch.setattr(pages, "_madvise", lambda: madvise)
    for layout in (torch.contiguous_format, torch.channels_last):
        param = start((2, 64, 64, 64)).to(memory_format=layout).requires_grad_()
        optimizer = RAdaBeliefW([param])
        step(optimizer, [param], gradients((2, 64, 64, 64), 1))
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()
