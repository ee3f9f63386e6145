"""DDP, FSDP1, FSDP2, HSDP and FSDP2 with tensor parallelism against one process, cell by cell of engines/matrix.md."""

import warnings

import pytest
import torch
import torch.distributed as dist

from tests.engines import course
from tests.engines import torch_scenarios as scenarios
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

# torch 2.6 has no fully_shard on CPUs: it asks the CPU's stream for an event.
pytestmark = needs_torch_2_7

# The table's row of an engine, where it is not the engine's own name.
ROWS = {"FSDP2, bf16 mixed precision": "FSDP2, bf16", "FSDP1, HYBRID_SHARD": "HSDP"}


def _launch(world, folder, again):
    warnings.simplefilter("ignore")
    found = scenarios.resharding(world, folder, (4,)) if again else scenarios.plan(world, folder)
    return run_scenarios(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(_launch, 2, 2, folder, False)


@pytest.fixture(scope="module")
def four(folder, two):
    return run_ranks(_launch, 4, 4, folder, False)


@pytest.fixture(scope="module")
def launches(folder, two, four):
    """Results of the launches by their number of ranks; the files of 2 and 4 ranks are read by others."""
    return {
        1: run_ranks(_launch, 1, 1, folder, False),
        2: [a | b for a, b in zip(two, run_ranks(_launch, 2, 2, folder, True), strict=True)],
        3: run_ranks(_launch, 3, 3, folder, False),
        4: four,
    }


def _cell(engine, column, world):
    marks = pytest.mark.cell(ROWS.get(engine, engine), column, world)
    return pytest.param(world, f"{engine}/{column}", marks=marks, id=f"{engine}-{column}-{world}")


def _cells():
    properties = ("resume", "switch", "groups", "after an evaluation", "a parameter without a gradient")
    found = [_cell(engine, "trajectory", world) for world, engines in scenarios.AT.items() for engine in engines]
    resumed = [(world, engine) for world in scenarios.AT for engine in scenarios.resumed(world)]
    return found + [_cell(engine, column, world) for world, engine in resumed for column in properties]


def _reshardings():
    found = []
    for engine, writers, reader, readers in scenarios.RESHARDED:
        name = scenarios.resharding_name(engine, writers, reader, readers)
        column, ways = "other world size", f"{writers}->{readers}"
        marks = [pytest.mark.cell(row, column, ways) for row in sorted({engine, reader} - {"one process"})]
        found.append(pytest.param(readers, name, marks=marks, id=f"{engine}-{column}-{name}"))
    return found


@pytest.mark.parametrize(("world", "name"), _cells())
def test_every_engine_is_one_process(launches, world, name):
    assert_passed(launches[world], name)


@pytest.mark.parametrize(("world", "name"), _reshardings())
def test_a_checkpoint_goes_on_at_another_number_of_ranks_on_the_track_of_one_process(launches, world, name):
    assert_passed(launches[world], name)


@pytest.mark.parametrize("engine", ["FSDP1", "FSDP2"])
def test_the_step_that_torch_makes_to_get_state_changes_nothing_and_step_0_comes_back_as_step_0(launches, engine):
    assert_passed(launches[2], f"step 0 {engine}")


@pytest.mark.parametrize(("engine", "world"), scenarios.FROZEN.items())
def test_state_of_parameters_that_are_frozen_when_it_is_loaded_comes_back(launches, engine, world):
    assert_passed(launches[world], f"{engine}/frozen at load")


@pytest.mark.parametrize(("engine", "world"), scenarios.FROZEN.items())
def test_gradients_that_are_there_stay_and_cost_no_state_at_a_save_or_a_load(launches, engine, world):
    assert_passed(launches[world], f"{engine}/with gradients")


def test_groups_of_a_part_of_a_model_are_its_shards_after_an_evaluation(launches):
    assert_passed(launches[2], "groups of a part")


def test_an_asynchronous_checkpoint_is_of_the_step_at_which_it_was_asked_for(launches):
    assert_passed(launches[2], "asynchronous FSDP2")


def test_fsdp1_flattens_parameters_so_that_only_a_split_by_name_is_right(launches):
    assert_passed(launches[2], "ndim")


@pytest.mark.parametrize("engine", ["FSDP1", "FSDP2"])
@pytest.mark.parametrize("how", ["total_steps", "num_groups", "step", "late group"])
def test_ranks_that_differ_get_the_same_error_after_a_few_steps(launches, engine, how):
    assert_passed(launches[2], f"{how} {engine}")


def _offloaded(folder):
    """FSDP2 with parameters, gradients and state on the CPU, computed on the GPU, against one process."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.cuda.set_device(0)
    model = fully_shard(course.Net(), offload_policy=CPUOffloadPolicy())
    optimizer = course.optimizer_of(model)
    schedule = course.schedule_of(optimizer)

    def train_part(images, labels, last):
        model.set_requires_gradient_sync(last)
        loss = course.loss_of(model(images.cuda()), labels.cuda())
        (loss / course.ACCUMULATION).backward()

    def finish_step():
        torch.nn.utils.clip_grad_norm_(model.parameters(), course.CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    def whole():
        assert all(p.device.type == "cpu" for p in model.parameters())
        # full_tensor() gathers on the group's device; one rank's part is the whole.
        return {name: p.detach().to_local().clone() for name, p in model.named_parameters()}

    # The GPU's matrix products sum in another order than the CPU's.
    course.drive(train_part, finish_step, lambda: optimizer.param_groups, whole, tolerance=1e-5)
    assert all(state["exp_avg"].to_local().device.type == "cpu" for state in optimizer.state.values())


@pytest.mark.gpu
@pytest.mark.filterwarnings("default:::torch.*")  # NCCL's news of each release are no faults
@pytest.mark.cell("FSDP2, CPUOffloadPolicy", "trajectory", 1)
def test_cpu_offload_of_fsdp2_is_one_process(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1)
    try:
        _offloaded(tmp_path)
    finally:
        dist.destroy_process_group()
