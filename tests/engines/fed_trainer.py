"""What the ranks of test_fed_trainer.py run: Trainers whose optimizer averages its weights and measures its rate."""

import math
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from robust_dist.engines.transformers import RobustTrainerCallback
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import WeightDecaySwitch, base_optimizer
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.toys import LR, batch, groups_of
from tests.engines.trainer_ranks import (
    TOTAL,
    Classifier,
    Rows,
    deepspeed,
    forget_accelerate,
    fsdp,
    full_parameters,
    make_trainer,
)

SETTINGS = {"betas": (0.9, 0.9), "rate_guard": 1.0, "averaging": "schedule_free"}
CLIP, EVERY, SMOOTHING = 0.05, 3, 0.2


class Measuring(RAdaBeliefW):
    def __init__(self, parameters, **settings):
        super().__init__(parameters, **SETTINGS, **settings)


def reference(smoothing=0.0):
    """Without a Trainer: the rates; every `EVERY` steps and at the end the loss and the weights of the average."""
    model = Classifier()
    optimizer = RAdaBeliefW(groups_of(model.body), lr=LR, **SETTINGS)
    switch = WeightDecaySwitch(optimizer, TOTAL)
    targets = [1 - smoothing + smoothing / 3] + [smoothing / 3] * 2
    entropy = -sum(p * math.log(p) for p in targets) if smoothing else 0.0
    rates, averages = [], {}
    for step in range(TOTAL):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model.body(images), labels, label_smoothing=smoothing)
        loss.backward()
        optimizer.observe(loss - entropy)
        optimizer.observe_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        switch.step()
        rates.append(optimizer.measured_rate)
        if (step + 1) % EVERY == 0 or step + 1 == TOTAL:
            optimizer.eval()
            averages[step + 1] = mean_loss(model.body, smoothing), weights_of(model)
            optimizer.train()
    return rates, averages


def mean_loss(body, smoothing):
    rows = Rows()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(body(rows.images), rows.labels, label_smoothing=smoothing))


def weights_of(model):
    return [parameter.detach().clone() for _, parameter in sorted(model.named_parameters())]


def started(folder, engine=dict, **more):
    from transformers import TrainerCallback

    class Rates(TrainerCallback):
        def __init__(self):
            self.found = []

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.found.append(base_optimizer(optimizer).measured_rate)

    forget_accelerate()
    settings = {"schedule": "constant", "max_grad_norm": CLIP, "save_steps": EVERY, "cls": Measuring} | more | engine()
    trainer, _ = make_trainer(folder, RobustTrainerCallback(), **settings)
    rates = Rates()
    trainer.add_callback(rates)
    return trainer, rates.found


def trained(folder, engine=dict, **more):
    """The rates, evaluations and last weights of a run, which are its resume's, too."""
    trainer, rates = started(folder, engine, eval_strategy="steps", eval_steps=EVERY, **more)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    end = full_parameters(trainer)
    # Several ranks on CPUs before Accelerate 1.13: Trainer loads to this device, which torch.load does not know.
    if trainer.args.device == torch.device("cpu:0"):
        return rates, losses, end
    again, their_rates = started(folder, engine, eval_strategy="steps", eval_steps=EVERY, **more)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{EVERY}")
    assert their_rates == rates[EVERY:]
    assert all(map(torch.equal, full_parameters(again), end))
    return rates, losses, end


def saved_without_evaluation(folder):
    """What a checkpoint holds that nothing was evaluated for, and what the model holds at the end."""
    trainer, rates = started(folder)
    trainer.train()
    saved = load_file(Path(folder, f"checkpoint-{EVERY}", "model.safetensors"))
    return rates, [saved[name] for name in sorted(saved)], full_parameters(trainer)


def best(folder):
    """The model at the end, and the best checkpoint's weights, which are not the last ones."""
    more = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer, _ = started(folder, eval_strategy="steps", eval_steps=EVERY, **more)
    trainer.train()
    saved = load_file(Path(trainer.state.best_model_checkpoint, "model.safetensors"))
    return trainer.state.best_model_checkpoint, full_parameters(trainer), [saved[name] for name in sorted(saved)]


def everything(folder):
    found = {"plain": trained(f"{folder}/plain"), "accumulated": trained(f"{folder}/accumulated", accumulation=2)}
    saved, best_one = saved_without_evaluation(f"{folder}/saved"), best(f"{folder}/best")
    # Trainer asks for it where it smooths labels.
    Classifier.config = SimpleNamespace(problem_type=None)
    smoothed = trained(f"{folder}/smoothed", label_smoothing_factor=SMOOTHING)
    return found, smoothed, saved, best_one


def under_fsdp2(folder):
    from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

    pretend_fsdp_runs_on_cpus()
    return trained(folder, lambda: fsdp(2))


def under_zero(folder):
    get_ready()
    import robust_dist.autoregister  # noqa: F401

    found = {stage: trained(f"{folder}/{stage}", lambda stage=stage: deepspeed(stage)) for stage in (2, 3)}
    return found | {"accumulated": trained(f"{folder}/accumulated", lambda: deepspeed(2), accumulation=2)}
