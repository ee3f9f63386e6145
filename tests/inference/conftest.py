"""The trained runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.inference.runs import RUNS, train_all, write_images
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`runs`: each run's folder by its name, to be read alone; `output`: what it printed; `images`: their files."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images")
    output = run_ranks(train_all, 2, str(folder), timeout=120.0)[0]
    return SimpleNamespace(
        runs={name: Path(folder, name) for name in RUNS}, output=output, images=folder / "images", folder=folder
    )
