"""The plan beside torch's own FSDP2 on ranks that only one process plays (fake process group)."""

from collections import Counter

import pytest
import torch

from robust_dist.bench.scale import fake_rank
from robust_dist.engines.fsdp.engine import FSDPVariant
from robust_dist.measure.dispatch import Collectives
from robust_dist.measure.memory import storage_bytes
from robust_dist.models import build_model
from robust_dist.optim import RAdaBeliefW
from robust_dist.plan.choose import traffic, variants
from robust_dist.plan.profile import build_on_meta, read_shapes
from robust_dist.plan.question import Question
from tests.versions import needs_torch_2_7

pytestmark = needs_torch_2_7
MODEL = "resnet18"
CALLS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


def jobs():
    for nodes in (1, 8, 64):
        job = Question(MODEL, nodes=nodes, gpus_per_node=8, batch_size=8 * nodes, num_classes=10)
        for variant in variants():
            if isinstance(variant, FSDPVariant) and variant.unfit(job) is None:
                yield pytest.param(job, variant, id=f"{variant.name} {job.world_size}")


@pytest.mark.parametrize(("job", "variant"), list(jobs()))
def test_shards_state_and_collectives_are_torch_s_own(job, variant):
    shapes = read_shapes(build_on_meta(MODEL, 10))
    last = job.world_size - 1
    with fake_rank(job.world_size, last):
        model = variant.shard(build_model(MODEL, 10), job)
        with Collectives() as counter:
            model(torch.zeros(2, 3, 32, 32)).sum().backward()
        parameters = storage_bytes(model.parameters())
        gradients = storage_bytes(parameter.grad for parameter in model.parameters())
        optimizer = RAdaBeliefW(model.parameters())
        optimizer.step()
        state = storage_bytes(value for one in optimizer.state.values() for value in one.values())
    planned = variant.held(shapes, job, last)
    assert (parameters, gradients, state) == (planned.parameters, planned.gradients, planned.state)
    counted = Counter(CALLS[name.removeprefix("c10d::")] for name in counter.names)
    wanted = Counter()
    for one in traffic(variant, shapes, job, accumulation=1):
        wanted[one.operation] += one.count if one.operation != "broadcast" else 0
    assert counted == +wanted


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulating_gathers_every_time_and_reduces_once(accumulation):
    job = Question(MODEL, gpus_per_node=8, batch_size=64, num_classes=10)
    variant = next(variant for variant in variants() if variant.name == "FSDP2")
    shapes = read_shapes(build_on_meta(MODEL, 10))
    with fake_rank(8, 0):
        model = variant.shard(build_model(MODEL, 10), job)
        with Collectives() as counter:
            for part in range(accumulation):
                model.set_requires_gradient_sync(part == accumulation - 1)
                model(torch.zeros(2, 3, 32, 32)).sum().backward()
        held_now = storage_bytes(p.grad for p in model.parameters())
    counted = Counter(CALLS[name.removeprefix("c10d::")] for name in counter.names)
    planned = traffic(variant, shapes, job, accumulation)
    for operation in ("all-gather", "reduce-scatter"):
        assert counted[operation] == sum(one.count for one in planned if one.operation == operation)
    assert held_now == variant.held(shapes, job).gradients
