"""One pass over all tensors of a combination of dtypes on a CUDA device, in Triton, without temporaries or waiting.

The host sends addresses and settings only when they change. Step counts are on the device, which computes everything
that depends on them and decides whether a step is skipped. Triton is imported at the first step.
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from robust_dist.optim.addresses import addresses
from robust_dist.optim.foreach import foreach
from robust_dist.optim.fused_triton_plan import Kinds, Plan, Rows, plan
from robust_dist.optim.fused_triton_table import (
    COLUMNS,
    LR,
    RATE_GROUPS,
    RATE_MASK,
    SETTINGS,
    WEIGHT_DECAY,
    is_capturing,
    lives_on,
    rates_words,
    settings_words,
    upload,
)
from robust_dist.optim.settings import DEFAULTS, Hyper, hyper
from robust_dist.optim.tensors import TensorLists, inverse

DEVICE_TYPES = frozenset({"cuda"})
BLOCK = 1024  # elements in registers at a time, 8 per thread
ROWS = 128  # tensors whose scalars one program computes
# In all cached plans: the set of tensors with gradients may change, and ZeRO-3 steps one part after the other.
PLANNED_ROWS = 1 << 15
# No fused multiply-add, to round like native/step.h. With 128 registers an NVIDIA multiprocessor holds four programs,
# without spilling; AMD's compiler has no such option.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": 128})}
_NO_RATES = [RATE_MASK] * (2 * RATE_GROUPS)


@functools.cache
def kernels() -> Any:
    """The module with the kernels; importing it imports Triton."""
    from robust_dist.optim import fused_triton_kernel

    return fused_triton_kernel


_reasons: dict[torch.device, str | None] = {}


def why_not(device: torch.device) -> str | None:
    """The reason why there is no Triton backend for a device, or None; the first call compiles both kernels.

    The answer is cached for the process, except after running out of memory.
    """
    if device not in _reasons:
        reason, holds = _why_not(device)
        if not holds:
            return reason
        _reasons[device] = reason
    return _reasons[device]


def _why_not(device: torch.device) -> tuple[str | None, bool]:
    """The reason, and whether it can be cached."""
    if device.type not in DEVICE_TYPES:
        return f"there is none for {device.type}", True
    try:
        kernels()
    except ImportError as error:
        return f"Triton cannot be imported: {error}; install the package triton", True
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0, {torch.cuda.get_device_name(device)} has less", True
    try:
        _try(device)
    except Exception as error:  # anything from Triton, its compiler or the driver: foreach needs none of them
        holds = not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower())
        return f"Triton cannot run a kernel: {type(error).__name__}: {error}", holds
    return None, True


def failure(params: Sequence[Tensor]) -> str | None:
    """The reason why the backend fails on its own kind of device; None if it works, or for other devices."""
    if not params or params[0].device.type not in DEVICE_TYPES:
        return None
    return why_not(params[0].device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def _advance(
    table: Tensor,
    settings: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rates: Sequence[int] | None = None,
) -> None:
    count = table.shape[1]
    kernels().advance[(max(1, -(-count // ROWS)),)](
        table,
        settings,
        table if found_inf is None else found_inf,
        table if grad_scale is None else grad_scale,
        count,
        *(_NO_RATES if rates is None else rates),
        FOUND_INF=found_inf is not None,
        GRAD_SCALE=grad_scale is not None,
        RATES=rates is not None,
        AVERAGES=table.shape[0] > COLUMNS,
        ROWS=ROWS,
        **_OPTIONS,
    )


def _step(table: Tensor, grads: Tensor, chunks: Tensor, kinds: Kinds) -> None:
    *types, has_master, stochastic, averages = kinds
    language = kernels().tl
    kernels().step[(chunks.shape[0],)](
        table,
        grads,
        chunks,
        table.shape[1],
        *(getattr(language, name) for name in types),
        has_master,
        stochastic,
        averages,
        BLOCK,
        **_OPTIONS,
    )


@dataclass
class FusedTriton:
    """The cached plans of an optimizer on one device.

    Attributes:
        plans: Plans by the keys of their rows, the most recently used last.
        captured: Plans used by CUDA graphs, which they must outlive.
    """

    plans: dict[Any, Plan] = field(default_factory=dict)
    captured: list[Plan] = field(default_factory=list)

    def plan(self, rows: Rows) -> Plan:
        """The plan of these rows, created if none is cached."""
        device = rows.tensors.params[0].device
        key, capturing = rows.key(), is_capturing(device)
        found = self.plans.pop(key, None)
        if found is None:
            found = plan(rows)
            if capturing:  # in the graph's own memory, written only when it is replayed
                return found
            while self.plans and sum(kept.num_rows for kept in self.plans.values()) + found.num_rows > PLANNED_ROWS:
                del self.plans[next(iter(self.plans))]
        self.plans[key] = found
        if capturing and all(found is not other for other in self.captured):
            self.captured.append(found)
        return found


def step_groups(
    memory: dict[torch.device, FusedTriton],
    groups: Iterable[tuple[TensorLists, Hyper]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step groups of parameters and increment their step counts, in place.

    Args:
        memory: The plans of the optimizer's earlier steps.
        groups: Parameters with their settings.
        grad_scale: The factor by which the gradients are scaled, a tensor of 1 element, or None.
        found_inf: A tensor of 1 element, not 0 if nothing may change; None for never.
    """
    for device, rows in rows_by_device(groups).items():
        found = memory.setdefault(device, FusedTriton()).plan(rows)
        scale, skip = (_scalar(value, device) for value in (grad_scale, found_inf))
        with _on(device):
            _launch(found, rows.tensors.grads, rows.hypers, scale, skip)
            _step_rest(rows, found.rest, scale, skip)
        # Tell autograd about the write.
        increment_version(rows.tensors.params)


def _launch(
    found: Plan,
    grads: list[Tensor],
    hypers: Sequence[Hyper],
    scale: Tensor | None,
    found_inf: Tensor | None,
    settings: Tensor | None = None,
) -> None:
    places, rates = _send(found, "grads", addresses(grads)), rates_words(hypers)
    if settings is None or rates is None:
        settings = _settings(found, hypers, with_rates=rates is None)
    _advance(found.table, settings, scale, found_inf, rates)
    for launch in found.launches:
        _step(found.table, places, launch.chunks, launch.kinds)


@dataclass
class _Prepared:
    """A step whose plan is known to be valid; only learning rates and decays may change.

    Attributes:
        plan: The plan.
        settings: Settings of the groups that have a gradient, on the device.
        groups: The indices of these groups among all.
        params: The parameters.
        device: Their device.
    """

    plan: Plan
    settings: Tensor
    groups: list[int]
    params: list[Tensor]
    device: torch.device

    def run(
        self,
        grads: list[Tensor],
        hypers: list[Hyper],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        counts: list[float],
    ) -> bool:
        """Step a batch; see backends.py."""
        if is_capturing(self.device):  # a graph has its own plan
            return False
        scale, skip = (_scalar(value, self.device) for value in (grad_scale, found_inf))
        with _on(self.device):
            _launch(self.plan, grads, [hypers[place] for place in self.groups], scale, skip, self.settings)
        increment_version(self.params)
        return True

    def sum_abs(self, grads: list[Tensor]) -> None:
        """None: there is no fast way; see backends.py."""


def prepare(memory: dict[torch.device, FusedTriton], groups: Sequence[tuple[TensorLists, Hyper]]) -> _Prepared | None:
    """The step that `step_groups` has just taken, if a single plan covers it; else None."""
    by_device = rows_by_device(groups)
    if len(by_device) != 1:
        return None
    device, rows = by_device.popitem()
    if is_capturing(device):
        return None
    found = memory.setdefault(device, FusedTriton()).plan(rows)
    if found.rest:
        return None
    with _on(device):
        settings = _settings(found, rows.hypers, with_rates=False)
    stepped = [place for place, (lists, _) in enumerate(groups) if lists.params]
    return _Prepared(found, settings, stepped, rows.tensors.params, device)


def _send(found: Plan, name: str, words: Sequence[int]) -> Tensor:
    """The words on the device, sent only if they have changed."""
    device = found.table.device
    if is_capturing(device):
        return upload(words, device)
    last = found.sent.get(name)
    if last is None or last[0] != words:
        last = found.sent[name] = words, upload(words, device)
    return last[1]


def _settings(found: Plan, hypers: Sequence[Hyper], *, with_rates: bool) -> Tensor:
    """The groups' settings on the device; tensors among them are copied there from any device."""
    device = found.table.device
    words = [word for h in hypers for word in settings_words(h, device, with_rates=with_rates)]
    settings = _send(found, "settings", words)
    for group, h in enumerate(hypers if with_rates else ()):
        for column, value in ((LR, h.lr), (WEIGHT_DECAY, h.weight_decay)):
            if isinstance(value, Tensor) and lives_on(value, device):
                numbers = settings.view(torch.float64)
                numbers[group * SETTINGS + column].copy_(value.detach().reshape(()))
    return settings


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.reshape(()).to(device=device, dtype=torch.float32, non_blocking=True)


def _step_rest(rows: Rows, rest: Sequence[int], scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Step the rows that the kernels do not support; the kernel `advance` has incremented their counts."""
    for group, h in enumerate(rows.hypers if rest else ()):
        lists = rows.of_group(group, rest)
        for batch in lists.batches([None] * len(lists.params)):
            batch.inverse_scale = inverse(scale)
            batch.found_inf = found_inf
            foreach(batch, h)


def rows_by_device(groups: Iterable[tuple[TensorLists, Hyper]]) -> dict[torch.device, Rows]:
    """The parameters of all groups by device."""
    found: dict[torch.device, Rows] = {}
    for gathered, h in groups:
        if gathered.params:
            found.setdefault(gathered.params[0].device, Rows()).add(gathered, h)
    return found


def _try(device: torch.device) -> None:
    """Step one number, to check that everything runs on the device."""
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1, device=device) for _ in range(4))
    lists = TensorLists([param], [grad], [exp_avg], [exp_avg_sq], [torch.zeros((), device=device)])
    step_groups({}, [(lists, hyper(DEFAULTS))], None, None)
