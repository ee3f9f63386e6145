"""Parameter groups: weight decay for weights, none for biases and normalisation layers."""

import gc
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from robust_dist.optim.settings import check_not_negative
from robust_dist.optim.state import is_dtensor

# "package.class" of a wrapper -> the attributes that hold the wrapped module
_WRAPPERS = {
    "torch.DistributedDataParallel": ("module",),
    "torch.DataParallel": ("module",),
    "torch.AveragedModel": ("module",),
    "torch.FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "torch.OptimizedModule": ("_orig_mod",),
    "torch.ActivationWrapper": ("_checkpoint_wrapped_module",),
    "deepspeed.DeepSpeedEngine": ("module",),
    "lightning._FabricModule": ("_forward_module", "_original_module"),
    "lightning_fabric._FabricModule": ("_forward_module", "_original_module"),
}
# names that no user's module has: they identify a wrapper even without the model
_UNMISTAKABLE = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_NORM_CLASS = re.compile(r"Norm(?![a-z])|norm$")


def clean_name(name: str, model: nn.Module | None = None) -> str:
    """A parameter's (or buffer's) name without the components added by wrappers.

    Args:
        name: The name from the model's `named_parameters()` or `state_dict()`.
        model: The model. Wrappers (DDP, DataParallel, AveragedModel, FSDP1, torch.compile, activation checkpointing,
            DeepSpeed's engine, Fabric) are recognised by the types of its modules, so that a user's own child called
            `module` keeps its name. Without it, only names that no user's module has are removed, such as "_orig_mod".
    """
    if model is None:
        return ".".join(part for part in name.split(".") if part not in _UNMISTAKABLE)
    kept: list[str] = []
    at: Any = model
    for part in name.split("."):
        # some wrappers omit their own component from the names
        while (children := _children_of_wrapper(at)) and part not in {*children, *_own_buffers(at)}:
            at = getattr(at, children[0])
        if part not in children and not (part in _UNMISTAKABLE and _holds_one_module(at)):
            kept.append(part)
        at = getattr(at, part, None)
    return ".".join(kept)


def _own_buffers(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False)]


def _holds_one_module(module: Any) -> bool:
    """Whether it may be a wrapper of an unknown class: it has one child and no tensors of its own."""
    if not isinstance(module, nn.Module):
        return True
    own = [*module.parameters(recurse=False), *_own_buffers(module)]
    return len(list(module.children())) == 1 and not own


def _children_of_wrapper(module: Any) -> tuple[str, ...]:
    classes = (f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__)
    return next((_WRAPPERS[name] for name in classes if name in _WRAPPERS), ())


def reshard(model: nn.Module) -> None:
    """Switch FSDP2's modules back to their sharded parameters, which an optimizer steps; without communication.

    After a forward pass without a backward, as in an evaluation, the root has its unsharded parameters until the next
    backward. torch's own state dicts also begin with this, and training is not affected.
    """
    for module in model.modules():
        _reshard(module)


def _reshard(module: nn.Module) -> None:
    # Not FSDPModule.reshard(), which does not exist on modules that belong to the group of a parent.
    for hook in getattr(module, "_state_dict_pre_hooks", {}).values():
        if "_fully_shard" in (getattr(hook, "__module__", None) or ""):
            hook(module, "", False)


def gather_anew(params: Sequence[Tensor]) -> None:
    """Make FSDP's modules gather their weights again at the next forward pass; without communication.

    After a forward pass without a backward, as in an evaluation, the root keeps the unsharded weights, and the next
    forward pass would use them and ignore changes to the sharded parameters.

    Args:
        params: The parameters that were changed; without a sharded one there is no effect.
    """
    if not any(is_dtensor(param) or getattr(param, "_fsdp_flattened", False) for param in params):
        return
    for module in [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]:
        _reshard(module)
        handle: Any = getattr(module, "_handle", None)
        if getattr(handle, "uses_sharded_strategy", False) and not handle.needs_unshard():
            handle.reshard(True)


def check_sharded(params: Iterable[Tensor]) -> None:
    """Refuse FSDP2's unsharded parameters, which temporarily replace the sharded ones and are not trained by a step.

    Raises:
        ValueError: A parameter is unsharded; the message names the remedy.
    """
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    if module is None or not torch.distributed.is_initialized():
        return
    # Such a parameter has no mark of its own; only the objects that created it know.
    makers = (one for one in gc.get_objects() if type(one) is module.FSDPParam)
    whole = {id(maker.__dict__.get("_unsharded_param")) for maker in makers}
    found = sum(id(param) in whole for param in params)
    if found:
        raise ValueError(
            f"{found} parameters of the group are unsharded parameters of FSDP2, which replace the sharded ones from a "
            "forward pass to the next backward, as after an evaluation, and which no step trains; take the group from "
            "robust_dist.param_groups(model), or call reshard() on the modules passed to fully_shard"
        )


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias") or last.startswith("bias_")


def _norm_parameter_ids(model: nn.Module) -> set[int]:
    norms = (m for m in model.modules() if _NORM_CLASS.search(type(m).__name__))
    return {id(p) for m in norms for p in m.parameters(recurse=False)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or any(fnmatchcase(part, pattern) for part in name.split("."))


def _trainable(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    for name, param in model.named_parameters():
        if name.rpartition(".")[2].startswith("_flat_param") or getattr(param, "_is_flat_param", False):
            raise ValueError(
                f"parameter {name!r} is a flat parameter of FSDP with use_orig_params=False, which mixes weights and"
                " biases: call param_groups on the model before wrapping it, or wrap it with use_orig_params=True"
            )
        if param.requires_grad:
            yield clean_name(name, model), param


def _check_patterns(no_decay: Sequence[str]) -> tuple[str, ...]:
    if isinstance(no_decay, str) or not all(isinstance(p, str) for p in no_decay):
        raise TypeError(f'no_decay must be a sequence of strings such as ("bias", "norm"), got {no_decay!r}')
    return tuple(no_decay)


def param_groups(
    model: nn.Module, weight_decay: float, *, no_decay: Sequence[str] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into one group with weight decay and one without.

    Parameters are classified by name and by the module that owns them, never by their number of dimensions,
    so the split is the same before and after wrapping (DDP, FSDP1 with use_orig_params=True, FSDP2,
    torch.compile) and under DeepSpeed's ZeRO-3, where parameters are flat. A shared parameter is listed once,
    under its first name; frozen ones are left out. Under FSDP2 the groups hold the sharded parameters, also after an
    evaluation.

    Args:
        model: The model, wrapped or not.
        weight_decay: The decay of the first group; a finite number of at least 0.
        no_decay: What is not decayed. "bias": parameters named `bias`, `*_bias` or `bias_*`. "norm": parameters of
            normalisation modules, i.e. with `Norm` in their class name (all of torch's, and others such as RMSNorm).
            Any other string: parameters whose full name, or a component of it, matches; `*` and `?` are wildcards
            ("pos_embed", "*_token", "head.*").

    Returns:
        One or two dicts with "params" and "weight_decay", the decaying group first; never an empty group.

    Raises:
        ValueError: No trainable parameter; a string other than "bias" and "norm" that matches no trainable
            parameter; a flat parameter of FSDP1; a weight_decay out of range.
        TypeError: `model` is not a module, or `no_decay` is not a sequence of strings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_not_negative("weight_decay", weight_decay)
    patterns = _check_patterns(no_decay)
    reshard(model)
    own = [p for p in patterns if p not in ("bias", "norm")]
    norms = _norm_parameter_ids(model) if "norm" in patterns else set()
    named = list(_trainable(model))
    if not named:
        raise ValueError("model has no trainable parameter: it has no parameters, or all have requires_grad=False")
    for pattern in own:
        if not any(_matches(name, pattern) for name, _ in named):
            raise ValueError(
                f"no_decay names {pattern!r}, which matches no trainable parameter; one is {named[0][0]!r}"
            )

    def decays(name: str, param: Parameter) -> bool:
        by_name = ("bias" in patterns and _is_bias(name)) or any(_matches(name, pattern) for pattern in own)
        return not (by_name or id(param) in norms)

    decaying = [p for n, p in named if decays(n, p)]
    others = [p for n, p in named if not decays(n, p)]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
