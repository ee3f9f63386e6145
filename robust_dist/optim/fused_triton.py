"""One pass over all tensors of one combination of dtypes on a CUDA device, in Triton: no temporary, no synchronisation.

The host sends addresses where they have changed, and numbers where the schedule has moved them. Step counts live on
the device; whether a step is skipped, and all that depends on the count, is decided there. Triton is imported at the
first step.
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from robust_dist.optim.backend import batches
from robust_dist.optim.foreach import foreach
from robust_dist.optim.fused_triton_plan import Kinds, Plan, Rows, plan
from robust_dist.optim.fused_triton_table import (
    LR,
    SETTINGS,
    WEIGHT_DECAY,
    is_capturing,
    lives_on,
    settings_words,
    upload,
)
from robust_dist.optim.gather import Gathered
from robust_dist.optim.settings import DEFAULTS, Hyper, hyper

DEVICE_TYPES = frozenset({"cuda"})
BLOCK = 1024  # elements in registers at a time, 8 a thread
ROWS = 128  # tensors whose scalars one program computes
PLANS = 16  # sets of tensors that are remembered: which have gradients may change from step to step
# No fused multiply-add: the same roundings as native/step.h.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@functools.cache
def kernels() -> Any:
    """The module of the kernels; importing it imports Triton."""
    from robust_dist.optim import fused_triton_kernel

    return fused_triton_kernel


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why there is no Triton backend for a device, or None where there is one; the first call compiles both kernels."""
    if device.type not in DEVICE_TYPES:
        return f"there is none for {device.type}"
    try:
        kernels()
    except ImportError as error:
        return f"Triton cannot be imported: {error}; install the package triton"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return f"Triton needs compute capability 7.0, {torch.cuda.get_device_name(device)} has less"
    try:
        _try(device)
    except Exception as error:  # whatever Triton, its compiler or the driver raise: foreach needs none of them
        return f"Triton cannot run a kernel: {type(error).__name__}: {error}"
    return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def _advance(table: Tensor, settings: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    count = table.shape[1]
    kernels().advance[(max(1, -(-count // ROWS)),)](
        table,
        settings,
        table if found_inf is None else found_inf,
        table if grad_scale is None else grad_scale,
        count,
        FOUND_INF=found_inf is not None,
        GRAD_SCALE=grad_scale is not None,
        ROWS=ROWS,
        **_OPTIONS,
    )


def _step(table: Tensor, grads: Tensor, chunks: Tensor, kinds: Kinds) -> None:
    *types, has_master, stochastic = kinds
    language = kernels().tl
    kernels().step[(chunks.shape[0],)](
        table,
        grads,
        chunks,
        table.shape[1],
        *(getattr(language, name) for name in types),
        has_master,
        stochastic,
        BLOCK,
        **_OPTIONS,
    )


@dataclass
class FusedTriton:
    """What an optimizer's steps remember from one to the next, of one device: a function of the tensors' addresses.

    Attributes:
        plans: By the keys of their rows.
        captured: Plans that CUDA graphs read, which must outlive them.
    """

    plans: dict[Any, Plan] = field(default_factory=dict)
    captured: list[Plan] = field(default_factory=list)

    def step(self, rows: Rows, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step all rows, counting their steps, in place.

        Args:
            rows: Tensors of one device.
            grad_scale: What the gradients were multiplied with, a tensor of 1 element, or None.
            found_inf: A tensor of 1 element, not 0 where nothing may change; None for never.
        """
        device = rows.params[0].device
        scale, found = (_scalar(value, device) for value in (grad_scale, found_inf))
        with _on(device):
            found_plan = self._plan(rows, device)
            grads = _send(found_plan, "grads", list(map(Tensor.data_ptr, rows.grads)))
            _advance(found_plan.table, _settings(found_plan, [h for _, h in rows.groups]), scale, found)
            for launch in found_plan.launches:
                _step(found_plan.table, grads, launch.chunks, launch.kinds)
            _step_rest(rows, found_plan.rest, scale, found)
        # Autograd must notice what was written behind its back.
        increment_version(rows.params)

    def _plan(self, rows: Rows, device: torch.device) -> Plan:
        key, capturing = rows.key(), is_capturing(device)
        found = self.plans.get(key)
        if found is None:
            found = plan(rows)
            if capturing:  # the graph's own memory, not written before it is replayed
                return found
            if len(self.plans) >= PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = found
        if capturing and all(found is not other for other in self.captured):
            self.captured.append(found)
        return found


def _send(found: Plan, name: str, words: list[int]) -> Tensor:
    """Words on the device, sent only where they are not those of the last time."""
    device = found.table.device
    if is_capturing(device):
        return upload(words, device)
    last = found.sent.get(name)
    if last is None or last[0] != words:
        last = found.sent[name] = words, upload(words, device)
    return last[1]


def _settings(found: Plan, hypers: Sequence[Hyper]) -> Tensor:
    """The groups' settings on the device; tensors among them are copied there, wherever they lie."""
    device = found.table.device
    settings = _send(found, "settings", [word for h in hypers for word in settings_words(h, device)])
    for group, h in enumerate(hypers):
        for column, value in ((LR, h.lr), (WEIGHT_DECAY, h.weight_decay)):
            if isinstance(value, Tensor) and lives_on(value, device):
                numbers = settings.view(torch.float64)
                numbers[group * SETTINGS + column].copy_(value.detach().reshape(()))
    return settings


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.reshape(()).to(device=device, dtype=torch.float32, non_blocking=True)


def _step_rest(rows: Rows, rest: Sequence[int], scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Step what the kernels cannot take; the kernel `advance` has counted its steps."""
    for group, (_, h) in enumerate(rows.groups):
        slots = [rows.slot(index) for index in rest if rows.members[index] == group]
        for batch in batches(slots, [None] * len(slots)):
            batch.inverse_scale = None if scale is None else scale.double().reciprocal().float()
            batch.found_inf = found_inf
            foreach(batch, h)


def rows_by_device(groups: Iterable[tuple[Gathered, Hyper]]) -> dict[torch.device, Rows]:
    """Sort groups by the device of their parameters."""
    found: dict[torch.device, Rows] = {}
    for gathered, h in groups:
        if gathered.params:
            found.setdefault(gathered.params[0].device, Rows()).add(gathered, h)
    return found


def _try(device: torch.device) -> None:
    """Step a number, to see that all of it runs here."""
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1, device=device) for _ in range(4))
    rows = Rows()
    rows.add(Gathered([param], [grad], [exp_avg], [exp_avg_sq], [torch.zeros((), device=device)]), hyper(DEFAULTS))
    FusedTriton().step(rows, None, None)
