"""The work of operators: counts of operators, collectives and storages as they run, and a model's arithmetic.

The modes work on fake tensors as on real ones. Work that does not pass through torch's operators (a C or Triton kernel,
PIL) is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from robust_dist.measure.memory import storage_key

# They reserve memory without touching it, or hand the host one value.
_IDLE = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense")
)
# The host must know the values of their results, or their shapes.
_READING = frozenset(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"))
_INDEXING = frozenset(("aten::index", "aten::index_put_", "aten::index_put"))
_COPYING = frozenset(("aten::_to_copy", "aten::copy_"))
# They do not read what they write to.
_OVERWRITING = frozenset(("aten::copy_", "aten::fill_", "aten::zero_"))
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_SENDING_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")


class Watch(TorchDispatchMode):
    """Calls `note` after every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.note(func, args, kwargs, result)
        return result

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record one call.

        Args:
            func: The `OpOverload`.
            args: Its arguments.
            kwargs: Its arguments by name.
            result: What it returned.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Operation:
    """One ATen operation that is not a view.

    Attributes:
        flops: Floating-point operations, of matrix products and convolutions only.
        bytes: In the tensors that it reads and writes; an expanded tensor counts as its storage.
    """

    flops: float
    bytes: int


class Operations(Watch):
    """The ATen operations that are not views.

    Args:
        device: The host's waits for it are counted; None counts none.

    Attributes:
        found: In order.
        waits: Calls in which the host waits for a value of a tensor on `device`, as `.item()` does.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.found: list[Operation] = []
        self.waits = 0
        self._device = device.type if device is not None else None

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Count work and waits."""
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        name = func.name().partition(".")[0]
        self.waits += self._is_wait(name, inputs, outputs)
        if name in _IDLE or func.namespace == "prim" or _is_view(func, inputs, outputs):
            return
        given = {key: value for key, value in kwargs.items() if key != "out"}
        read = inputs[1:] if name in _OVERWRITING else _tensors((args, given))
        formula = flop_registry.get(func.overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
        self.found.append(Operation(flops, sum(_bytes(tensor) for tensor in (*read, *outputs))))

    def _is_wait(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if self._device is None:
            return False
        by_mask = name in _INDEXING and any(tensor.dtype == torch.bool for tensor in inputs[1:])
        if name in _READING or by_mask:
            return inputs[0].device.type == self._device
        leaves = name in _COPYING and self._device != "cpu" and inputs[-1].device.type == self._device
        return leaves and outputs[0].device.type == "cpu"


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable or not inputs or not outputs:
        return False
    known = set(map(storage_key, inputs))
    return all(storage_key(tensor) in known for tensor in outputs)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Collectives(Watch):
    """The collectives of torch.distributed: `names` has the operators called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep the name of a collective."""
        name = func.name()
        if func.namespace in _COLLECTIVES and not name.endswith(_SENDING_NOTHING):
            self.names.append(name)


class LiveBytes(Watch):
    """The storages that operators make, each from its first tensor to its last.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: The highest `live` since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Ignore these tensors' storages from now on."""
        self._known |= {storage_key(tensor): tensor.untyped_storage() for tensor in tensors}

    def restart(self) -> None:
        """Restart the peak from what is alive now."""
        self.peak = self.live

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add the new storages among the results."""
        for tensor in _tensors(result):
            self._add(storage_key(tensor), tensor.untyped_storage())

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size


@dataclass(frozen=True)
class Counts:
    """A call's work; means if calls differ.

    Attributes:
        operations: ATen operations that are not views; on a GPU, kernels, copies and fills.
        bytes: Of the inputs and outputs of these operations.
        waits: Times that the host waited for a value of a tensor on the device, as `.item()` does.
    """

    operations: float
    bytes: float
    waits: float


def count(call: Callable[[], object], device: torch.device, calls: int = 4) -> Counts:
    """Count the work of some calls; call it once before, so that its caches are filled.

    Args:
        call: The work; calls may differ by their random draws.
        device: Where it works. On a GPU torch's profiler counts the kernels of further calls.
        calls: Number of calls.
    """

    def several() -> None:
        for _ in range(calls):
            call()

    with Operations(device) as seen:
        several()
    operations = _kernels(several) if device.type == "cuda" else len(seen.found)
    return Counts(operations / calls, sum(operation.bytes for operation in seen.found) / calls, seen.waits / calls)


def _kernels(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in profiler.events() or [])


def training_flops(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Floating-point operations of one image's forward and backward pass; a multiply-add counts as two.

    Only matrix products and convolutions count, as is usual for MFU; recomputation and augmentation do not. The model
    runs on "meta" copies of its weights, so nothing is computed, and it is left as it was.

    Args:
        model: The whole model, before an engine shards it.
        image_shape: [C, H, W].

    Raises:
        Exception: Any that the model raises on the meta device.
    """
    weights = {
        name: weight.detach().to("meta").requires_grad_(weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    images = torch.empty(1, *image_shape, device="meta", dtype=next(model.parameters()).dtype)
    modes = {module: module.training for module in model.modules()}
    # In evaluation mode one image is enough for batch normalisation; the products are the same.
    model.eval()
    try:
        # On the meta device attention consists of plain matrix products, which all have a formula.
        with FlopCounterMode(display=False) as counter:
            functional_call(model, weights | buffers, (images,)).sum().backward()
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops())
