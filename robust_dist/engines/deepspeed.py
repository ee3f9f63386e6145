"""DeepSpeed: RAdaBeliefW and RobustSchedule as names for a JSON's "type"."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule

_GATE = "deepspeed.runtime.zero.utils"


def register() -> None:
    """Let a DeepSpeed JSON name RAdaBeliefW and RobustSchedule in "type".

    DeepSpeed looks an unknown optimizer up on `torch.optim` and an unknown scheduler up on `torch.optim.lr_scheduler`,
    and ZeRO refuses optimizers that are not on its list. Call this on every rank before `deepspeed.initialize` or
    `Accelerator.prepare`. It may be called again, and before or after `import deepspeed`, which it does not import.
    """
    torch.optim.RAdaBeliefW = RAdaBeliefW  # type: ignore[attr-defined]
    torch.optim.lr_scheduler.RobustSchedule = RobustSchedule  # type: ignore[attr-defined]
    module = sys.modules.get(_GATE)
    if module is not None:
        _pass_gate(module)
    elif not any(isinstance(finder, _GateFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _GateFinder())


def _pass_gate(module: ModuleType) -> None:
    supported: list[type] = module.ZERO_SUPPORTED_OPTIMIZERS
    if RAdaBeliefW not in supported:
        supported.append(RAdaBeliefW)


class _GateFinder(MetaPathFinder):
    """Adds RAdaBeliefW to ZeRO's list when DeepSpeed is imported, which takes seconds that others need not spend."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _GATE:
            return None
        spec = self._spec_of_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._add_to(spec.loader)
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in found if spec is not None), None)

    def _add_to(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_pass(module: ModuleType) -> None:
            execute(module)
            _pass_gate(module)

        loader.exec_module = execute_and_pass
