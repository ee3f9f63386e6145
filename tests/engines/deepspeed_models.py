"""Models whose state dict is more than tensors of fixed shapes: what DeepSpeed loads, our check lets through."""

import operator

import pytest
import torch
from torch import nn

from robust_dist.engines.deepspeed.check_checkpoint import CheckpointMismatchError
from robust_dist.optim import RAdaBeliefW
from tests.engines import deepspeed_course as ds
from tests.engines.course import LR


class History:
    """An object of the user's own class."""

    def __init__(self, *values):
        self.values = values

    def __eq__(self, other):
        return self.values == other.values

    __hash__ = None


class WithExtra(nn.Linear):
    """`extra` is whatever torch's `get_extra_state` may give."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRAS = (None, {"scale": 1.5, "history": [1, 2]}, torch.arange(5), History(3, 4))


def with_extras(trained):
    """One module for each kind of extra state, and a cache that is not saved."""
    net = nn.Sequential(*(WithExtra(4, 4) for _ in EXTRAS), nn.BatchNorm1d(4))
    for module, extra in zip(net, EXTRAS, strict=False):
        # A fresh one has another number of elements.
        module.extra = extra if trained else torch.zeros(9)
    net.register_buffer("cache", torch.ones(7 if trained else 2), persistent=False)
    return net


class Grown(nn.Module):
    """Its buffer takes the size of the saved one, its weight had another name, and `late` is made by the load."""

    def __init__(self, trained):
        super().__init__()
        self.register_buffer("seen", torch.arange(6.0) if trained else torch.empty(0))
        self.register_buffer("late", torch.ones(3) if trained else None)
        self.register_parameter("old" if trained else "weight", nn.Parameter(torch.full((4, 4), 0.5)))
        if not trained:
            self.register_load_state_dict_pre_hook(self._make_room)

    def _make_room(self, module, state, prefix, *_):
        self.seen, self.late = (torch.empty_like(state[prefix + name]) for name in ("seen", "late"))
        state[prefix + "weight"] = state.pop(prefix + "old")


class Widened(nn.Linear):
    """Its `_load_from_state_dict` resizes a buffer."""

    def __init__(self, trained):
        super().__init__(4, 4)
        self.register_buffer("table", torch.arange(8.0) if trained else torch.empty(1))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.table = torch.empty_like(state_dict[prefix + "table"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def with_hooks(trained):
    return nn.Sequential(Grown(trained), nn.Tanh(), Widened(trained))


def engine_of(model, stage, optimizer_of=lambda model: RAdaBeliefW(model.parameters(), lr=LR)):
    return ds.from_client(ds.config(stage), optimizer_of, model)


def saved_and_loaded(make, stage, folder):
    engine, tag = engine_of(make(True), stage), f"{make.__name__}{stage}"
    engine.save_checkpoint(folder, tag=tag)
    other = engine_of(make(False), stage)
    other.load_checkpoint(folder, tag=tag)
    for mine, theirs in zip(ds.whole(other).values(), ds.whole(engine).values(), strict=True):
        assert torch.equal(mine, theirs)
    return other.module


def extra_state_comes_back(stage, folder):
    for module, wanted in zip(saved_and_loaded(with_extras, stage, folder), EXTRAS, strict=False):
        same = torch.equal if isinstance(wanted, torch.Tensor) else operator.eq
        assert same(module.extra, wanted)


def what_load_hooks_make_room_for_comes_back(stage, folder):
    found = saved_and_loaded(with_hooks, stage, folder)
    assert torch.equal(found[0].seen, torch.arange(6.0))
    assert torch.equal(found[0].late, torch.ones(3))
    assert torch.equal(found[2].table, torch.arange(8.0))


def parameters_that_nobody_steps_are_not_asked_for(folder):
    """A body that needs gradients, and an optimizer for the head alone."""
    for tag in (None, "head"):
        body_and_head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        engine = engine_of(body_and_head, 3, lambda model: RAdaBeliefW(model[2].parameters(), lr=LR))
        engine.load_checkpoint(folder, tag=tag) if tag else engine.save_checkpoint(folder, tag="head")


def flat_partitions_of_other_shapes_are_refused_whatever_the_hooks(folder):
    """Stage 3 loads them unseen."""
    other = engine_of(nn.Sequential(Grown(False), nn.Tanh(), nn.Linear(4, 5)), 3)
    with pytest.raises(CheckpointMismatchError, match="of another model: it has parameter number 1"):
        other.load_checkpoint(folder, tag="with_hooks3")


def checkpoints_of_models_with_state_of_their_own(folder):
    for stage in (0, 2, 3):
        extra_state_comes_back(stage, folder)
    for stage in (1, 3):
        what_load_hooks_make_room_for_comes_back(stage, folder)
    parameters_that_nobody_steps_are_not_asked_for(folder)
    flat_partitions_of_other_shapes_are_refused_whatever_the_hooks(folder)
