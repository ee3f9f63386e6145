"""The plan beside what gloo ranks on this machine really hold."""

from dataclasses import astuple, replace

import pytest

from robust_dist.plan.check import TOLERANCE, with_small_buckets
from robust_dist.plan.engines import ENGINES
from robust_dist.plan.held import held
from robust_dist.plan.measure import measure_here
from robust_dist.plan.memory import memory
from robust_dist.plan.profile import profile_for
from robust_dist.plan.question import Question
from robust_dist.plan.shapes import build_on_meta, read_shapes
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

# 45 MB of weights, so that a process's own ups and downs are small beside it.
JOB = Question("resnet18", image_size=64, num_classes=10, batch_size=16, gpus_per_node=2)
MICRO_BATCH = 8
TORCH = tuple(engine for engine in ENGINES if engine.name in ("DDP", "HSDP"))
REST = tuple(engine for engine in ENGINES if engine.name.startswith("FSDP2"))
ZERO = tuple(with_small_buckets(engine) for engine in ENGINES if engine.kind.startswith("zero") and not engine.offload)


@pytest.fixture(scope="module")
def launched():
    """(engine, precision) -> the job and what its ranks measured; a group of engines is launched once, when asked."""
    launches = {}

    def launch(engine, precision):
        group = next(group for group in (TORCH, REST + ZERO) if engine in group)
        key = group, precision
        if key not in launches:
            nodes = 2 if group is TORCH else 1
            job = replace(JOB, nodes=nodes, batch_size=2 * nodes * MICRO_BATCH, precision=precision)
            ranks = run_ranks(measure_here, job.world_size, group, job, MICRO_BATCH, timeout=300.0)
            launches[key] = job, list(zip(*ranks, strict=True))
        job, found = launches[key]
        return job, found[group.index(engine)]

    return launch


@pytest.fixture(scope="module")
def shapes():
    return read_shapes(build_on_meta(JOB.model, JOB.num_classes))


slow = pytest.mark.slow
CELLS = [pytest.param(engine, "no", marks=needs_torch_2_7, id=engine.name) for engine in TORCH]
CELLS += [pytest.param(engine, "no", marks=slow, id=engine.name) for engine in REST + ZERO]


@pytest.mark.parametrize(("engine", "precision"), CELLS)
def test_every_rank_holds_the_planned_bytes(launched, shapes, engine, precision):
    job, measured = launched(engine, precision)
    for rank, one in enumerate(measured):
        planned = held(engine, shapes, job, rank)
        ours = planned.parameters, planned.masters, planned.gradients, planned.state
        assert astuple(one)[:4] == ours, f"rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "precision"), CELLS)
def test_the_planned_peak_is_within_15_percent_of_the_process_s(launched, shapes, engine, precision):
    job, measured = launched(engine, precision)
    planned = memory(engine, shapes, profile_for(engine, job), job, MICRO_BATCH, rank=0, on_cpu=True).peak
    seen = max(measured[0].passes, measured[0].step)
    assert planned == pytest.approx(seen, rel=TOLERANCE), (planned / 2**20, seen / 2**20)
