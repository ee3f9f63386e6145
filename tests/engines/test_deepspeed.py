import importlib.util
import itertools
import os
import threading
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from robust_dist.engines.deepspeed import register
from robust_dist.optim import RAdaBeliefW
from tests.engines import deepspeed_accelerate as by_accelerate
from tests.engines import deepspeed_bad_input as bad
from tests.engines import deepspeed_course as ds
from tests.engines import deepspeed_models as models
from tests.engines import deepspeed_scenarios as scenarios
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.matrix import ENGINES as ROWS
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)
FP32 = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
# Hundreds of log lines of memory make this one slow: its start and its steps are enough.
SHORT = ("ZeRO 1, bf16, gradients in fp32",)
WHOLE = tuple(kind for kind in scenarios.ENGINES if kind not in SHORT)
TIMEOUT = 300.0


def registered_once():
    register()
    register()
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    assert ZERO_SUPPORTED_OPTIMIZERS.count(RAdaBeliefW) == 1


def of_every_kind(folder):
    """Two ranks: name of a scenario -> the scenario; a kind's later ones compare with the end of its first."""
    found, ends = {}, {}
    for kind in scenarios.ENGINES:

        def first(kind=kind):
            ends[kind] = scenarios.trajectory(kind, folder)

        found[f"{kind}: trajectory"] = first
        if kind in WHOLE:
            found[f"{kind}: resume"] = lambda kind=kind: scenarios.resume(kind, folder, ends[kind])
            found[f"{kind}: switch"] = lambda kind=kind: scenarios.switch(kind, folder, ends[kind])
            found[f"{kind}: groups"] = partial(scenarios.groups, kind, folder)
        if kind in FP32:
            found[f"{kind}: odd moment"] = partial(scenarios.odd_moment, kind, folder)
    return found


def signal(path):
    dist.barrier()
    if dist.get_rank() == 0:
        Path(path).touch()


def to_and_from(folder, mine, other):
    """Save for the other world, wait for its checkpoints, and go on from them."""
    yield "save", partial(scenarios.save_for_another_world, f"{folder}/{mine}")
    yield "saved", partial(signal, f"{folder}/{mine}/saved")
    yield "wait", partial(ds.wait_for, f"{folder}/{other}/saved")
    for stage in (0, *scenarios.UNIVERSAL_STAGES):
        yield f"from {other}: ZeRO {stage}", partial(scenarios.load_from_another_world, stage, f"{folder}/{other}")
    yield "fault", partial(scenarios.deepspeeds_universal_fault_is_still_there, f"{folder}/{other}")
    yield "another world", partial(bad.plain_checkpoints_of_another_world, f"{folder}/{other}")
    yield "wrong universal", partial(bad.wrong_universal_checkpoints, f"{folder}/{other}")


TRAPS = {
    "zero.Init": scenarios.split_by_names_survives_zero_init,
    "dry step": scenarios.dry_step_leaves_no_trace,
    "step calls": scenarios.schedule_is_no_clock_of_step_calls,
    "unwraps": scenarios.schedule_unwraps_what_deepspeed_hands_it,
    "errors pass": scenarios.schedule_errors_are_not_swallowed,
    "offload refuses": scenarios.offload_refuses_a_client_unless_told,
    "missed step": scenarios.a_rank_that_misses_a_step_is_named,
}


def on_one_rank():
    get_ready()
    found = {"forgotten": bad.forgotten_registration, "unregistered": by_accelerate.unregistered}
    found["register"] = registered_once
    found |= {f"{kind}: trajectory": partial(scenarios.trajectory, kind) for kind in FP32}
    return run_scenarios(found | {"warm-up": scenarios.deepspeeds_warmup_is_taken_over})


def on_two_ranks(folder):
    get_ready()
    found = {"register": registered_once, **dict(to_and_from(folder, 2, 4)), **of_every_kind(folder), **TRAPS}
    found["no schedule"] = partial(scenarios.load_without_the_schedule_keeps_the_engines_step, folder)
    found["wrong JSONs"] = bad.wrong_jsons
    found["common JSONs"] = bad.common_jsons_train_as_if_they_said_nothing_of_adam
    found["not ours"] = bad.engines_that_name_nothing_of_ours_start_as_without_us
    found["own state"] = partial(models.checkpoints_of_models_with_state_of_their_own, f"{folder}/own state")
    found["wrong checkpoints"] = partial(bad.wrong_checkpoints, folder)
    found["accelerate"] = partial(os.environ.update, {"ACCELERATE_USE_DEEPSPEED": "true"})
    for stage in (2, 3):
        found[f"dummies {stage}"] = partial(by_accelerate.dummies, stage)
        found[f"client {stage}"] = partial(by_accelerate.client_objects, stage)
    return run_scenarios(found)


def on_three_ranks():
    get_ready()
    found = {f"{kind}: trajectory": partial(scenarios.trajectory, kind) for kind in FP32}
    return run_scenarios({"register": registered_once, **found})


def on_four_ranks(folder):
    get_ready()
    found = {f"{kind}: trajectory": partial(scenarios.trajectory, kind) for kind in FP32}
    found["missed step"] = scenarios.a_rank_that_misses_a_step_is_named
    return run_scenarios({"register": registered_once, **dict(to_and_from(folder, 4, 2)), **found})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results by world size. Two and four ranks run at once, as each goes on from what the other saved."""
    folder, results = str(tmp_path_factory.mktemp("ranks")), {}

    def launch(world, function, *args):
        try:
            results[world] = run_ranks(function, world, *args, timeout=TIMEOUT)
        except Exception:
            # The cells of the other launches still count.
            results[world] = traceback.format_exc()

    beside = threading.Thread(target=launch, args=(2, on_two_ranks, folder))
    for world in (2, 4):
        Path(f"{folder}/{world}").mkdir()
    beside.start()
    launch(4, on_four_ranks, folder)
    beside.join()
    launch(3, on_three_ranks)
    launch(1, on_one_rank)
    return results


def assert_held(results, world, name):
    assert not isinstance(results[world], str), results[world]
    assert_passed(results[world], name)


def cells(column, kinds, worlds):
    found = []
    for kind, world in itertools.product(kinds, worlds):
        marks = [pytest.mark.cell(kind, column, world)] if kind in ROWS else []
        found.append(pytest.param(kind, column, world, marks=marks, id=f"{kind}-{column}-{world}"))
    return found


@pytest.mark.parametrize(("kind", "column", "world"), cells("trajectory", FP32, (1, 2, 3, 4)))
def test_every_stage_has_the_trajectory_of_one_process(ranks, kind, column, world):
    assert_held(ranks, world, f"{kind}: {column}")


WRAPPED = tuple(kind for kind in scenarios.ENGINES if kind not in FP32)


@pytest.mark.parametrize(("kind", "column", "world"), cells("trajectory", WRAPPED, (2,)))
def test_bf16_and_offload_have_the_trajectory_of_one_process_of_their_precision(ranks, kind, column, world):
    assert_held(ranks, world, f"{kind}: {column}")


@pytest.mark.parametrize(("kind", "column", "world"), cells("resume", WHOLE, (2,)))
def test_a_load_into_a_fresh_engine_or_one_that_is_elsewhere_goes_on_bit_for_bit(ranks, kind, column, world):
    assert_held(ranks, world, f"{kind}: {column}")


@pytest.mark.parametrize(("kind", "column", "world"), cells("switch", WHOLE, (2,)))
def test_after_a_load_from_before_or_after_the_switch_the_decay_is_what_the_step_says(ranks, kind, column, world):
    assert_held(ranks, world, f"{kind}: {column}")


@pytest.mark.parametrize(("kind", "column", "world"), cells("groups", WHOLE, (2,)))
def test_groups_keep_their_settings_and_a_dropped_empty_group_harms_none(ranks, kind, column, world):
    assert_held(ranks, world, f"{kind}: {column}")


ODD = ("after an evaluation", "a parameter without a gradient")


@pytest.mark.parametrize(("kind", "column", "world"), [cell for column in ODD for cell in cells(column, FP32, (2,))])
def test_a_save_after_an_evaluation_in_mid_accumulation_goes_on_bit_for_bit(ranks, kind, column, world):
    """Of a model with a parameter that never had a gradient."""
    assert_held(ranks, world, f"{kind}: odd moment")


def moves():
    found = []
    for kind, (source, target) in itertools.product(FP32, ((2, 4), (4, 2))):
        mark = pytest.mark.cell(kind, "other world size", f"{source}->{target}")
        found.append(pytest.param(kind, source, target, marks=mark, id=f"{kind}-{source}-{target}"))
    return found


@pytest.mark.parametrize(("kind", "source", "target"), moves())
def test_a_checkpoint_of_another_world_goes_on_with_each_groups_own_settings_and_steps(ranks, kind, source, target):
    assert_held(ranks, target, f"from {source}: {kind}")


def test_deepspeeds_universal_load_still_mixes_the_groups_up_where_we_do_not_mend_it(ranks):
    for world in (2, 4):
        assert_held(ranks, world, "fault")


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(2, "dry step", id="zero-0 in bf16 starts at step 0 with its weights as they were"),
        pytest.param(2, "zero.Init", id="a decay split by names survives zero.Init, and its JSON may still say auto"),
        pytest.param(2, "step calls", id="the schedule counts optimizer steps, not calls per group"),
        pytest.param(2, "unwraps", id="the schedule drives the optimizer under ZeRO's wrapper"),
        pytest.param(2, "errors pass", id="an error of the schedule is not swallowed"),
        pytest.param(2, "offload refuses", id="offload refuses a client's optimizer unless told otherwise"),
        pytest.param(2, "no schedule", id="a load without the schedule keeps the engine's own step"),
        pytest.param(1, "warm-up", id="DeepSpeed's warm-up parameters mean what they mean there"),
        pytest.param(2, "missed step", id="of 2 ranks one that misses a step is named"),
        pytest.param(4, "missed step", id="of 4 ranks one that misses a step is named"),
        pytest.param(2, "register", id="registering twice registers once"),
        pytest.param(2, "common JSONs", id="a JSON written for Adam trains with the type changed alone"),
        pytest.param(2, "not ours", id="an engine that names nothing of ours starts as it does without us"),
        pytest.param(2, "own state", id="extra state and what load hooks change is loaded as DeepSpeed loads it"),
    ],
)
def test_under_deepspeed(ranks, world, name):
    assert_held(ranks, world, name)


@pytest.mark.parametrize("name", ["dummies 2", "dummies 3", "client 2", "client 3"])
def test_a_json_full_of_auto_works_under_accelerate_with_two_words_changed(ranks, name):
    assert_held(ranks, 2, name)


@pytest.mark.parametrize(
    ("worlds", "name"),
    [((1,), "forgotten"), ((1,), "unregistered"), ((2,), "wrong JSONs"), ((2,), "wrong checkpoints")]
    + [((2, 4), "another world"), ((2, 4), "wrong universal")],
)
def test_bad_input_is_an_error_on_every_rank_in_seconds_that_says_what_to_change(ranks, worlds, name):
    for world in worlds:
        assert_held(ranks, world, name)


def replaced():
    get_ready()
    registered_once()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    by_accelerate.offload_replaces_a_client_silently_unless_told()


@pytest.mark.slow
def test_check_sees_that_accelerate_put_deepspeeds_adam_in_our_place():
    run_ranks(replaced, 1, timeout=TIMEOUT)


def fp16_overflow():
    os.environ.update(LOCAL_SIZE="1", DS_ACCELERATOR="cuda")
    torch.cuda.set_device(0)
    registered_once()
    scenarios.overflows_are_no_steps()


@pytest.mark.gpu
@pytest.mark.cell("ZeRO 2, fp16 overflow", "trajectory", 1)
def test_steps_skipped_for_an_fp16_overflow_leave_count_decay_and_trajectory_right():
    run_ranks(fp16_overflow, 1, timeout=TIMEOUT)
