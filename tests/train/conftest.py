"""Fixtures of every file here."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    # Accelerate keeps the precision of the process's first run.
    AcceleratorState._reset_state(True)
