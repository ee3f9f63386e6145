"""Patches of DeepSpeed for RAdaBeliefW; other optimizers are not affected.

Each patch gets a module of DeepSpeed and looks for the code to change: a version without it needs no patch.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from robust_dist.engines.deepspeed.check_checkpoint import LATEST, can_check, check_checkpoint
from robust_dist.engines.deepspeed.config import check_engine_config
from robust_dist.engines.deepspeed.hidden import (
    WRAPPERS,
    check_options,
    with_measured_gradients,
    with_unclipped_gradients,
    with_what_is_hidden,
)
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.dry_step import dry_step
from robust_dist.optim.settings import telling_of_switches
from robust_dist.optim.state import own_steps
from robust_dist.ranks.talk import rank

UNIVERSAL_LOAD = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
DRY_STEP = "initialize_optimizer_states"
Patch = Callable[[ModuleType], None]


def pass_gate(module: ModuleType) -> None:
    """Add RAdaBeliefW to the optimizers that ZeRO accepts."""
    supported: list[type] = module.ZERO_SUPPORTED_OPTIMIZERS
    if RAdaBeliefW not in supported:
        supported.append(RAdaBeliefW)


def patch_dry_step(module: ModuleType) -> None:
    """Undo the step with which ZeRO-0's bfloat16 and float16 wrapper creates state: it decays masters and counts."""
    _wrap(getattr(module, "FP16_UnfusedOptimizer", None), DRY_STEP, _without_a_trace)
    _wrap(getattr(module, "FP16_Optimizer", None), DRY_STEP, _without_a_trace)


def patch_unfused(module: ModuleType) -> None:
    """`patch_dry_step` and `patch_step`."""
    patch_dry_step(module)
    patch_step(module)


def patch_stage3(module: ModuleType) -> None:
    """`patch_step`, and restore each group's settings and steps after a universal load, which uses the first's."""
    patch_step(module)
    _wrap(getattr(module, "DeepSpeedZeroOptimizer_Stage3", None), UNIVERSAL_LOAD, _with_own_settings)


def patch_step(module: ModuleType) -> None:
    """Pass the gradients of all groups to `rate_guard`; the wrappers clip and step the groups one by one."""
    for name in WRAPPERS:
        _wrap(getattr(module, name, None), "step", with_measured_gradients)


def patch_engine(module: ModuleType) -> None:
    """Check JSON and checkpoint before an engine uses them, and give the optimizer access to what the engine hides.

    DeepSpeed accepts wrong ones, or fails only on some ranks.
    """
    # Not when zero.Init reads the JSON, which is before Accelerate and Trainer fill in each "auto".
    _wrap(getattr(module, "DeepSpeedEngine", None), "_do_sanity_check", _with_config_check)
    _wrap(getattr(module, "DeepSpeedEngine", None), "load_checkpoint", _with_checkpoint_check)
    _wrap(getattr(module, "DeepSpeedEngine", None), "_configure_optimizer", with_what_is_hidden)
    _wrap(getattr(module, "DeepSpeedEngine", None), "clip_fp32_gradients", with_unclipped_gradients)


def _wrap(cls: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(cls, name, None)
    if original is None or getattr(original, "patched_by_robust_dist", False):
        return
    patched = functools.wraps(original)(wrapper(original))
    patched.patched_by_robust_dist = True  # type: ignore[attr-defined]
    setattr(cls, name, patched)


def _with_config_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def do_sanity_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_engine_config(self)
        return original(self, *args, **kwargs)

    return do_sanity_check


def _with_checkpoint_check(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        goes_on = _goes_on(given.arguments)
        if goes_on and can_check(self):
            check_checkpoint(self, given.arguments["load_dir"], given.arguments["tag"])
        base = getattr(self, "basic_optimizer", None)
        # A universal load writes the groups without calling the optimizer's own load.
        with telling_of_switches(base) if isinstance(base, RAdaBeliefW) else nullcontext():
            result = original(self, *args, **kwargs)
        if goes_on and isinstance(base, RAdaBeliefW):
            # A file may set the options, and a universal load writes only the groups.
            check_options(self)
            base.restore_measured()
        return result

    return load_checkpoint


def _goes_on(arguments: dict[str, Any]) -> bool:
    """Whether everything is to be loaded; DeepSpeed itself allows a start without a checkpoint."""
    folder, tag = arguments.get("load_dir"), arguments.get("tag")
    if folder is None or "tag" not in arguments or arguments.get("custom_load_fn") is not None:
        return False
    whole = ("load_module_strict", "load_optimizer_states")
    if arguments.get("load_module_only") or not all(arguments.get(name, True) for name in whole):
        return False
    return tag is not None or any(os.path.isfile(os.path.join(folder, name)) for name in LATEST)


def _without_a_trace(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_optimizer_states(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = self.optimizer
        if not isinstance(optimizer, RAdaBeliefW) or optimizer.state:
            return original(self, *args, **kwargs)
        try:
            with dry_step(optimizer):
                return original(self, *args, **kwargs)
        finally:
            # State is created lazily: the first real step starts without any.
            optimizer.state.clear()

    return initialize_optimizer_states


def _with_own_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        optimizer = self.optimizer
        if not isinstance(optimizer, RAdaBeliefW):
            return original(self, checkpoint_dir, *args, **kwargs)
        saved = _saved_groups(checkpoint_dir, optimizer)
        result = original(self, checkpoint_dir, *args, **kwargs)
        for group, settings in zip(optimizer.param_groups, saved, strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
        capturable = any(group["capturable"] for group in optimizer.param_groups)
        own_steps(optimizer.state, list(optimizer.state), capturable)
        return result

    return load


def _saved_groups(checkpoint_dir: str, optimizer: Optimizer) -> list[dict[str, Any]]:
    path = os.path.join(checkpoint_dir, "zero", "optimizer_state.pt")
    # DeepSpeed pickles its own objects into this file, so it cannot be read in any other way.
    saved: list[dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=False)["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"rank {rank()}: the universal checkpoint {checkpoint_dir} has {len(saved)} param groups, the optimizer "
            f"has {len(optimizer.param_groups)}; build the optimizer with the checkpoint's groups"
        )
    return saved


def when_imported(patches: dict[str, Patch]) -> None:
    """Call `patches[name](module)` for each module: now if it is imported, else right after its import.

    So DeepSpeed is only imported by programs that use it. A patch may be called again for the same module, and must
    then have no effect.
    """
    for name, patch in patches.items():
        module = sys.modules.get(name)
        if module is not None:
            patch(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(patches))


class _Finder(MetaPathFinder):
    def __init__(self, patches: dict[str, Patch]) -> None:
        self.patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.patches:
            return None
        spec = self._spec_of_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            _add_to(spec.loader, self.patches[fullname])
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in found if spec is not None), None)


def _add_to(loader: Any, patch: Patch) -> None:
    execute = loader.exec_module

    def execute_and_patch(module: ModuleType) -> None:
        execute(module)
        patch(module)

    loader.exec_module = execute_and_patch
