"""A sharded checkpoint's description of itself, by which a load sees what does not fit before it changes anything."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

_NAMES_SHOWN = 6


def listed(names: Iterable[str]) -> str:
    """Some of the names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    return ", ".join(found[:_NAMES_SHOWN]) + more


def describe(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Names, shapes, state keys and groups of a state_dict, in JSON's types.

    Args:
        state: "model" and "optimizer" as torch's `get_state_dict` gives them, and "schedule" where there is one.
        optimizer: Whose state it is.
    """
    keys = {key for one in state["optimizer"]["state"].values() for key in one}
    groups = state["optimizer"]["param_groups"]
    return {
        "model": {name: list(value.size()) for name, value in state["model"].items() if hasattr(value, "size")},
        "optimizer": type(optimizer).__name__,
        "state": sorted(keys),
        "groups": [sorted(group["params"]) for group in groups],
        # A scheduler writes its base values into the groups; they belong to it.
        "settings": [sorted(k for k in group if k != "params" and not k.startswith("initial_")) for group in groups],
        "schedule": "schedule" in state,
    }


def misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The reasons why a checkpoint described as `saved` does not fit `present`; empty if it does."""
    return [*_model_misfits(saved["model"], present["model"]), *_optimizer_misfits(saved, present)]


def _model_misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    if missing := present.keys() - saved.keys():
        lines.append(f"the checkpoint is of another model: it lacks {listed(missing)}")
    if unexpected := saved.keys() - present.keys():
        lines.append(f"the checkpoint is of another model: this one lacks {listed(unexpected)}")
    common = sorted(saved.keys() & present.keys())
    other = [f"{n} {saved[n]} there, {present[n]} here" for n in common if saved[n] != present[n]]
    if other:
        lines.append(f"the checkpoint is of another model, with other shapes: {listed(other)}")
    return lines


def _optimizer_misfits(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    lines = []
    # A checkpoint of before the first step has no state to compare.
    other_state = saved["state"] and saved["state"] != present["state"]
    if saved["optimizer"] != present["optimizer"] or other_state:
        lines.append(
            f"the checkpoint is of another optimizer: {_class_and_state(saved)}, this is {_class_and_state(present)}"
        )
    if len(saved["groups"]) != len(present["groups"]):
        lines.append(
            f"the checkpoint has {len(saved['groups'])} param groups, this optimizer has {len(present['groups'])}; "
            "build the optimizer with the same groups as then"
        )
        return lines
    for index, (there, here) in enumerate(zip(saved["groups"], present["groups"], strict=True)):
        if moved := set(there) ^ set(here):
            lines.append(f"param group {index} holds other parameters than in the checkpoint: {listed(moved)}")
    for index, (there, here) in enumerate(zip(saved["settings"], present["settings"], strict=True)):
        if other := set(there) ^ set(here):
            lines.append(f"param group {index} has other settings than in the checkpoint: {listed(other)}")
    if present["schedule"] and not saved["schedule"]:
        lines.append("the checkpoint has no schedule: it was saved with schedule=None")
    return lines


def _class_and_state(described: Mapping[str, Any]) -> str:
    state = described["state"]
    return f"{described['optimizer']} with state {state}" if state else str(described["optimizer"])
