"""A whole optimizer step as one CUDA graph, over tensors with fixed addresses that the host fills and replays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robust_dist.data import Batch
from robust_dist.engines.accelerate import EngineError
from robust_dist.schedule import base_optimizer
from robust_dist.train.recipe import Recipe

# Ordinary steps before the capture, which create the optimizer's state and let libraries select and load kernels.
WARM_UP_STEPS = 3
_RATES = ("lr", "weight_decay")


def check_graph(accelerator: Accelerator, recipe: Recipe) -> None:
    """Reject `cuda_graph` if a step cannot be captured whole; the ValueError names the setting in the way."""
    if not recipe.cuda_graph:
        return
    kind, ranks, device = accelerator.distributed_type, accelerator.num_processes, accelerator.device.type
    if kind is not DistributedType.NO or ranks > 1:
        where, remedy = f"{ranks} rank(s) under {kind.value}", "start one process with `python launch/train.py`"
    elif device != "cuda":
        where, remedy = f"the device {device}", "run on a CUDA device"
    elif recipe.accumulation > 1:
        where, remedy = f"accumulation={recipe.accumulation}", "set accumulation=1 and micro_batch_size=null"
    elif recipe.precision.mixed == "fp16":
        where, remedy = "precision.mixed='fp16', whose scaler runs on the host", "set precision.mixed=bf16 or no"
    elif recipe.optimizer.name != "RAdaBeliefW":
        where, remedy = f"optimizer.name={recipe.optimizer.name!r}, which counts on the host", "set RAdaBeliefW"
    else:
        return
    raise ValueError(f"cuda_graph=True cannot capture a whole step with {where}: {remedy}, or set cuda_graph=false")


class DeviceRates:
    """Learning rate and weight decay of every param group as tensors that a captured step reads.

    Outside a step the groups of the (unwrapped) optimizer hold Python numbers, as others expect.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.capturable = optimizer, device.type == "cuda"
        groups = optimizer.param_groups
        # float64, so that the arithmetic sees the host's number.
        self._tensors = [{key: torch.zeros((), dtype=torch.float64, device=device) for key in _RATES} for _ in groups]
        self._filled = [dict.fromkeys(_RATES, 0.0) for _ in groups]

    def fill(self) -> None:
        """Copy the groups' current numbers into the tensors, without waiting."""
        for group, tensors, filled in zip(self.optimizer.param_groups, self._tensors, self._filled, strict=True):
            for key, tensor in tensors.items():
                if filled[key] != group[key]:
                    tensor.fill_(group[key])
                    filled[key] = group[key]

    @contextmanager
    def in_groups(self) -> Iterator[None]:
        """During a step, the groups hold the tensors, and are capturable on a GPU."""
        groups = self.optimizer.param_groups
        own = [{key: group[key] for key in (*_RATES, "capturable")} for group in groups]
        for group, tensors in zip(groups, self._tensors, strict=True):
            group.update(tensors, capturable=self.capturable)
        try:
            yield
        finally:
            for group, values in zip(groups, own, strict=True):
                group.update(values)


class StaticStep:
    """An optimizer step as a function of tensors with fixed addresses: on a GPU a CUDA graph, replayed.

    The first `WARM_UP_STEPS` steps over full batches run ordinarily, on the stream that captures the next one. Batches
    of another size (an epoch's last) and those with weights always do. After `optimizer.load_state_dict` it starts
    over. On other devices the same function is called at every step, with the same tensors.

    Args:
        step: One step over a batch: augmentation, passes and update. Decisions of the host in it are made only once.
        optimizer: The optimizer of `step`, wrapped or not. No other may step in between; schedules may.
        device: Where it runs.
        full_size: Number of samples in replayed batches.

    Raises:
        EngineError: At the first replay, if something in the step cannot be captured.
    """

    def __init__(self, step: Callable[[Batch], None], optimizer: Any, device: torch.device, full_size: int) -> None:
        self.step, self.full_size = step, full_size
        self.rates = DeviceRates(base_optimizer(optimizer), device)
        self._batch: Batch | None = None
        self.replay = _Graph(self.over_static, device) if device.type == "cuda" else _Call(self.over_static)
        # The loaded state has other addresses than the captured one.
        base_optimizer(optimizer).register_load_state_dict_post_hook(lambda _: self.replay.forget())

    def __call__(self, batch: Batch) -> None:
        """Train on a batch, with the rates in the optimizer's groups."""
        self.rates.fill()
        if len(batch.indices) != self.full_size or batch.weights is not None:
            self.replay.on_own_stream(lambda: self._run(batch))
            return
        if self._batch is None:
            self._batch = _static(batch)
        else:
            _refill(self._batch, batch)
        self.replay()

    def over_static(self) -> None:
        """Run the replayed step, over tensors with fixed addresses."""
        assert self._batch is not None
        self._run(self._batch)

    def _run(self, batch: Batch) -> None:
        with self.rates.in_groups():
            self.step(batch)


def _static(batch: Batch) -> Batch:
    """A batch with tensors of its own; a whole set is not copied, as it stays in place."""
    images, labels = batch.source if batch.whole else (own.clone() for own in batch.source)
    return Batch(images, labels, batch.indices.clone(), batch.keys.clone(), batch.global_size, whole=batch.whole)


def _refill(static: Batch, batch: Batch) -> None:
    static.indices.copy_(batch.indices, non_blocking=True)
    static.keys.copy_(batch.keys, non_blocking=True)
    if not static.whole:
        for own, new in zip(static.source, batch.source, strict=True):
            own.copy_(new, non_blocking=True)


class _Call:
    """Calls a function, in place of `_Graph` on devices without capture."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __call__(self) -> None:
        self.function()

    def forget(self) -> None:
        """Nothing is kept."""

    def on_own_stream(self, function: Callable[[], None]) -> None:
        function()


class _Graph:
    """A function whose kernels are captured after `WARM_UP_STEPS` ordinary calls and then replayed."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None and self.calls < WARM_UP_STEPS:
            self.calls += 1
            self.on_own_stream(self.function)
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def forget(self) -> None:
        """Capture again, after as many ordinary calls as at first."""
        self.graph, self.calls = None, 0

    def on_own_stream(self, function: Callable[[], None]) -> None:
        """Call a function on the capturing stream, ordered with the current stream before and after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a checkpoint's writer, a loader) may continue their own work meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.function()
        except RuntimeError as error:
            raise EngineError(
                f"cuda_graph=True: the step cannot be captured ({error}); set cuda_graph=false, or use a model whose "
                "forward pass does not synchronise"
            ) from error
        return graph
