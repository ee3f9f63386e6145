"""The backends, and the function that chooses among them.

A backend is a `Backend` record. `BACKENDS` lists them from the fastest to the most general; `register` adds one at the
front. README.md shows how to add a backend in its own file.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from robust_dist.optim import fused_cpu, fused_triton
from robust_dist.optim.foreach import foreach
from robust_dist.optim.settings import Hyper, option
from robust_dist.optim.single import single
from robust_dist.optim.state import PLAIN, all_plain, is_dtensor, is_fake
from robust_dist.optim.tensors import TensorLists

FUSED, FOREACH, SINGLE = "fused", "foreach", "single"
Groups = list[tuple[TensorLists, Hyper]]


class Prepared(Protocol):
    """A step that a backend has just taken, prepared for the same tensors with new gradients."""

    def run(
        self,
        grads: list[Tensor],
        hypers: list[Hyper],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        counts: list[float],
    ) -> bool:
        """Step in place.

        Args:
            grads: Local gradients of all groups, one after the other, with the same layouts as before.
            hypers: Settings of each group.
            grad_scale: The factor by which the gradients are scaled, a tensor of 1 element, or None.
            found_inf: A tensor of 1 element, not 0 if nothing may change, or None; always None on the host.
            counts: The count t of this step for each group; empty if the backend counts on the device.

        Returns:
            False, without any change, if the step must be prepared again.
        """

    def sum_abs(self, grads: list[Tensor]) -> float | Tensor | None:
        """The sum of the absolute values of these gradients, in double precision; None if there is no fast way."""


@dataclass(frozen=True)
class Backend:
    """An implementation of the step.

    Attributes:
        name: Its name, also in a run's files.
        kind: The setting that selects it: "fused", "foreach", or "single", which is foreach=False.
        why_not: Returns why it cannot step a param group, or None if it can.
        step: Steps a batch (`TensorLists.batches`) in place.
        step_on_device: For a backend that keeps the step counts on the parameters' device: steps groups (pairs of
            `TensorLists` and settings) in place and increments their counts. Its arguments are a dict that exists as
            long as the optimizer, the groups, grad_scale and found_inf.
        prepare: From this dict and groups that have just been stepped, returns the step for new gradients, or None.
        averages: Whether it supports batches with `zs` (averaging.py).
    """

    name: str
    kind: str
    why_not: Callable[[Mapping[str, Any]], str | None]
    step: Callable[[TensorLists, Hyper], None]
    step_on_device: Callable[[dict[Any, Any], Groups, Tensor | None, Tensor | None], None] | None = None
    prepare: Callable[[dict[Any, Any], Groups], Prepared | None] | None = None
    averages: bool = False

    def problem(self, group: Mapping[str, Any]) -> str | None:
        """Why it cannot step a param group, or None if it can."""
        averaging = option(group, "averaging")
        if averaging is not None and not self.averages:
            return f"it does not support averaging={averaging!r}"
        return self.why_not(group)


def has_no_values(group: Mapping[str, Any]) -> bool:
    """Whether the parameters are fake (FakeTensorMode), so that no value can be read."""
    return len(group["params"]) > 0 and is_fake(group["params"][0])


def on_host(group: Mapping[str, Any]) -> bool:
    """Whether the step's scalars are computed on the host; else no value is read."""
    if torch.compiler.is_compiling():
        return False
    return group["differentiable"] or not (group["capturable"] or has_no_values(group))


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether the step counts are on the parameters' device, also in a compiled step; else on the CPU."""
    if group["capturable"] or (not group["differentiable"] and has_no_values(group)):
        return True
    return _choose(group).step_on_device is not None


def _supports_foreach(params: Iterable[Tensor]) -> bool:
    if all_plain(params):
        return True
    one_of_each = {type(p): p for p in params}
    return all(kind in PLAIN or is_dtensor(p) for kind, p in one_of_each.items())


def _foreach_why_not(group: Mapping[str, Any]) -> str | None:
    return None if _supports_foreach(group["params"]) else "a parameter has a custom tensor class"


def _fused_cpu_why_not(group: Mapping[str, Any]) -> str | None:
    params = group["params"]
    if not any(param.device.type == "cpu" for param in params):
        return f"there is none for {params[0].device.type}" if params else "the group has no parameter"
    if group["capturable"]:
        return "with capturable=True there is none on the CPU"
    return fused_cpu.why_not() or _foreach_why_not(group)


def _fused_triton_why_not(group: Mapping[str, Any]) -> str | None:
    params = group["params"]
    if not params or params[0].device.type not in fused_triton.DEVICE_TYPES:
        return f"there is none for {params[0].device.type}" if params else "the group has no parameter"
    if len({*map(Tensor.get_device, params)}) != 1:
        return "the parameters are on several devices"
    return _foreach_why_not(group) or fused_triton.why_not(params[0].device)


TRITON = Backend(
    "fused_triton",
    FUSED,
    _fused_triton_why_not,
    foreach,
    fused_triton.step_groups,
    fused_triton.prepare,
    averages=True,
)
IN_C = Backend("fused_cpu", FUSED, _fused_cpu_why_not, fused_cpu.fused_cpu, prepare=fused_cpu.prepare, averages=True)
IN_FOREACH = Backend("foreach", FOREACH, _foreach_why_not, foreach, averages=True)
ONE_BY_ONE = Backend("single", SINGLE, lambda group: None, single, averages=True)
BACKENDS: list[Backend] = [TRITON, IN_C, IN_FOREACH, ONE_BY_ONE]


def register(backend: Backend) -> None:
    """Give a backend precedence over all others; one with the same name is replaced."""
    BACKENDS[:] = [backend, *(other for other in BACKENDS if other.name != backend.name)]


def choose(group: Mapping[str, Any]) -> Backend:
    """The backend of a param group: the first that its settings allow and that supports it."""
    if torch.compiler.is_compiling():  # it compiles foreach operations; a call into C would break its graph
        in_lists = _supports_foreach(group["params"]) if group["foreach"] is None else group["foreach"]
        return IN_FOREACH if in_lists else ONE_BY_ONE
    return _choose(group)


def _choose(group: Mapping[str, Any]) -> Backend:
    if group["differentiable"] or group["foreach"] is False:
        return ONE_BY_ONE
    if group["foreach"]:
        return IN_FOREACH
    fuses = not (group["fused"] is False or has_no_values(group))
    for backend in BACKENDS:
        if backend.kind == FUSED and not fuses:
            continue
        if backend.problem(group) is None:
            return backend
        if backend is TRITON:
            _say_once(fused_triton.failure(group["params"]))
    return ONE_BY_ONE


_said: set[str] = set()


def _say_once(reason: str | None) -> None:
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"RAdaBeliefW uses torch's foreach operations on a GPU, which are slower and round differently: {reason}; "
            "fused=False selects them without this warning; all ranks must use the same backend",
            UserWarning,
            stacklevel=4,
        )


def check_fused(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a param group requires a fused backend that its parameters do not support."""
    devices = {param.device for param in group["params"]} - {torch.device("meta")}
    if not group["fused"] or not devices or has_no_values(group):
        return
    alternative = "use foreach=True, or fused=None for the fastest available backend"
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"fused=True needs all parameters of a group on one device, but they are on {names}; {alternative}"
        )
    reasons = [backend.problem(group) for backend in BACKENDS if backend.kind == FUSED]
    if all(reasons):
        device = devices.pop()
        none = f"there is none for {device.type}"
        reason = next((reason for reason in reasons if reason != none), none)
        raise ValueError(f"fused=True: there is no fused backend here, on {device} ({reason}); {alternative}")
