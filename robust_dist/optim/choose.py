"""Which backend steps a param group."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from robust_dist.optim import fused_cpu, fused_triton
from robust_dist.optim.backend import Backend
from robust_dist.optim.foreach import foreach
from robust_dist.optim.single import single
from robust_dist.optim.state import PLAIN, all_plain, is_dtensor, is_fake


def has_no_values(group: Mapping[str, Any]) -> bool:
    """Whether the parameters are simulated (FakeTensorMode), so that nothing can be read."""
    return bool(group["params"]) and is_fake(group["params"][0])


def on_host(group: Mapping[str, Any]) -> bool:
    """Whether the step's scalars are computed on the host; else its values are never read."""
    if torch.compiler.is_compiling():
        return False
    return group["differentiable"] or not (group["capturable"] or has_no_values(group))


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether the step counts live on the parameters' device; else on the CPU."""
    return group["capturable"] or fused_on_device(group) or (not group["differentiable"] and has_no_values(group))


def _supports_foreach(params: Iterable[Tensor]) -> bool:
    if all_plain(params):
        return True
    one_of_each = {type(p): p for p in params}
    return all(kind in PLAIN or is_dtensor(p) for kind, p in one_of_each.items())


def fused_on_device(group: Mapping[str, Any]) -> bool:
    """Whether the Triton backend steps this group; its step counts are then on the device."""
    params = group["params"]
    if group["foreach"] is not None or group["fused"] is False or group["differentiable"] or not params:
        return False
    if params[0].device.type not in fused_triton.DEVICE_TYPES or not _supports_foreach(params) or is_fake(params[0]):
        return False
    on_one = len({*map(Tensor.get_device, params)}) == 1
    return on_one and fused_triton.why_not(params[0].device) is None


def choose(group: Mapping[str, Any], params: list[Tensor]) -> Backend:
    """The backend of a group that is not `fused_on_device`."""
    wanted = group["foreach"]
    if wanted is None:
        wanted = _supports_foreach(params)
        # A compiled step compiles foreach operations; a call into C would break its graph.
        fuses = not (group["fused"] is False or torch.compiler.is_compiling() or any(map(is_fake, params[:1])))
        if wanted and fuses and fused_cpu.library() is not None:
            return fused_cpu.fused_cpu
    return foreach if wanted else single


def _missing(device: torch.device, capturable: bool) -> str | None:
    """Why there is no fused backend for a device, or None where there is one."""
    if device.type != "cpu":
        return fused_triton.why_not(device)
    return "with capturable=True there is none on the CPU" if capturable else fused_cpu.why_not()


def check_fused(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a param group demands a fused backend that its parameters cannot have."""
    devices = {param.device for param in group["params"]} - {torch.device("meta")}
    if not group["fused"] or not devices or has_no_values(group):
        return
    alternative = "use foreach=True, or fused=None for the fastest there is"
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"fused=True needs the parameters of a group on one device, they are on {names}; {alternative}"
        )
    device = devices.pop()
    reason = _missing(device, group["capturable"])
    if reason is not None:
        raise ValueError(f"fused=True: there is no fused backend here, on {device} ({reason}); {alternative}")
