"""The README's backend is one file that an optimizer steps with."""

import re
from pathlib import Path

import pytest
import torch

from robust_dist.optim import RAdaBeliefW, backends
from tests.optim.helpers import gradients, reference, start, step

PAGE = Path(backends.__file__).with_name("README.md").read_text()


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The page's file, imported from outside the package."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "float64_backend.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "float64_backend", raising=False)
    before = list(backends.BACKENDS)
    __import__("float64_backend")
    yield
    backends.BACKENDS[:] = before


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("settings", [{}, {"maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.99)}])
def test_a_backend_is_added_by_one_file_from_outside(settings):
    grads = gradients((4, 3), 9)
    param = start((4, 3)).requires_grad_()
    optimizer = RAdaBeliefW([param], **settings)
    assert optimizer.backend_in_use() == "float64"
    for grad in grads:
        step(optimizer, [param], [grad])
    seen = [-grad for grad in grads] if settings.pop("maximize", False) else grads
    torch.testing.assert_close(param.detach(), reference(start((4, 3)), seen, **settings)[0], rtol=1e-12, atol=1e-13)
    assert optimizer.state[param]["step"].item() == 9


@pytest.mark.usefixtures("added")
def test_what_an_added_backend_refuses_goes_to_the_others():
    wide, narrow = (start((3,), dtype=dtype).requires_grad_() for dtype in (torch.float64, torch.float32))
    theirs = RAdaBeliefW([narrow]).backend_in_use()
    assert theirs != "float64"
    both = RAdaBeliefW([{"params": [wide]}, {"params": [narrow]}])
    assert both.backend_in_use() == f"float64 + {theirs}"
    assert RAdaBeliefW([wide], fused=True).backend_in_use() == "float64"
    assert RAdaBeliefW([wide], foreach=True).backend_in_use() == "foreach"


def test_the_page_names_every_file_and_backend():
    folder = Path(backends.__file__).parent
    named = set(re.findall(r"`(\w+\.py)`", PAGE))
    missing = {path.name for path in folder.glob("[a-z]*.py")} - named
    assert all(name.startswith("fused_triton") for name in missing), missing
    assert all(f"| `{backend.name}` |" in PAGE for backend in backends.BACKENDS)
