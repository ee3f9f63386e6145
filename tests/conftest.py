"""Markers that are opt-in, threads suited to two cores, and tables written by test runs."""

import os
from pathlib import Path

# Before torch loads it: otherwise MKL's AVX-512 kernels round some of torchvision's shears differently.
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")

import pytest
import torch

from tests.engines import matrix
from tests.multinode import table

# The longest files first, then folders of tests that start processes, so that workers (pytest-xdist) end together.
LONGEST = ("test_deepspeed.py", "test_torch_engines.py", "test_engines.py", "test_run.py", "test_compile.py")
LONG = ("engines", "train", "checkpoint", "study", "launch")
CELLS = pytest.StashKey[matrix.Cells]()
FAULTS = pytest.StashKey[table.Rows]()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--multinode", action="store_true", help="also run the tests marked multinode")
    parser.addoption("--matrix", metavar="FILE", help="write the table of engines between the marks of this file")
    parser.addoption("--faults", metavar="FILE", help="write the table of faults between the marks of this file")


def pytest_configure(config):
    config.stash[CELLS] = {}
    config.stash[FAULTS] = {}


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path.parent.name not in LONG))
    wanted = {
        "gpu": torch.cuda.is_available(),
        "slow": config.getoption("--slow"),
        "multinode": config.getoption("--multinode"),
    }
    for item in items:
        for marker, run in wanted.items():
            # Not `item.keywords`, which includes a folder of the marker's name.
            if item.get_closest_marker(marker) and not run:
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # A test counts by its call; set-up counts if the call was never reached.
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        for marker in item.iter_markers("cell"):
            engine, column, *world = marker.args
            outcomes = item.config.stash[CELLS].setdefault((engine, column), [])
            outcomes.append((str(world[0]) if world else "", report.outcome))
        for marker in item.iter_markers("fault"):
            item.config.stash[FAULTS][marker.args[0]] = table.Row.of(report.outcome, dict(report.user_properties))
    return report


def pytest_sessionfinish(session):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if path := session.config.getoption("--matrix"):
        matrix.write_into(Path(path), session.config.stash[CELLS])
    if path := session.config.getoption("--faults"):
        table.write_into(Path(path), session.config.stash[FAULTS])
