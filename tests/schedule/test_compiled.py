import pytest
import torch

from robust_dist.schedule import RobustSchedule
from tests.schedule.toys import decays, make, rates, train_step

TOTAL = 8


def train_compiled(optimizer, after_each):
    """Train with a compiled step; returns how many graphs were compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(TOTAL):
        step()
        after_each()
    return len(graphs)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_follows_the_schedule_and_is_not_compiled_again_for_it():
    optimizer, eager = make(tensors=True), make(tensors=True)
    schedule, reference = RobustSchedule(optimizer, TOTAL), RobustSchedule(eager, TOTAL)

    def after_each():
        used = train_step(eager, reference)
        schedule.step()
        assert (decays(optimizer), rates(optimizer)) == (decays(eager), rates(eager)) != used

    graphs = train_compiled(optimizer, after_each)
    for ours, theirs in zip(optimizer.param_groups, eager.param_groups, strict=True):
        torch.testing.assert_close(ours["params"][0], theirs["params"][0])
    assert graphs == train_compiled(make(tensors=True), lambda: None)
