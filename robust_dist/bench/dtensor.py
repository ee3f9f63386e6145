"""The optimizer step on DTensors compared with the same step on their local tensors: `robust-dist bench dtensor`."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim.optimizer import Optimizer

from robust_dist.bench.timing import Timing, machine
from robust_dist.measure.table import table
from robust_dist.optim import RAdaBeliefW
from robust_dist.validate import whole_number

WORLD, TENSORS, WIDTH = 2, 200, 32
_WARM_UP = 6  # past the unrectified steps

Maker = Callable[[list[Tensor]], Optimizer]


@dataclass(frozen=True)
class Row:
    """One optimizer on DTensor parameters and on plain ones of the same local shapes.

    Attributes:
        optimizer: The contender's name.
        dtensor: Seconds per step on DTensors.
        plain: Seconds per step on plain tensors.
        ratio: Median over the rounds of `dtensor` divided by `plain`, on the slowest rank.
    """

    optimizer: str
    dtensor: Timing
    plain: Timing
    ratio: float


def _makers() -> dict[str, Maker]:
    return {
        "RAdaBeliefW": RAdaBeliefW,
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    }


def _sharded(tensors: int) -> list[Tensor]:
    """The parameters (`tensors` of them) of a model under fully_shard, with the gradients of a backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(tensors // 2)))
    fully_shard(layers, mesh=init_device_mesh("cpu", (WORLD,)))
    layers(torch.randn(8, WIDTH)).square().mean().backward()
    return [*layers.parameters()]


def _plain(sharded: list[Tensor]) -> list[Tensor]:
    """Their local tensors as separate parameters."""
    params: list[Tensor] = []
    for whole in sharded:
        assert whole.grad is not None
        param = torch.nn.Parameter(whole.detach().to_local().clone())  # type: ignore[attr-defined]
        param.grad = whole.grad.to_local().clone()  # type: ignore[attr-defined]
        params.append(param)
    return params


def _seconds(step: Callable[[], object], repeats: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def _samples(steps: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step: every contender takes its turn in every round, on all ranks at once."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(_WARM_UP):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(_seconds(step, repeats))
    return found


def _row(name: str, dtensor: list[float], plain: list[float]) -> Row:
    ratio = torch.tensor(statistics.median(a / b for a, b in zip(dtensor, plain, strict=True)))
    dist.all_reduce(ratio, op=dist.ReduceOp.MAX)
    on_dtensors, on_plain = (Timing(statistics.median(s), min(s), max(s)) for s in (dtensor, plain))
    return Row(name, on_dtensors, on_plain, ratio.item())


def measure(*, tensors: int = TENSORS, rounds: int = 15, repeats: int = 4) -> list[Row]:
    """Time the contenders in the default process group; call it on each of its `WORLD` ranks.

    Args:
        tensors: Number of parameters, an even one.
        rounds: Measurements of each contender.
        repeats: Steps in one measurement.

    Returns:
        A row for each optimizer, with this rank's times and the largest ratio of any rank.

    Raises:
        ValueError: The process group has another number of ranks.
    """
    if dist.get_world_size() != WORLD:
        raise ValueError(f"this benchmark runs on {WORLD} ranks, the process group has {dist.get_world_size()}")
    steps = {}
    for name, make in _makers().items():
        sharded = _sharded(tensors)
        steps[f"{name} dtensor"] = make(sharded).step
        steps[f"{name} plain"] = make(_plain(sharded)).step
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        times = _samples(steps, rounds, repeats)
    return [_row(name, times[f"{name} dtensor"], times[f"{name} plain"]) for name in _makers()]


def _rank_main(rank: int, folder: str, rounds: int, tensors: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    try:
        rows = measure(rounds=rounds, tensors=tensors)
        if rank == 0:
            Path(folder, "table.md").write_text(_table(rows, rounds, tensors), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f} ({timing.low * 1e3:.2f} to {timing.high * 1e3:.2f})"


def _table(rows: Sequence[Row], rounds: int, tensors: int) -> str:
    lines = [
        f"{machine()}; median (lowest to highest) of {rounds} rounds, contenders in turn, {WORLD} ranks at once",
        "",
        f"{tensors} parameters under fully_shard, half of {(WIDTH, WIDTH)} and half of {(WIDTH,)}.",
        "",
        table(
            ["optimizer", "on DTensors, ms", "on their local tensors, ms", "ratio"],
            [[r.optimizer, _milliseconds(r.dtensor), _milliseconds(r.plain), f"{r.ratio:.2f}"] for r in rows],
        ),
    ]
    return "\n".join(lines)


def bench_dtensor(*, rounds: int = 25, tensors: int = TENSORS) -> str:
    """The times of `measure` on two gloo ranks on this machine, as a Markdown table.

    Args:
        rounds: Measurements of each contender.
        tensors: Number of parameters, an even one.

    Raises:
        ValueError: rounds below 1, or tensors not an even number above 0.
    """
    whole_number("rounds", rounds, 1)
    if tensors < 2 or tensors % 2:
        raise ValueError(f"tensors must be an even number above 0 (weights and biases), got {tensors}")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank_main, (folder, rounds, tensors), nprocs=WORLD)
        return Path(folder, "table.md").read_text(encoding="utf-8")
