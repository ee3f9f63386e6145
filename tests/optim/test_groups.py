"""Which parameters decay."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robust_dist.optim import RAdaBeliefW, param_groups
from robust_dist.optim.groups import clean_name


class RMSNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Normalizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 4)
        self.rms, self.normalizer = RMSNormByHand(), Normalizer()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.head = nn.Linear(4, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.head


def _names(model, groups):
    names = {id(p): n for n, p in model.named_parameters()}
    return [sorted(names[id(p)] for p in g["params"]) for g in groups]


DECAYING = ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight", "normalizer.matrix", "pos_embed"]


def test_biases_and_normalisation_do_not_decay_and_frozen_parameters_are_left_out():
    model = Net()
    groups = param_groups(model, 0.1)
    decaying, others = _names(model, groups)
    assert decaying == sorted([*DECAYING, "rnn.weight_hh_l0", "rnn.weight_ih_l0", "stem.0.weight"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {"stem.1.weight", "stem.2.bias", "rms.scale", "attention.in_proj_bias", "rnn.bias_hh_l0"} < set(others)
    assert not any("frozen" in n for n in decaying + others)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == len(trainable)
    RAdaBeliefW(groups)


@pytest.mark.parametrize(
    ("pattern", "moved"),
    [
        ("pos_embed", ["pos_embed"]),
        ("head", ["head.weight"]),
        ("normalizer.matrix", ["normalizer.matrix"]),
        ("pos_*", ["pos_embed"]),
        ("rnn.weight_?h_l0", ["rnn.weight_hh_l0", "rnn.weight_ih_l0"]),
    ],
)
def test_own_patterns_match_a_component_or_a_full_name(pattern, moved):
    model = Net()
    before = _names(model, param_groups(model, 0.1))[0]
    after = _names(model, param_groups(model, 0.1, no_decay=("bias", "norm", pattern)))[0]
    assert sorted(set(before) - set(after)) == moved


def test_no_group_is_empty():
    assert [g["weight_decay"] for g in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in param_groups(nn.BatchNorm2d(2), 0.1)] == [0.0]
    assert len(param_groups(Net(), 0.1, no_decay=())) == 1


def test_a_wrapped_model_is_split_as_the_bare_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    patterns = ("bias", "norm", "2.weight")
    bare = param_groups(model, 0.1, no_decay=patterns)
    for wrapped in wrappers(model):
        found = param_groups(wrapped, 0.1, no_decay=patterns)
        assert [[id(p) for p in g["params"]] for g in bare] == [[id(p) for p in g["params"]] for g in found]


def wrappers(model):
    """The model in all that can wrap it without other processes, and in several at once."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    alone = [nn.DataParallel, torch.compile, checkpoint_wrapper]
    for wrap in alone:
        yield wrap(model)
    yield nn.DataParallel(torch.compile(checkpoint_wrapper(model)))
    yield torch.compile(nn.DataParallel(checkpoint_wrapper(model)))


class Module(nn.Module):
    """A user's own: a parameter, and a child called `module` with one of the same name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.module = nn.Linear(2, 2, bias=False)


def test_clean_names_lose_what_a_wrapper_has_added_and_nothing_else():
    for model in (Module(), nn.Sequential(Module(), nn.Module())):
        own = [name for name, _ in model.named_parameters()]
        assert [clean_name(name, model) for name in own] == own
        for wrapped in wrappers(model):
            assert [clean_name(name, wrapped) for name, _ in wrapped.named_parameters()] == own
            assert {clean_name(name, wrapped) for name in wrapped.state_dict()} == set(own)
    averaged = AveragedModel(Module())
    assert [clean_name(name, averaged) for name in averaged.state_dict()] == ["n_averaged", "weight", "module.weight"]
    assert clean_name("module.a._orig_mod.b") == "module.a.b"
    reserved = Module()
    reserved._orig_mod = nn.Linear(2, 2)
    own = [name for name, _ in reserved.named_parameters()]
    for wrapped in (reserved, *wrappers(reserved)):
        assert [clean_name(name, wrapped) for name, _ in wrapped.named_parameters()] == own


def test_clean_names_know_fabrics_wrapper():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup_module(Module())
    assert [clean_name(name, wrapped) for name, _ in wrapped.named_parameters()] == ["weight", "module.weight"]


def test_flat_parameters_are_split_by_name_not_by_dimension():
    model = Net()
    expected = _names(model, param_groups(model, 0.1))
    flat = copy.deepcopy(model)
    for param in flat.parameters():
        param.ds_shape = param.shape
        param.data = param.data.flatten()
    assert _names(flat, param_groups(flat, 0.1)) == expected


def test_wrong_arguments_are_errors_that_name_them():
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="'pos_embedding', which matches no trainable parameter"):
        param_groups(Net(), 0.1, no_decay=("bias", "pos_embedding"))
    with pytest.raises(ValueError, match="weight_decay must be"):
        param_groups(Net(), -0.1)
    with pytest.raises(TypeError, match="no_decay must be a sequence"):
        param_groups(Net(), 0.1, no_decay="bias")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        param_groups(list(Net().parameters()), 0.1)


def test_the_flat_parameter_of_fsdp1_is_an_error_that_says_split_before_wrapping():
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(8)))
    with pytest.raises(ValueError, match="before wrapping"):
        param_groups(model, 0.1)
