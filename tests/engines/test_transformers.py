import contextlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import robust_dist.engines
from robust_dist.engines.accelerate import EngineError
from robust_dist.engines.transformers import RobustTrainerCallback
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, WeightDecaySwitch
from tests.engines import trainer_ranks
from tests.engines.toys import DECAY, batch
from tests.engines.trainer_ranks import TOTAL, Rows, check_steps, make_trainer, without_schedule
from tests.ranks import run_ranks
from tests.versions import needs_torch_2_7

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@contextlib.contextmanager
def fresh_environment():
    before = dict(os.environ)
    try:
        yield
    finally:
        trainer_ranks.forget_accelerate()
        # Trainer writes its settings into the environment, too.
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    with fresh_environment():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's runs: their folder, and the whole parameters of each."""
    folder = tmp_path_factory.mktemp("alone")
    with fresh_environment():
        return folder, trainer_ranks.under_ddp(str(folder))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, alone):
    """The same of two ranks, under every engine."""
    folder = tmp_path_factory.mktemp("two")
    results = run_ranks(trainer_ranks.under_every_engine, 2, str(folder), str(alone[0]), timeout=300.0)
    return folder, results


def assert_reference(parameters):
    for mine, wanted in zip(parameters, trainer_ranks.reference(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


ROWS = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"} | {f"zero{stage}": f"ZeRO {stage}" for stage in (1, 2, 3)}


CONVERTED = [*(f"{name}, converted" for name in ROWS), "fsdp2, converted, sharded"]


def in_columns(names, *columns):
    """Parameters with their cells; what has another name ran under DDP."""
    rows = {name: f"Trainer, {ROWS.get(name.split(',')[0], 'DDP')}" for name in names}
    return [
        pytest.param(name, marks=[pytest.mark.cell(row, column, "2") for column in columns])
        for name, row in rows.items()
    ]


@needs_torch_2_7
@pytest.mark.parametrize(
    "name",
    [
        # torch's FSDP1 on CPUs saves one state under every name: it resumes with other parameters.
        *in_columns(["fsdp1"], "trajectory"),
        *in_columns(
            ["plain", "accumulated", "schedule", "optimizer", "fsdp2", "zero2", "zero3"], "trajectory", "resume"
        ),
    ],
)
def test_trainer_and_its_resumes_have_the_decays_rates_and_parameters_of_a_plain_loop(two_ranks, name):
    for found in two_ranks[1]:
        assert_reference(found[name])


@pytest.mark.parametrize("name", ["plain", "accumulated", "schedule", "optimizer"])
@pytest.mark.cell("Trainer, one process", "trajectory", "1")
@pytest.mark.cell("Trainer, one process", "resume", "1")
def test_on_one_process_too(alone, name):
    assert_reference(alone[1][name])


@needs_torch_2_7
@pytest.mark.parametrize("name", in_columns(CONVERTED, "convert in"))
@pytest.mark.cell("Trainer, one process", "convert out", "1")
def test_trainer_goes_on_from_one_processs_checkpoint_under_every_engine_at_two_ranks(two_ranks, name):
    for found in two_ranks[1]:
        assert_reference(found[name])


@needs_torch_2_7
@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(name, source, marks=pytest.mark.cell(f"Trainer, {ROWS[name]}", "convert out", "2"))
        for name, source in (("ddp", "ddp/plain"), ("fsdp2", "fsdp/2"), ("zero2", "ds/2"), ("zero3", "ds/3"))
    ],
)
@pytest.mark.cell("Trainer, one process", "convert in", "1")
def test_trainer_goes_on_in_one_process_from_what_two_ranks_of_every_engine_saved(two_ranks, name, source, tmp_path):
    assert_reference(trainer_ranks.go_on(tmp_path, f"{two_ranks[0]}/{source}/checkpoint-2", "ddp"))


def saved_at(step, folder, callback=RobustTrainerCallback):
    trainer, _ = make_trainer(folder, callback and callback(), save_steps=step)
    trainer.train()
    trainer_ranks.forget_accelerate()
    return Path(folder, f"checkpoint-{step}")


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_has_the_decay_of_its_step_whatever_the_checkpoints_groups_hold(step, tmp_path):
    checkpoint = saved_at(step, tmp_path)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["weight_decay"] = group["initial_weight_decay"] = 7.0
    torch.save(state, checkpoint / "optimizer.pt")
    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_steps(notes, step, TOTAL)


def test_a_checkpoint_from_a_run_without_the_callback_can_be_resumed_and_saved_with_it(tmp_path):
    checkpoint = saved_at(2, tmp_path, callback=None)
    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), save_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_steps(notes, 2, TOTAL)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["RobustTrainerCallback"]["attributes"]["switch_state"]
    assert (saved["step"], saved["switch_step"], saved["base_weight_decay"]) == (6, 6, [DECAY, 0.0])


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_resumed_run_that_is_longer_switches_by_its_own_length_and_says_so(tmp_path):
    checkpoint = saved_at(2, tmp_path)
    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), save_strategy="no", max_steps=12)
    with pytest.warns(UserWarning, match="written with total_steps=8, this run has total_steps=12"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [notes.steps[step][0][0] for step in range(2, 12)] == [DECAY] * 7 + [0.0] * 3


def test_trainers_own_restoring_of_callbacks_brings_back_the_share_that_was_saved(tmp_path):
    checkpoint = saved_at(2, tmp_path, callback=lambda: RobustTrainerCallback(0.5))
    settings = {"save_strategy": "no", "restore_callback_states_from_checkpoint": True}
    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [notes.steps[step][0][0] for step in range(2, TOTAL)] == [DECAY] * 2 + [0.0] * 4


def test_training_again_starts_with_the_decay_that_the_first_run_switched_off(tmp_path):
    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), save_strategy="no")
    for _ in range(2):
        trainer.train()
        assert [notes.steps[step][0] for step in (0, 5, 6)] == [[DECAY, 0.0], [DECAY, 0.0], [0.0, 0.0]]


def test_any_optimizer_is_allowed_where_it_is_asked_for(tmp_path):
    trainer, notes = make_trainer(
        tmp_path, RobustTrainerCallback(any_optimizer=True), cls=torch.optim.AdamW, save_strategy="no"
    )
    trainer.train()
    check_steps(notes, 0, TOTAL)


def error_of(folder, callback, error, **settings):
    trainer, _ = make_trainer(folder, callback, save_strategy="no", **settings)
    with pytest.raises(error) as raised:
        trainer.train()
    return str(raised.value)


def test_another_optimizer_is_an_error_that_says_how_to_hand_ours_over(tmp_path):
    text = error_of(tmp_path, RobustTrainerCallback(), EngineError, cls=torch.optim.AdamW)
    assert "torch.optim.adamw.AdamW, not RAdaBeliefW" in text
    assert "optimizer_cls_and_kwargs=(RAdaBeliefW" in text
    assert "any_optimizer=True" in text


def test_an_optimizer_without_decay_is_an_error(tmp_path):
    def without_decay(model):
        optimizer = torch.optim.Rprop(model.parameters())
        assert "weight_decay" not in optimizer.param_groups[0]
        return optimizer, None

    text = error_of(tmp_path, RobustTrainerCallback(any_optimizer=True), ValueError, cls=None, optimizer=without_decay)
    assert "no param group of Rprop has a weight_decay" in text


def test_a_second_switch_is_an_error_that_says_what_to_drop(tmp_path):
    settings = {"cls": None, "optimizer": trainer_ranks.with_schedule}
    text = error_of(tmp_path, RobustTrainerCallback(), ValueError, **settings)
    assert "drop RobustTrainerCallback, or make the schedule with weight_decay_off_at=None" in text


def test_a_schedule_that_leaves_the_decay_alone_goes_with_the_callback(tmp_path):
    def make(model):
        optimizer, _ = without_schedule(model)
        return optimizer, RobustSchedule(optimizer, TOTAL, weight_decay_off_at=None)

    trainer, notes = make_trainer(tmp_path, RobustTrainerCallback(), cls=None, optimizer=make, save_strategy="no")
    trainer.train()
    check_steps(notes, 0, TOTAL)
    assert isinstance(trainer.callback_handler.callbacks[-2].switch, WeightDecaySwitch)


def test_an_unknown_number_of_steps_is_an_error():
    from transformers import TrainerControl, TrainerState, TrainingArguments

    optimizer = RAdaBeliefW(nn.Linear(2, 2).parameters())
    arguments = TrainingArguments(use_cpu=True)
    with pytest.raises(ValueError, match="max_steps=0: the switch needs"):
        RobustTrainerCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), optimizer=optimizer)


@pytest.mark.filterwarnings("always::UserWarning")
def test_no_decay_at_all_is_a_warning_that_names_trainers_default(tmp_path):
    trainer, _ = make_trainer(tmp_path, RobustTrainerCallback(), save_strategy="no", weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"nothing to switch off.*TrainingArguments\(weight_decay"):
        trainer.train()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_and_1_is_an_error(share):
    with pytest.raises(ValueError, match="weight_decay_off_at="):
        RobustTrainerCallback(share)


def examples():
    text = Path(robust_dist.engines.__file__).with_name("examples.md").read_text()
    return re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


class StandIn(nn.Module):
    """What the example uses of `pytorch_lightning.LightningModule`, where that is not installed."""

    trainer = SimpleNamespace(estimated_stepping_batches=TOTAL)


def fit(module, loader):
    """What Lightning makes of `configure_optimizers`: schedules of interval "step" follow each optimizer step."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert schedule.pop("interval") == "step"
    for rows in loader:
        module.training_step(rows, 0).backward()
        optimizer.step()
        schedule["scheduler"].step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("title", "code"), examples(), ids=[title for title, _ in examples()])
def test_an_example_of_the_docs_runs_and_ends_with_its_decay_off(title, code, tmp_path, monkeypatch):
    names = {
        "output_dir": tmp_path / "run",
        "path": tmp_path / "fabric",
        "model": trainer_ranks.Classifier() if title == "Transformers" else trainer_ranks.build_model(),
        "dataset": Rows(),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(0, 64)), 8),
        "total_steps": TOTAL,
        "criterion": nn.functional.cross_entropy,
    }
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(LightningModule=StandIn))
    exec(code, names)
    if title == "Lightning":
        names["optimizer"] = fit(names["Classifier"](names["model"], names["criterion"]), names["loader"])
    optimizer = names["trainer"].optimizer if title == "Transformers" else names["optimizer"]
    assert all(group["weight_decay"] == 0.0 for group in optimizer.param_groups)
    assert {group["initial_weight_decay"] for group in optimizer.param_groups} <= {0.0, 1e-2}
    assert not any(torch.equal(a, b.cpu()) for a, b in zip(before, names["model"].parameters(), strict=True))


def test_the_docs_have_an_example_for_each_of_the_four():
    assert [title for title, _ in examples()] == ["Transformers", "Lightning", "Lightning Fabric", "timm"]
