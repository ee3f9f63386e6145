"""What the ranks of test_transformers.py run: a Trainer under every engine, with every optimizer step noted."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from robust_dist.checkpoint import convert
from robust_dist.engines.accelerate import EngineError
from robust_dist.engines.transformers import RobustTrainerCallback
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, base_optimizer
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.toys import DECAY, LR, batch, build_model, groups_of, same, used, wanted

TOTAL = 8


class Rows(Dataset):
    """The global batches of `TOTAL` steps, in order; rank r of w is handed rows r, r + w, ... of each."""

    def __init__(self):
        batches = [batch(step) for step in range(TOTAL)]
        self.images = torch.cat([images for images, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"x": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = build_model()

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def forget_accelerate():
    """One process plays many programs."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_USE", "FSDP_")):
            del os.environ[name]


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def make_trainer(folder, callback, accumulation=1, schedule="cosine", optimizer=None, cls=RAdaBeliefW, **more):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Notes(TrainerCallback):
        """(decays, rates) of each step, as its first batch comes: under DeepSpeed `backward` makes the update."""

        def __init__(self):
            self.steps = {}

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            self.steps[state.global_step] = used(base_optimizer(optimizer))

    settings = {
        "use_cpu": True,
        "ddp_backend": "gloo" if world() > 1 else None,
        "max_grad_norm": 1e9,
        "dataloader_pin_memory": False,
    } | more
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8 // world() // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=settings.pop("max_steps", TOTAL),
        learning_rate=LR,
        weight_decay=settings.pop("weight_decay", DECAY),
        lr_scheduler_type=schedule,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        average_tokens_across_devices=False,
        **settings,
    )
    model = Classifier()
    source = {} if cls is None else {"optimizer_cls_and_kwargs": (cls, {"lr": LR})}
    if optimizer is not None:
        source = {"optimizers": optimizer(model)}
    notes = Notes()
    callbacks = [notes] if callback is None else [callback, notes]
    trainer = InOrder(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks, **source)
    trainer.remove_callback(PrinterCallback)
    return trainer, notes


def with_schedule(model):
    """A client's optimizer and RobustSchedule, which has the switch in it."""
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    return optimizer, RobustSchedule(optimizer, TOTAL)


def check_steps(notes, first, last, total=TOTAL, groups=2):
    assert sorted(notes.steps) == list(range(first, last)), sorted(notes.steps)
    for step, seen in notes.steps.items():
        decays, rates = wanted(step, total)
        assert same(seen, (decays[:groups], rates[:groups])), (step, seen, decays, rates)


def full_parameters(trainer):
    """Whole parameters on every rank, by name."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        named = sorted(trainer.model.named_parameters())
        return [safe_get_full_fp32_param(parameter).clone() for _, parameter in named]
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    return [state[name].detach().clone() for name in sorted(state)]


def reference():
    """The same parameters without a Trainer."""
    model = Classifier()
    optimizer, schedule = with_schedule(model.body)
    for step in range(TOTAL):
        model(*batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [parameter.detach() for _, parameter in sorted(model.named_parameters())]


def check_run_and_resumes(folder, settings=dict, groups=2, exact=True):
    """A whole run, then its resumes from before and after the switch; the whole run's parameters."""
    forget_accelerate()
    trainer, notes = make_trainer(folder, RobustTrainerCallback(), save_steps=2, **settings())
    trainer.train()
    check_steps(notes, 0, TOTAL, groups=groups)
    parameters = full_parameters(trainer)
    for saved_at in (2, 6):
        forget_accelerate()
        trainer, notes = make_trainer(folder, RobustTrainerCallback(), save_steps=2, **settings())
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{saved_at}")
        check_steps(notes, saved_at, TOTAL, groups=groups)
        for mine, theirs in zip(full_parameters(trainer), parameters, strict=True) if exact else ():
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
    return parameters


def go_on(folder, source, to, settings=dict, full=False):
    """Convert another world's or engine's checkpoint for this one, and go on from it to the end, as a user does."""
    step = int(source.rpartition("-")[2])
    run = f"{folder}/to {to}{', full' * full}"
    if rank() == 0:
        convert(source, f"{run}/checkpoint-{step}", to, world(), full_state_dict=full)
    if world() > 1:
        dist.barrier()
    forget_accelerate()
    trainer, notes = make_trainer(run, RobustTrainerCallback(), save_strategy="no", **settings())
    trainer.train(resume_from_checkpoint=True)
    check_steps(notes, step, TOTAL)
    return full_parameters(trainer)


def check_client_objects(folder, callback, make):
    """`optimizers=(...)`: a RobustSchedule with its own switch, or Trainer's cosine and the callback."""
    for saved_at in (None, 2, 6):
        forget_accelerate()
        trainer, notes = make_trainer(folder, callback and callback(), optimizer=make, cls=None, save_steps=2)
        trainer.train(resume_from_checkpoint=saved_at and f"{folder}/checkpoint-{saved_at}")
        check_steps(notes, saved_at or 0, TOTAL)
    return full_parameters(trainer)


def without_schedule(model):
    return RAdaBeliefW(groups_of(model), lr=LR), None


def under_ddp(folder):
    return {
        "plain": check_run_and_resumes(f"{folder}/plain"),
        "accumulated": check_run_and_resumes(f"{folder}/accumulated", lambda: {"accumulation": 2}),
        "schedule": check_client_objects(f"{folder}/schedule", None, with_schedule),
        "optimizer": check_client_objects(f"{folder}/optimizer", RobustTrainerCallback, without_schedule),
    }


def fsdp(version, **more):
    config = {"version": version, "reshard_after_forward": version == 2 or "full_shard", **more}
    return {"use_cpu": False, "fsdp": True, "fsdp_config": config}


def under_fsdp(folder):
    from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

    pretend_fsdp_runs_on_cpus()
    # On CPUs torch's FSDP1 saves the last state's values under every name (AdamW's, too): exp_avg is exp_avg_sq.
    return {
        "fsdp1": check_run_and_resumes(f"{folder}/1", lambda: fsdp(1, use_orig_params=True), exact=False),
        "fsdp2": check_run_and_resumes(f"{folder}/2", lambda: fsdp(2)),
    }


def json_for(stage, scheduler=None):
    """What a team has, full of "auto"; the two types are ours."""
    config = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 10**9,
    }
    if scheduler is not None:
        auto = {"lr": "auto", "betas": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "RAdaBeliefW", "params": auto}
        config["scheduler"] = {"type": "RobustSchedule", "params": dict.fromkeys(scheduler, "auto")}
    return config


def deepspeed(*arguments):
    """Settings of a Trainer under DeepSpeed; its own set-up knows no gloo, so the state is made before it."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    config = {"use_configured_state": True}
    return {"use_cpu": False, "deepspeed": json_for(*arguments), "accelerator_config": config}


def check_by_name(folder, stage):
    """One group, for Trainer hands DeepSpeed the bare parameters; RobustSchedule has the switch, with no callback."""
    auto = ("warmup_max_lr", "total_num_steps")
    for saved_at in (None, 2, 6):
        forget_accelerate()
        trainer, notes = make_trainer(folder, None, cls=None, save_steps=2, **deepspeed(stage, auto))
        trainer.train(resume_from_checkpoint=saved_at and f"{folder}/checkpoint-{saved_at}")
        check_steps(notes, saved_at or 0, TOTAL, groups=1)
        assert type(base_optimizer(trainer.optimizer)) is RAdaBeliefW
    forget_accelerate()
    everything = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    trainer, notes = make_trainer(folder, None, cls=None, save_strategy="no", **deepspeed(stage, everything))
    trainer.train()
    assert [notes.steps[step][0] for step in range(TOTAL)] == [wanted(step, TOTAL)[0][:1] for step in range(TOTAL)]


def check_by_name_with_callback(folder):
    """Two switches are an error that says what to drop."""
    forget_accelerate()
    settings = deepspeed(2, ("warmup_max_lr", "total_num_steps"))
    trainer, _ = make_trainer(folder, RobustTrainerCallback(), cls=None, save_strategy="no", **settings)
    with pytest.raises(ValueError, match="drop RobustTrainerCallback, or make the schedule with weight_decay_off_at"):
        trainer.train()


def check_dropped_optimizer(folder):
    """Under DeepSpeed Trainer drops `optimizers=` and trains with its default."""
    forget_accelerate()
    trainer, _ = make_trainer(
        folder, RobustTrainerCallback(), cls=None, optimizer=without_schedule, save_strategy="no", **deepspeed(2)
    )
    with pytest.raises(EngineError, match=r"AdamW, not RAdaBeliefW.*optimizer_cls_and_kwargs"):
        trainer.train()


def under_deepspeed(folder):
    get_ready()
    import robust_dist.autoregister  # noqa: F401

    check_by_name_with_callback(folder)
    check_dropped_optimizer(folder)
    check_by_name(f"{folder}/named", 2)
    return {
        f"zero{stage}": check_run_and_resumes(f"{folder}/{stage}", lambda s=stage: deepspeed(s)) for stage in (2, 3)
    }


def under_every_engine(folder, alone):
    """Whole runs and their resumes, and what goes on from the checkpoints of one process at `alone`."""
    found = under_ddp(f"{folder}/ddp") | under_deepspeed(f"{folder}/ds")
    before, after = f"{alone}/plain/checkpoint-2", f"{alone}/plain/checkpoint-6"
    found["ddp, converted"] = go_on(f"{folder}/ddp", before, "ddp")
    for stage in (1, 2, 3):
        source = after if stage == 2 else before
        found[f"zero{stage}, converted"] = go_on(f"{folder}/ds", source, f"zero{stage}", lambda s=stage: deepspeed(s))
    found |= under_fsdp(f"{folder}/fsdp")
    for version, more in ((1, {"use_orig_params": True}), (2, {})):
        settings = lambda v=version, m=more: fsdp(v, **m)  # noqa: E731
        found[f"fsdp{version}, converted"] = go_on(f"{folder}/fsdp/{version}", before, "fsdp", settings, full=True)
    sharded = {"state_dict_type": "SHARDED_STATE_DICT"}
    found["fsdp2, converted, sharded"] = go_on(f"{folder}/fsdp", after, "fsdp", lambda: fsdp(2, **sharded))
    return found
