"""A report on the contents of a checkpoint."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_dist.checkpoint import layout as layouts
from robust_dist.checkpoint.conversion import read
from robust_dist.checkpoint.layout import ZERO, Layout, find_layout
from robust_dist.checkpoint.store import MANIFEST, CheckpointError, verify
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.optim.rate import Measured
from robust_dist.optim.settings import TRAINS


@dataclass(frozen=True)
class Inspection:
    """A readable report, and whether everything could be read."""

    text: str
    whole: bool


def inspect(path: str | Path) -> str:
    """A report on the checkpoint at `path`: layout, engine, ranks, step, schedule, groups, parameters, complete or
    torn.

    Raises:
        CheckpointError: The path does not exist or is not a checkpoint.
    """
    return examine(path).text


def examine(path: str | Path) -> Inspection:
    """Like `inspect`, with the verdict as a separate value."""
    path = Path(path)
    place, reason = _place(path)
    head = [("checkpoint", str(path)), ("layout", _layout(path, place))]
    if reason is None:
        try:
            state = read(path, number=True)
        except CheckpointError as error:
            reason = str(error)
        else:
            beside = layouts.rows(state, path) if "trainer" in state.extra else []
            return Inspection(_table([*head, ("whole", "yes"), *_rows(state), *beside]), True)
    return Inspection(_table([*head, ("whole", f"no: {reason}")]), False)


def _place(path: Path) -> tuple[Layout | None, str | None]:
    """The layout, or why there is none: the manifest says that a file is torn or gone."""
    if (path / MANIFEST).is_file():
        try:
            verify(path)
        except CheckpointError as error:
            return None, str(error)
    return find_layout(path), None


def _layout(path: Path, place: Layout | None) -> str:
    kind = "folder" if place is None else place.kind
    if path.is_dir() and layouts.is_trainers(path):
        own = f"Trainer folder ({kind.removesuffix(' folder')})"
        kind = own if kind == ZERO else kind.replace("Accelerate", "Trainer")
    return f"{kind}, with {MANIFEST}" if (path / MANIFEST).is_file() else kind


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name + ':':<14}{value}" for name, value in rows)


def _rows(state: TrainingState) -> list[tuple[str, str]]:
    metadata: dict[str, Any] = state.extra.get("metadata", {})
    recipe = metadata.get("recipe")
    rows = [
        ("engine", state.engine),
        ("world size", str(state.world_size or "not recorded")),
        ("step", _step(state)),
        ("schedule", _schedule(state.schedule, layouts.switch_state(state))),
        *((f"group {i}", _group(group, state)) for i, group in enumerate(state.groups)),
        ("model", f"{len(state.model)} tensors, {_sizes(state.model.values())}"),
        *((f"  {key}", f"{len(tensors)} tensors, {_sizes(tensors)}") for key, tensors in _by_key(state)),
    ]
    without = [name for group in state.groups for name in group["params"] if name not in state.optimizer]
    if without:
        rows.append(("no state", f"{len(without)} parameters: {', '.join(without[:5])}"))
    if any(name.startswith("#") for group in state.groups for name in group["params"]):
        rows.append(("names", "none: to convert it, write them with robust_dist.checkpoint.note_parameters"))
    if "objects" in state.extra:
        rows.append(("extra state", ", ".join(state.extra["objects"])))
    if isinstance(recipe, dict):
        rows.append(("recipe", ", ".join(f"{key} {value}" for key, value in _recipe(recipe))))
    return rows


def _recipe(recipe: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    wanted = ("name", "model", "data", "epochs", "batch_size", "seed")
    for key in wanted:
        value = recipe.get(key)
        if value is not None:
            yield key, value.get("name", value) if isinstance(value, dict) else value


def _step(state: TrainingState) -> str:
    steps = sorted({int(entry["step"]) for entry in state.optimizer.values()})
    counts = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]) if steps else "none taken"
    noted = state.extra.get("step")
    return f"{counts} (by the optimizer's state)" if noted is None else f"{noted} (optimizer's state: {counts})"


def _schedule(schedule: dict[str, Any] | None, switch: dict[str, Any] | None) -> str:
    if schedule is None:
        return "none saved"
    step = schedule.get("last_epoch", schedule.get("step", "?"))
    switch = switch or (schedule if "switch_step" in schedule else schedule.get("weight_decay_switch"))
    return f"step {step}; {_decay(switch)}"


def _decay(switch: dict[str, Any] | None) -> str:
    from robust_dist.schedule.switch import first_step_off

    if not switch:
        return "no weight decay switch"
    total, at = switch["total_steps"], switch["switch_step"]
    if at is not None:
        return f"weight decay off since step {at} of {total}"
    first = first_step_off(switch["off_at"], total)
    return f"weight decay on, off from step {first} of {total} (off_at {switch['off_at']})"


def _group(group: dict[str, Any], state: TrainingState) -> str:
    names = group["params"]
    elements = sum(state.model[name].numel() for name in names if name in state.model)
    size = f" ({elements:,} elements)" if elements else ""
    values = [f"{key} {float(group[key]):.6g}" for key in ("lr", "weight_decay") if key in group]
    if group.get("rate_guard") is not None:
        values[0] = f"measured lr {Measured([group]).rate_of(group):.6g}"
    if group.get("averaging") is not None:
        values.append(f"averaging, holds the {'trained weights' if group[TRAINS] else 'average'}")
    return f"{len(names)} parameters{size}, {', '.join(values)}"


def _by_key(state: TrainingState) -> list[tuple[str, list[Tensor]]]:
    keys = dict.fromkeys(key for entry in state.optimizer.values() for key in entry)
    return [(key, [entry[key] for entry in state.optimizer.values() if key in entry]) for key in keys]


def _sizes(tensors: Iterable[Tensor]) -> str:
    bytes_of: Counter[str] = Counter()
    for tensor in tensors:
        bytes_of[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return ", ".join(f"{dtype} {size:,} bytes" for dtype, size in bytes_of.items()) or "empty"
