import copy
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, SequentialLR

from robust_dist.engines.accelerate import base_optimizer, check
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.engines.toys import DECAY, LR, batch, build_model, groups_of, same, used, wanted
from tests.forked import python
from tests.ranks import free_port, run_ranks

pytest.importorskip("accelerate")
TOTAL = 8
ROOT = Path(__file__).parents[2]


def make_accelerator(split_batches=False, accumulation=1, adjust_scheduler=True, with_optimizer=True):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    return Accelerator(
        cpu=True,
        step_scheduler_with_optimizer=with_optimizer,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation, adjust_scheduler=adjust_scheduler
        ),
    )


def prepared(accelerator, total=TOTAL, cls=RAdaBeliefW):
    model = build_model()
    optimizer = cls(groups_of(model), lr=LR)
    return accelerator.prepare(model, optimizer, RobustSchedule(optimizer, total))


def run_steps(accelerator, model, optimizer, schedule, first, last, accumulation=1):
    """Train; what every optimizer step used must be what its number says."""
    for step in range(first, last):
        images, labels = batch(step)
        before = used(optimizer)
        assert same(before, wanted(step, TOTAL)), (step, before)
        for part in range(accumulation):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images[part::accumulation]), labels[part::accumulation])
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def check_every_way_of_batching():
    for split_batches in (False, True):
        for accumulation in (1, 3):
            for adjust_scheduler in (False, True):
                accelerator = make_accelerator(split_batches, accumulation, adjust_scheduler)
                model, optimizer, schedule = prepared(accelerator)
                check(accelerator, optimizer, num_processes=dist.get_world_size(), schedule=schedule, total_steps=TOTAL)
                run_steps(accelerator, model, optimizer, schedule, 0, TOTAL + 2, accumulation)
                assert schedule.scheduler.last_epoch == TOTAL + 2


def check_other_optimizers():
    accelerator = make_accelerator()
    model, optimizer, schedule = prepared(accelerator, cls=torch.optim.AdamW)
    run_steps(accelerator, model, optimizer, schedule, 0, TOTAL)


def check_a_schedule_that_is_not_prepared():
    accelerator = make_accelerator()
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Made after prepare, with the wrapper, and stepped by hand once a step.
    schedule = RobustSchedule(optimizer, TOTAL)
    assert schedule.optimizer is base_optimizer(optimizer)
    run_steps(accelerator, model, optimizer, schedule, 0, TOTAL)


def check_a_switch_of_its_own():
    accelerator = make_accelerator()
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    switch = WeightDecaySwitch(optimizer, TOTAL)
    model, optimizer, switch = accelerator.prepare(model, optimizer, switch)
    accelerator.register_for_checkpointing(switch)
    check(accelerator, optimizer, schedule=switch, total_steps=TOTAL)
    for step in range(TOTAL):
        assert used(optimizer)[0] == wanted(step, TOTAL)[0]
        accelerator.backward(model(batch(step)[0]).square().mean())
        optimizer.step()
        switch.step()


def check_skipped_steps():
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    make_accelerator()
    # Its step is skipped on overflow by the scaler, as SGD's is; a fused one is called and skips by itself.
    parameter = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [parameter], "weight_decay": DECAY}], lr=LR)
    inner = RobustSchedule(base, TOTAL)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(base, scaler=scaler)
    schedule = AcceleratedScheduler(inner, optimizer)
    done = 0
    for attempt in range(14):
        assert used(optimizer)[0] == wanted(done, TOTAL)[0][:1]
        scaler.scale(torch.ones(()))
        parameter.grad = torch.full((2,), float("inf") if attempt in (0, 3, 4, 9) else 1.0)
        optimizer.step()
        schedule.step()
        done += attempt not in (0, 3, 4, 9)
        assert inner.last_epoch == done == inner.weight_decay_switch.num_steps


def check_saving_and_loading(folder):
    for saved_at in (3, 7):
        path = f"{folder}/{saved_at}"
        accelerator = make_accelerator()
        model, optimizer, schedule = prepared(accelerator)
        run_steps(accelerator, model, optimizer, schedule, 0, saved_at)
        accelerator.save_state(path)
        accelerator.wait_for_everyone()
        run_steps(accelerator, model, optimizer, schedule, saved_at, TOTAL)
        want = [p.detach().clone() for p in model.parameters()]
        for loaded_at in (0, 7):
            accelerator = make_accelerator()
            model, optimizer, schedule = prepared(accelerator)
            run_steps(accelerator, model, optimizer, schedule, 0, loaded_at)
            accelerator.load_state(path)
            run_steps(accelerator, model, optimizer, schedule, saved_at, TOTAL)
            assert all(map(torch.equal, model.parameters(), want))


# What is stepped in an iteration: how often the optimizer, and how often the schedule.
BEATS = {
    "a discriminator that starts late": lambda it: (int(it >= 5), 1),
    "a generator that steps every third time": lambda it: (int(it % 3 == 2), 1),
    "a schedule that goes with it": lambda it: (int(it % 3 == 2), int(it % 3 == 2)),
    "a schedule that is stepped twice": lambda it: (1, 2),
    "an optimizer that steps twice": lambda it: (2, 1),
}
ITERATIONS = 12


def drive(beat, optimizer, schedule, first=0, save_at=None, save=None):
    """The decays and rates after each iteration."""
    seen = []
    for iteration in range(first, ITERATIONS):
        if iteration == save_at:
            save()
        steps, calls = beat(iteration)
        for _ in range(steps):
            for group in base_optimizer(optimizer).param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        for _ in range(calls):
            schedule.step()
        seen.append(used(optimizer))
    return seen


def of_one_process(beat, total):
    optimizer = RAdaBeliefW(groups_of(build_model()), lr=LR)
    return drive(beat, optimizer, RobustSchedule(optimizer, total))


def check_any_beat(folder, ways=((False, True), (True, True), (False, False))):
    """Whatever steps when: the values are those of one process, saved and resumed, too."""
    total = 2 * TOTAL
    for name, beat in BEATS.items():
        want = of_one_process(beat, total)
        for split_batches, with_optimizer in ways:
            accelerator = make_accelerator(split_batches, with_optimizer=with_optimizer)
            _, optimizer, schedule = prepared(accelerator, total)
            path, save_at = f"{folder}/{name}", 7 if (split_batches, with_optimizer) == ways[0] else None
            save = partial(accelerator.save_state, path)
            assert drive(beat, optimizer, schedule, 0, save_at, save) == want, name
            if save_at is None:
                continue
            accelerator.wait_for_everyone()
            accelerator = make_accelerator(split_batches, with_optimizer=with_optimizer)
            _, optimizer, schedule = prepared(accelerator, total)
            accelerator.load_state(path)
            assert drive(beat, optimizer, schedule, save_at) == want[save_at:], name


def check_two_accelerators_and_copies():
    """A schedule is counted rightly by whichever wrapper calls it, and so is a copy of it."""
    beat = BEATS["a generator that steps every third time"]
    first, second = make_accelerator(), make_accelerator(split_batches=True)
    _, optimizer, schedule = prepared(first)
    _, other, its_schedule = prepared(second)
    want = of_one_process(beat, TOTAL)
    assert drive(beat, optimizer, schedule) == drive(beat, other, its_schedule) == want
    inner = copy.deepcopy(prepared(first)[2].scheduler)
    prepared_copy = first.prepare(inner)
    assert drive(beat, inner.optimizer, prepared_copy) == want


HELD = {
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 4), RobustSchedule(o, TOTAL)], [4]),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, 1.0, 4), RobustSchedule(o, TOTAL)]),
}


def prepared_in(name, accelerator, *, schedule_too):
    """A RobustSchedule that torch's scheduler of that name holds, prepared or stepped by hand."""
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = HELD[name](optimizer)
    if schedule_too:
        return accelerator.prepare(model, optimizer, schedule)[1:]
    return accelerator.prepare(model, optimizer)[1], schedule


def check_schedules_in_others():
    """Accelerate's copies of a call count in torch's SequentialLR: refused, before the first step by `check`."""

    def each_step(_):
        return 1, 1

    world = dist.get_world_size()
    for name in HELD:
        accelerator = make_accelerator()
        optimizer, by_hand = prepared_in(name, accelerator, schedule_too=False)
        check(accelerator, optimizer, schedule=by_hand)
        want = drive(each_step, optimizer, by_hand)
        for split_batches in (True, False):
            accelerator = make_accelerator(split_batches)
            optimizer, schedule = prepared_in(name, accelerator, schedule_too=True)
            if world == 1 or split_batches:
                check(accelerator, optimizer, schedule=schedule)
                assert drive(each_step, optimizer, schedule) == want
                continue
            text = message(RuntimeError, accelerator, optimizer, schedule=schedule)
            assert f"RobustSchedule is in a {name}, whose step() Accelerate calls {world} times" in text
            assert f"Leave the {name} out of accelerator.prepare" in text
            with pytest.raises(RuntimeError, match=f"in a {name}"):
                drive(each_step, optimizer, schedule)


def message(error, *args, **kwargs):
    try:
        check(*args, **kwargs)
    except error as raised:
        return str(raised)
    raise AssertionError("check() saw nothing wrong")


def check_what_check_refuses():
    world = dist.get_world_size()
    accelerator = make_accelerator()
    model, optimizer, schedule = prepared(accelerator)
    text = message(RuntimeError, accelerator, optimizer, num_processes=world + 1)
    assert f"num_processes={world + 1} were requested, but {world} run" in text
    assert "ACCELERATE_USE_CPU=true torchrun" in text
    text = message(ValueError, accelerator, optimizer, schedule=schedule, total_steps=TOTAL * world + 1)
    assert f"total_steps={TOTAL}, the run makes {TOTAL * world + 1}" in text
    assert "not passed to accelerator.prepare" in message(RuntimeError, accelerator, RAdaBeliefW(model.parameters()))
    other = RobustSchedule(RAdaBeliefW(model.parameters()), TOTAL)
    assert "drives another RAdaBeliefW" in message(ValueError, accelerator, optimizer, schedule=other)
    plain = torch.optim.lr_scheduler.ConstantLR(base_optimizer(optimizer))
    assert "ConstantLR without" in message(ValueError, accelerator, optimizer, schedule=plain)
    without = RobustSchedule(optimizer, TOTAL, weight_decay_off_at=None)
    assert "without a weight-decay switch" in message(ValueError, accelerator, optimizer, schedule=without)
    accelerator = make_accelerator()
    _, optimizer, _ = prepared(accelerator, cls=torch.optim.AdamW)
    assert "AdamW, not RAdaBeliefW" in message(RuntimeError, accelerator, optimizer)
    from accelerate.utils import DummyOptim

    assert "DummyOptim" in message(RuntimeError, accelerator, DummyOptim([]))


def every_scenario(folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    check_every_way_of_batching()
    check_other_optimizers()
    check_a_schedule_that_is_not_prepared()
    check_a_switch_of_its_own()
    check_skipped_steps()
    check_saving_and_loading(folder)
    check_any_beat(folder)
    check_two_accelerators_and_copies()
    check_schedules_in_others()
    check_what_check_refuses()
    return make_accelerator().num_processes


@pytest.mark.parametrize("world", [1, 2])
def test_under_accelerate_every_optimizer_step_has_its_own_rate_and_decay(world, tmp_path):
    assert run_ranks(every_scenario, world, str(tmp_path)) == [world] * world


def on_four_ranks(folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for split_batches in (False, True):
        accelerator = make_accelerator(split_batches, 2)
        model, optimizer, schedule = prepared(accelerator)
        run_steps(accelerator, model, optimizer, schedule, 0, TOTAL, 2)
    check_any_beat(folder, [(False, True)])
    return schedule.scheduler.last_epoch


def test_on_four_ranks_a_step_counts_once_too(tmp_path):
    assert run_ranks(on_four_ranks, 4, str(tmp_path)) == [TOTAL] * 4


SCRIPT = """
import json, sys
from accelerate import Accelerator
from robust_dist.engines.accelerate import check
from robust_dist.optim import RAdaBeliefW
import torch
accelerator = Accelerator()
model = torch.nn.Linear(2, 2)
model, optimizer = accelerator.prepare(model, RAdaBeliefW(model.parameters()))
try:
    check(accelerator, optimizer, num_processes=json.loads(sys.argv[2]))
    text = f"nothing wrong in {accelerator.num_processes}"
except RuntimeError as error:
    text = str(error)
with open(sys.argv[1], "a") as file:
    file.write(text + chr(10))
"""


def _launches(script, folder):
    """name -> (command, environment): set-ups that Accelerate starts without a word, but not as asked."""
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return {
        "launch --cpu": ([*launch, "--cpu", "--num_processes", "2", script, f"{folder}/launch --cpu", "null"], {}),
        "torchrun": ([*torchrun, "--master_port", str(free_port()), script, f"{folder}/torchrun", "null"], {}),
        "deepspeed on cpu": (
            [script, f"{folder}/deepspeed on cpu", "null"],
            {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"},
        ),
        "fsdp": (
            [*torchrun, "--master_port", str(free_port()), script, f"{folder}/fsdp", "null"],
            {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"},
        ),
    }


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What `check` says in each of them."""
    folder = tmp_path_factory.mktemp("launched")
    script, said = folder / "script.py", {}
    script.write_text(SCRIPT)
    for name, (words, env) in _launches(str(script), folder).items():
        _, said[name] = python(*words, PYTHONPATH=str(ROOT), **env)
        if (folder / name).exists():
            said[name] = (folder / name).read_text()
    return said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("launch --cpu", "asked for several processes and started ONE"),
        ("torchrun", "started 2 processes, but Accelerate trains in 1"),
        ("torchrun", "set ACCELERATE_USE_CPU=true"),
        ("deepspeed on cpu", "DeepSpeed was requested"),
        ("deepspeed on cpu", "leave out ACCELERATE_USE_CPU"),
        ("fsdp", "FSDP was requested"),
    ],
)
def test_a_set_up_that_silently_runs_otherwise_is_an_error(launched, name, said):
    if name == "torchrun" and "nothing wrong in 2" in launched[name]:
        pytest.skip("this Accelerate (1.7 does so) joins CPU ranks by itself")
    assert said in launched[name], json.dumps(launched[name][-2000:])
