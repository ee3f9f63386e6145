"""Checkpoints at other moments than between two steps that all parameters took part in, under every torch engine."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robust_dist.checkpoint import note_parameters
from robust_dist.engines import fsdp
from robust_dist.optim import param_groups
from tests.engines import course
from tests.engines.torch_engines import Run, same_bits

STEP = 5


class SpareNet(course.Net):
    """With a layer that takes no part until it is asked to."""

    def __init__(self, dtype):
        super().__init__()
        self.spare, self.asked = nn.Linear(3, 3), False
        self.to(dtype)

    def forward(self, x):
        y = super().forward(x)
        return y + self.spare(y) if self.asked else y


class SpareRun(Run):
    def _model(self):
        self.net = SpareNet(self.engine.dtype)
        if self.engine.wrap is DistributedDataParallel:
            return DistributedDataParallel(self.net, find_unused_parameters=True)
        return self.engine.wrap(self.net)

    def go_asking(self, first, last=course.TOTAL):
        """Steps [first, last), all but the first one with the spare layer."""
        self.go(first, first + 1)
        self.net.asked = True
        end = self.go(first + 1, last)
        self.net.asked = False
        return end

    def spare_steps(self):
        return {name: float(state["step"]) for name, (_, state) in self.states().items() if "spare" in name}


def _place(folder, engine, name):
    return Path(folder, f"{engine} on {dist.get_world_size()}, {name}")


def after_an_evaluation(engine, folder, undisturbed):
    """An evaluation before a check, a save or a load changes nothing; groups made after it are those of before."""
    path, run = _place(folder, engine, "evaluated"), Run(engine)
    run.go(0, STEP)
    run.evaluate()
    if not run.engine.one_group:
        made, held = course.groups_of(run.model), run.optimizer.param_groups
        assert [[*map(id, group["params"])] for group in made] == [[*map(id, group["params"])] for group in held]
    run.evaluate()
    fsdp.check(run.model, run.optimizer)
    run.evaluate()
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    assert same_bits(run.go(STEP), undisturbed[engine])
    run.evaluate()
    fsdp.load(path, run.model, run.optimizer, run.schedule)
    run.evaluate()
    if engine == "FSDP2":
        # Only one rank writes, and yet the ranks go on together.
        note_parameters(folder, run.model, run.optimizer)
    assert same_bits(run.go(STEP), undisturbed[engine])


def without_a_gradient(engine, folder):
    """A parameter that was never stepped comes back as that, into a fresh run and into one that has stepped it."""
    path, run = _place(folder, engine, "spare"), SpareRun(engine)
    run.go(0, STEP)
    before = run.spare_steps()
    # FSDP1 gives zeros to what took no part in a unit that did, and steps it.
    assert engine.startswith("FSDP1") or not before
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    end = run.go_asking(STEP)
    for again in (SpareRun(engine), run):
        fsdp.load(path, again.model, again.optimizer, again.schedule)
        assert again.spare_steps() == before
        assert same_bits(again.go_asking(STEP), end)


def _freeze(run, frozen):
    # One flat parameter is frozen whole, or not at all.
    module = run.net if run.engine.one_group else run.net.down
    module.requires_grad_(not frozen)
    for param in run.model.parameters():
        if run.engine.one_group:
            param.requires_grad_(not frozen)


def frozen_at_load(engine, folder):
    """State of parameters that are frozen when it is loaded is there when they are trained again."""
    path, run = _place(folder, engine, "frozen"), SpareRun(engine)
    run.go(0, STEP)
    fsdp.save(path, run.model, run.optimizer, run.schedule)
    end = run.go(STEP)
    fresh = SpareRun(engine)
    _freeze(fresh, True)
    fsdp.load(path, fresh.model, fresh.optimizer, fresh.schedule)
    frozen = [param for param in fresh.model.parameters() if not param.requires_grad]
    assert frozen
    # And once more, by way of a checkpoint that was written while they were frozen.
    fsdp.save(path, fresh.model, fresh.optimizer, fresh.schedule)
    fsdp.load(path, fresh.model, fresh.optimizer, fresh.schedule)
    assert [param for param in fresh.model.parameters() if not param.requires_grad] == frozen
    _freeze(fresh, False)
    assert same_bits(fresh.go(STEP), end)


def with_gradients(engine, folder, undisturbed):
    """Gradients that are there at a save or a load stay, bit for bit, and nothing of the state is lost."""
    for step in (0, STEP):
        path, run = _place(folder, engine, f"gradients at {step}"), Run(engine)
        run.go(0, step)
        _backward(run, step)
        before = run.gradients()
        assert any(grad is not None for grad in before.values())
        fsdp.save(path, run.model, run.optimizer, run.schedule)
        assert _same_gradients(run.gradients(), before)
        fresh = Run(engine)
        _backward(fresh, 0)
        before = fresh.gradients()
        fsdp.load(path, fresh.model, fresh.optimizer, fresh.schedule)
        assert _same_gradients(fresh.gradients(), before)
        assert bool(fresh.optimizer.state) == bool(step)
    for again in (run, fresh):
        again.optimizer.zero_grad()
        assert same_bits(again.go(STEP), undisturbed[engine])


def _backward(run, step):
    run.train_part(*course.part(step, 0, *run.engine.data()), True)


def _same_gradients(found, wanted):
    return found.keys() == wanted.keys() and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(found.values(), wanted.values(), strict=True)
    )


def groups_of_a_part(engine):
    """A part of a model that the root shards gives its shards after an evaluation, and they are trained."""
    run = Run(engine)
    run.go(0, 1)
    run.evaluate()
    part = param_groups(run.model.down, 0.0)
    held = {id(param) for group in run.optimizer.param_groups for param in group["params"]}
    assert {id(param) for group in part for param in group["params"]} <= held
