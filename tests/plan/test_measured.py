"""The plan beside what gloo ranks on this machine really hold."""

from dataclasses import astuple, replace

import pytest

from robust_dist.plan.check import TOLERANCE, measure_here, small_variants
from robust_dist.plan.choose import memory
from robust_dist.plan.profile import build_on_meta, profile_for, read_shapes
from robust_dist.plan.question import Question
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

# 45 MB of weights, so that a process's own ups and downs are small beside it.
JOB = Question("resnet18", image_size=64, num_classes=10, batch_size=16, gpus_per_node=2)
MICRO_BATCH = 8
SMALL = small_variants(replace(JOB, nodes=2))
TORCH = tuple(variant for variant in SMALL if variant.name in ("DDP", "HSDP"))
REST = tuple(variant for variant in SMALL if variant not in TORCH)


@pytest.fixture(scope="module")
def launched():
    """(variant, precision) -> the job and what its ranks measured; a group of variants is launched once, when asked."""
    launches = {}

    def launch(variant, precision):
        group = next(group for group in (TORCH, REST) if variant in group)
        key = group, precision
        if key not in launches:
            nodes = 2 if group is TORCH else 1
            job = replace(JOB, nodes=nodes, batch_size=2 * nodes * MICRO_BATCH, precision=precision)
            ranks = run_ranks(measure_here, job.world_size, group, job, MICRO_BATCH, timeout=300.0)
            launches[key] = job, list(zip(*ranks, strict=True))
        job, found = launches[key]
        return job, found[group.index(variant)]

    return launch


@pytest.fixture(scope="module")
def shapes():
    return read_shapes(build_on_meta(JOB.model, JOB.num_classes))


slow = pytest.mark.slow
CELLS = [pytest.param(variant, "no", marks=needs_torch_2_7, id=variant.name) for variant in TORCH]
CELLS += [pytest.param(variant, "no", marks=slow, id=variant.name) for variant in REST]


@pytest.mark.parametrize(("variant", "precision"), CELLS)
def test_every_rank_holds_the_planned_bytes(launched, shapes, variant, precision):
    job, measured = launched(variant, precision)
    for rank, one in enumerate(measured):
        planned = variant.held(shapes, job, rank)
        ours = planned.parameters, planned.masters, planned.gradients, planned.state
        assert astuple(one)[:4] == ours, f"rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "precision"), CELLS)
def test_the_planned_peak_is_within_15_percent_of_the_process_s(launched, shapes, variant, precision):
    job, measured = launched(variant, precision)
    planned = memory(variant, shapes, profile_for(variant, job), job, MICRO_BATCH, rank=0, on_cpu=True).peak
    seen = max(measured[0].passes, measured[0].step)
    assert planned == pytest.approx(seen, rel=TOLERANCE), (planned / 2**20, seen / 2**20)
