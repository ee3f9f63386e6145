"""Markers that need asking for, and threads that suit two cores."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--multinode", action="store_true", help="also run the tests marked multinode")


def pytest_collection_modifyitems(config, items):
    wanted = {
        "gpu": torch.cuda.is_available(),
        "slow": config.getoption("--slow"),
        "multinode": config.getoption("--multinode"),
    }
    for item in items:
        for marker, run in wanted.items():
            if marker in item.keywords and not run:
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}"))
