"""A training state independent of any engine, and the names of its parameters.

DDP's files number the optimizer's parameters; every other engine's name them. `note_parameters` writes the names
beside a checkpoint; without it they are inferred from torch's `param_names`, or from order and shapes if these allow
only one answer.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_dist.checkpoint.store import CheckpointError, write_atomically
from robust_dist.engines.engine import UNNOTED
from robust_dist.optim.groups import clean_name, reshard
from robust_dist.ranks.talk import rank

SIDECAR = "parameters.json"
WRAPPED = "module."
_COMPILED = "_orig_mod."
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_MOST_PATHS = 10_000
Shape = tuple[int, ...] | None


@dataclass
class TrainingState:
    """Everything needed to continue a run, whole and on the CPU.

    Attributes:
        model: Every entry of the model's `state_dict` by its name without wrapper prefixes: parameters (the float32
            master if the engine kept one) and buffers.
        optimizer: For each parameter with state: name -> {"step": 0-d float32, "exp_avg": shape of the parameter,
            "exp_avg_sq": the same}, and with averaging "z": the same.
        groups: The optimizer's param groups, with parameter names in "params", in the optimizer's order.
        schedule: `state_dict()` of the schedule, or None.
        engine: The kind of checkpoint it was read from: "ddp", "fsdp", "zero0" ... "zero3".
        world_size: Number of ranks that wrote it; None if unknown.
        extra: JSON values to carry over (the run's recipe, its step); "objects" are the model's entries that are not
            parameters or buffers, by name: the return values of its modules' `get_extra_state`.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any] | None = None
    engine: str = UNNOTED
    world_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The model's whole `state_dict`, including extra state."""
        return {**self.model, **self.extra.get("objects", {})}


def split_objects(module: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's `state_dict` as (tensors, torch's extra state and other entries that are not tensors)."""
    objects = {n: v for n, v in module.items() if not isinstance(v, Tensor) or n.rpartition(".")[2] == "_extra_state"}
    return {name: value for name, value in module.items() if name not in objects}, objects


class UnnamedError(CheckpointError):
    """A checkpoint numbers its parameters, and order and shapes do not identify them."""


@dataclass(frozen=True)
class ParameterNames:
    """The contents of `parameters.json`.

    Attributes:
        groups: The parameter names of each of the optimizer's groups, in its order.
        shared: For each other name of a shared parameter (omitted in safetensors files), its first name.
        buffers: The model's buffers; None if unknown.
        frozen: Parameters that need no gradient; None if unknown.
        world_size: Number of ranks that the checkpoint is for; None if unknown.
    """

    groups: list[list[str]]
    shared: dict[str, str] = field(default_factory=dict)
    buffers: list[str] | None = None
    frozen: list[str] | None = None
    world_size: int | None = None

    def extra(self) -> dict[str, Any]:
        """The part that a `TrainingState` carries."""
        known = {"shared": self.shared or None, "buffers": self.buffers, "frozen": self.frozen}
        return {key: value for key, value in known.items() if value is not None}


def bare_names(names: Iterable[str], known: Iterable[str] = (), *, unwrap: bool = False) -> list[str]:
    """The names without wrapper prefixes, as far as names can prove them to be such.

    A "module." prefix on every name may come from DDP or be the model's own only child. It is removed if `known` (names
    of the same model from elsewhere) proves that a wrapper added it, or if the caller passes `unwrap`.
    """
    given, others = list(names), set(known)
    bare = _without_wrappers(given, others)
    if not bare or not all(name.startswith(WRAPPED) for name in bare):
        return bare
    short = [name.removeprefix(WRAPPED) for name in bare]
    proven = bool(others) and _agree(set(short), others) and not _agree(set(bare), others)
    return short if unwrap or proven else bare


def _without_wrappers(given: list[str], others: set[str]) -> list[str]:
    """The names without wrapper components, unless names prove that these are the model's own."""
    clean = [clean_name(name) for name in given]
    compiled = all(name.startswith(_COMPILED) for name in given)
    outer = [name.removeprefix(_COMPILED) for name in given] if compiled else given
    proven = next((names for names in (given, outer) if others and _agree(set(names), others)), None)
    # Wrappers never make two names equal.
    return proven or (outer if len(set(clean)) < len(set(given)) else clean)


def _agree(names: set[str], others: set[str]) -> bool:
    """Whether one set may be a subset of the other, as an optimizer's names are of a model's."""
    return names <= others or others <= names


def bare(model: Mapping[str, Tensor], known: Iterable[str] = (), *, unwrap: bool = False) -> dict[str, Tensor]:
    """A model's state with `bare_names`."""
    return dict(zip(bare_names(model, known, unwrap=unwrap), model.values(), strict=True))


def note_parameters(folder: str | Path, model: nn.Module, optimizer: Any) -> None:
    """Write `parameters.json`, which names the optimizer's parameters, into a checkpoint's folder.

    DDP's `optimizer.bin` numbers the parameters; with this note the checkpoint can be converted. It can also be written
    later, by a script that builds the same model and optimizer. Files of sharding engines contain the names. Rank 0
    writes; under FSDP2 every rank must call this, elsewhere every rank may.

    Args:
        folder: The checkpoint's folder.
        model: The model whose parameters the optimizer steps, with or without a DDP or FSDP wrapper.
        optimizer: The optimizer, or Accelerate's wrapper around it.

    Raises:
        CheckpointError: The optimizer has a parameter that is not in the model.
    """
    # On every rank: otherwise only some ranks would gather in the next forward pass.
    reshard(model)
    if rank() != 0:
        return
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    named = {clean_name(name, model): tensor for name, tensor in pairs}
    for name, tensor in named.items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            shared[name] = known
    groups = [[_name_of(param, first) for param in group["params"]] for group in optimizer.param_groups]
    own = {name: tensor for name, tensor in named.items() if name not in shared}
    buffers = [name for name, tensor in own.items() if not isinstance(tensor, nn.Parameter)]
    frozen = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad]
    write_names(Path(folder), ParameterNames(groups, shared, buffers, frozen))


def _name_of(param: Tensor, names: Mapping[int, str]) -> str:
    if id(param) not in names:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {tuple(param.shape)} that is not in the model: pass "
            "note_parameters the model whose parameters the optimizer steps (under ZeRO no note is needed)"
        )
    return names[id(param)]


def write_names(folder: Path, names: ParameterNames) -> None:
    """Write the note into `folder`."""
    write_atomically(folder / SIDECAR, json.dumps(asdict(names), indent=1))


def read_names(folder: Path) -> ParameterNames | None:
    """The note in `folder`, or None; a CheckpointError if it does not have the form {"groups": [[name, ...], ...]}."""
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        groups = [[str(name) for name in group] for group in noted["groups"]]
        rest = {key: noted.get(key) for key in ("buffers", "frozen", "world_size")}
        return ParameterNames(groups, dict(noted.get("shared") or {}), **rest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path}: does not have the form {{"groups": [[name, ...], ...]}} ({error!r})') from None


def name_groups(
    groups: list[dict[str, Any]],
    shapes: Mapping[Any, Shape],
    model: Mapping[str, Tensor],
    noted: ParameterNames | None,
    *,
    ordered: bool,
    where: Path,
) -> list[list[str]]:
    """The names of a numbered optimizer state's parameters, by group.

    Args:
        groups: Its param groups, with numbers in "params".
        shapes: The shape of each number's state.
        model: The model's state, with bare names.
        noted: The note beside the checkpoint.
        ordered: Whether `model` is in the model's own order.
        where: The file, for messages.

    Raises:
        UnnamedError: Nothing names them, and order and shapes allow several answers or none.
        CheckpointError: The note or `param_names` does not fit the groups.
    """
    names = [group.get("param_names") for group in groups]
    sizes = [len(group["params"]) for group in groups]
    if noted is not None:
        found: list[list[str]] | None = noted.groups
    elif all(isinstance(given, (list, tuple)) for given in names):
        every = iter(bare_names((str(name) for given in names if given for name in given), model))
        found = [list(islice(every, size)) for size in sizes]
    else:
        wanted = [[shapes.get(number) for number in group["params"]] for group in groups]
        found = _tell(wanted, model, ordered)
    if found is None:
        raise UnnamedError(
            f"{where}: numbers its parameters, and order and shapes do not identify them uniquely; build the "
            f"model and the optimizer as in training and call robust_dist.checkpoint.note_parameters("
            f"{str(where.parent)!r}, model, optimizer), which writes {SIDECAR} beside it"
        )
    if [len(group) for group in found] != sizes:
        raise CheckpointError(
            f"{where}: its groups have {sizes} parameters, but {where.parent / SIDECAR} names "
            f"{[len(group) for group in found]}; write that note again with the model and optimizer of this checkpoint"
        )
    return found


def _candidates(model: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """Entries that may be parameters: no integers, no batch statistics, each shared tensor once."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = []
    for name, tensor in model.items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape))
        floating = torch.is_floating_point(tensor) or torch.is_complex(tensor)
        if floating and name.rpartition(".")[2] not in _STATISTICS and key not in seen:
            seen.add(key)
            found.append((name, tuple(tensor.shape)))
    return found


def _tell(wanted: list[list[Shape]], model: Mapping[str, Tensor], ordered: bool) -> list[list[str]] | None:
    candidates = _candidates(model)
    by_shape = _by_shape(wanted, candidates)
    return by_shape if by_shape is not None or not ordered else _by_order(wanted, candidates)


def _by_shape(wanted: list[list[Shape]], candidates: list[tuple[str, tuple[int, ...]]]) -> list[list[str]] | None:
    """The names, if every shape occurs once."""
    names = {shape: name for name, shape in candidates}
    asked = Counter(shape for group in wanted for shape in group)
    there = Counter(shape for _, shape in candidates)
    if any(shape is None or asked[shape] != 1 or there[shape] != 1 for shape in asked):
        return None
    return [[names[shape] for shape in group if shape is not None] for group in wanted]


def _by_order(wanted: list[list[Shape]], candidates: list[tuple[str, tuple[int, ...]]]) -> list[list[str]] | None:
    """The names, if exactly one merge of the groups gives the model's own order.

    A state is the number of parameters consumed from each group; `ways` counts the paths to it, up to 2.
    """
    total = sum(len(group) for group in wanted)
    ways: dict[tuple[int, ...], int] = {(0,) * len(wanted): 1}
    came: list[dict[tuple[int, ...], int | None]] = []
    for _, shape in candidates:
        layer: dict[tuple[int, ...], int] = {}
        choice: dict[tuple[int, ...], int | None] = {}
        for used, count in ways.items():
            for group in _next_groups(wanted, used, shape, may_skip=len(candidates) > total):
                after = used if group is None else tuple(n + (i == group) for i, n in enumerate(used))
                layer[after] = min(2, layer.get(after, 0) + count)
                choice[after] = group
        ways = layer
        came.append(choice)
        if len(ways) > _MOST_PATHS:
            return None
    end = tuple(len(group) for group in wanted)
    return _walk_back(end, came, candidates) if ways.get(end) == 1 else None


def _next_groups(
    wanted: list[list[Shape]], used: tuple[int, ...], shape: tuple[int, ...], *, may_skip: bool
) -> list[int | None]:
    fitting: list[int | None] = [
        i for i, group in enumerate(wanted) if used[i] < len(group) and group[used[i]] in (None, shape)
    ]
    return [*fitting, None] if may_skip else fitting


def _walk_back(
    end: tuple[int, ...], came: list[dict[tuple[int, ...], int | None]], candidates: list[tuple[str, tuple[int, ...]]]
) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in end]
    at = end
    for choice, (name, _) in zip(reversed(came), reversed(candidates), strict=True):
        group = choice[at]
        if group is not None:
            found[group].append(name)
            at = tuple(n - (i == group) for i, n in enumerate(at))
    return [group[::-1] for group in found]
