"""The hosts of a test module, and what an undisturbed run on them gives."""

import pytest

from tests.multinode.hosts import missing, two_hosts
from tests.multinode.jobs import Cluster


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    lacks = missing()
    if lacks:
        pytest.fail("two hosts on this machine need " + ", ".join(lacks))
    with two_hosts() as hosts:
        yield Cluster(hosts, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def cluster(machines):
    """Two hosts on which nothing else runs."""
    yield machines
    machines.clear()


@pytest.fixture(scope="module")
def reference(machines):
    """The folder of a run on both hosts that nothing disturbed."""
    job = machines.finish("reference")
    machines.clear()
    return job.run_dir
