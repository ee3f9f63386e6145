"""What the ranks of test_fed.py run: ordinary loops under Accelerate, whose optimizer measures its rate."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.engines.accelerate import check
from robust_dist.engines.rate import feed
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import base_optimizer
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.toys import batch, build_model
from tests.engines.trainer_ranks import forget_accelerate

SETTINGS = {"betas": (0.9, 0.9), "rate_guard": 1.0, "averaging": "schedule_free"}
STEPS, SIZE, CLIP, EVALUATED_AT = 8, 12, 0.05, 4


def global_batch(step):
    images, labels = batch(step, SIZE)
    return images.double(), labels


def outputs_of(model, optimizer):
    optimizer.eval()
    with torch.no_grad():
        outputs = model(global_batch(0)[0].to(next(model.parameters()).dtype)).double()
    optimizer.train()
    return outputs


def reference(entropy=0.0):
    """One process without an engine: the rates, what the average gives, and the weights at the end."""
    model = build_model().double()
    optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
    rates = []
    for step in range(STEPS):
        if step == EVALUATED_AT:
            outputs_of(model, optimizer)
        images, labels = global_batch(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.observe(loss - entropy)
        optimizer.observe_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(optimizer.measured_rate)
    return rates, outputs_of(model, optimizer), weights_of(model)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def started(accumulation=1):
    from accelerate import Accelerator

    forget_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = build_model().double()
    model, optimizer = accelerator.prepare(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    check(accelerator, optimizer)
    check(accelerator, optimizer)
    return accelerator, model, optimizer


def micro_batches(step, parts):
    rank, world = dist.get_rank(), dist.get_world_size()
    images, labels = global_batch(step)
    return zip(images.chunk(world)[rank].chunk(parts), labels.chunk(world)[rank].chunk(parts), strict=True)


def run(accelerator, model, optimizer, first=0, last=STEPS, before=None, after=None, clip=True):
    """An ordinary loop; `before` gets each loss, and `after` is called before the gradients are clipped."""
    rates = []
    for step in range(first, last):
        if step == EVALUATED_AT:
            outputs_of(model, optimizer)
        for images, labels in micro_batches(step, accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels)
                if before is not None:
                    before(loss)
                accelerator.backward(loss)
                if after is not None:
                    after()
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        rates.append(base_optimizer(optimizer).measured_rate)
    return rates


def by_itself(accumulation):
    accelerator, model, optimizer = started(accumulation)
    return run(accelerator, model, optimizer), outputs_of(model, optimizer)


def with_its_own_losses(entropy):
    """The program's own observations count, before and after `backward`, and the engine's do not."""
    found = []
    for late in (False, True):
        accelerator, model, optimizer = started(2)
        base, last = base_optimizer(optimizer), []

        def before(loss, late=late, base=base, last=last):
            last[:] = [loss]
            if not late:
                base.observe(loss.detach() - entropy)

        def after(late=late, base=base, last=last):
            if late:
                base.observe(last[0].detach() - entropy)

        found.append((run(accelerator, model, optimizer, before=before, after=after), outputs_of(model, optimizer)))
    return found


def with_its_own_gradients():
    """The program unscales, which observes, and observes by itself, too: they count once."""
    accelerator, model, optimizer = started()

    def after():
        accelerator.unscale_gradients()
        base_optimizer(optimizer).observe_gradients()

    return run(accelerator, model, optimizer, after=after), outputs_of(model, optimizer)


def with_a_step_left_out():
    """Gradients that are dropped leave nothing of themselves in the next step's rate."""
    accelerator, model, optimizer = started()
    rates = []
    for step in range(STEPS):
        for images, labels in micro_batches(step, 1):
            accelerator.backward(7 * nn.functional.cross_entropy(model(images), labels))
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.zero_grad()
        rates += run(accelerator, model, optimizer, step, step + 1)
    return rates, outputs_of(model, optimizer)


def check_several_optimizers():
    """A loss does not tell whose it is, so that the step says what to call."""
    accelerator, model, optimizer = started()
    other = build_model().double()
    accelerator.prepare(other, RAdaBeliefW(other.parameters()))
    with pytest.raises(RuntimeError, match=r"rate_guard=1.0 needs the loss of every step: call optimizer.observe"):
        run(accelerator, model, optimizer)


def check_going_on(folder):
    """A run that is saved while it is evaluated goes on bit for bit."""
    accelerator, model, optimizer = started()
    run(accelerator, model, optimizer, last=3)
    optimizer.eval()
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    optimizer.train()
    rates = run(accelerator, model, optimizer, 3)
    accelerator, twin, optimizer = started()
    accelerator.load_state(folder)
    assert base_optimizer(optimizer).param_groups[0]["train_mode"] is False
    optimizer.train()
    assert run(accelerator, twin, optimizer, 3) == rates
    assert all(map(torch.equal, weights_of(model), weights_of(twin)))


def scaled(clip, overflows):
    """As under fp16, whose scaler Accelerate makes on GPUs alone; steps overflow and are left out."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = build_model().double()
    optimizer = AcceleratedOptimizer(RAdaBeliefW(model.parameters(), **SETTINGS), scaler=accelerator.scaler)
    model = nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    feed(accelerator)
    rates, spoilt = [], iter(overflows)
    at = next(spoilt, None)
    for step in range(STEPS):
        if step == at:
            (images, labels), at = next(micro_batches(step, 1)), next(spoilt, None)
            held = copy.deepcopy(optimizer.state_dict()), weights_of(model)
            accelerator.backward(nn.functional.cross_entropy(model(images), labels) * torch.inf)
            if clip:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            assert optimizer.state_dict()["param_groups"] == held[0]["param_groups"]
            found = optimizer.state_dict()["state"], weights_of(model)
            torch.testing.assert_close(found, (held[0]["state"], held[1]), rtol=0, atol=0)
            optimizer.zero_grad()
        rates += run(accelerator, model, optimizer, step, step + 1, clip=clip)
    return rates, outputs_of(model, optimizer), weights_of(model)


def check_scaled():
    """Unscaled gradients count, and overflows touch nothing: the weights are those of a run without them."""
    for clip in (True, False):
        rates, _, weights = scaled(clip, [])
        again, _, their_weights = scaled(clip, [0, 3, 5])
        assert rates == pytest.approx(again, rel=1e-12)
        torch.testing.assert_close(weights, their_weights, rtol=1e-12, atol=1e-15)
    return scaled(True, [2])[:2]


def under_accelerate(folder):
    check_several_optimizers()
    # DDP regroups gradients after its first step, and of three ranks' sums the order depends on that.
    if dist.get_world_size() < 3:
        check_going_on(folder)
    found = {f"{parts} micro-batches": by_itself(parts) for parts in (1, 2)}
    found |= {"own gradients": with_its_own_gradients(), "left out": with_a_step_left_out(), "scaled": check_scaled()}
    return found, with_its_own_losses(0.125)


def under_fsdp():
    """The same loop under Accelerate's FSDP1, which clips no float64, and FSDP2."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

    pretend_fsdp_runs_on_cpus()
    found = {}
    for version in (1, 2):
        forget_accelerate()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        more = {"use_orig_params": True} if version == 1 else {}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **more)
        accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
        model = build_model().to(torch.float32 if version == 1 else torch.float64)
        model, optimizer = accelerator.prepare(model, RAdaBeliefW(model.parameters(), **SETTINGS))
        check(accelerator, optimizer)
        found[f"fsdp{version}"] = run(accelerator, model, optimizer), outputs_of(model, optimizer)
    return found


def under_zero():
    """The same loop under Accelerate's DeepSpeed, which steps and clips inside `backward`."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    get_ready()
    import robust_dist.autoregister  # noqa: F401

    found = {}
    for stage in (1, 3):
        forget_accelerate()
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=CLIP)
        kwargs = [InitProcessGroupKwargs(backend="gloo")]
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=kwargs)
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
        model = build_model()
        model, optimizer = accelerator.prepare(model, RAdaBeliefW(model.parameters(), **SETTINGS))
        check(accelerator, optimizer)
        found[f"ZeRO {stage}"] = run(accelerator, model, optimizer), outputs_of(model, optimizer)
    return found
