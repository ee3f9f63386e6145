"""The optimizer step's time beside the peers and the memory's speed: `robust-dist bench optimizer`."""

import argparse
import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from robust_dist.bench.scale import resnet50, vit_large
from robust_dist.bench.timing import Timing, interleaved, machine
from robust_dist.optim import RAdaBeliefW

BYTES_PER_PARAMETER = 28  # float32: read p, g, m, v and write p, m, v
TRIAD = "a += 0.5 b (the memory's speed)"
RADAM = "torch RAdam foreach"
ADAMW_FUSED = "torch AdamW fused"
SLOW = ("RAdaBeliefW foreach=False", "torch AdamW foreach", "timm AdaBelief", "adabelief-pytorch")

Shape = tuple[int, ...]
Maker = Callable[[list[Tensor]], Optimizer]


def _block(c_in: int, c_out: int, *, shortcut: bool) -> list[Shape]:
    norm: list[Shape] = [(c_out,), (c_out,)]
    shapes: list[Shape] = [(c_out, c_in, 3, 3), *norm, (c_out, c_out, 3, 3), *norm]
    return shapes + ([(c_out, c_in, 1, 1), *norm] if shortcut else [])


def _resnet(stem: int, widths: Sequence[int], blocks: int, *, shortcut: bool) -> list[Shape]:
    shapes: list[Shape] = [(stem, 3, 3, 3), (stem,), (stem,)]
    c_in = stem
    for width in widths:
        for _ in range(blocks):
            shapes += _block(c_in, width, shortcut=shortcut and c_in != width)
            c_in = width
    return [*shapes, (10, c_in), (10,)]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "resnet56": lambda: _resnet(16, (16, 32, 64), 9, shortcut=False),
    "resnet18": lambda: _resnet(64, (64, 128, 256, 512), 2, shortcut=True),
    "resnet50": resnet50,
    "vit_l": vit_large,
    "flat": lambda: [(100_000_000,)],
}
# Of each of the triad's two arrays: far beyond any cache; a large set's bytes are moved in several passes.
TRIAD_ELEMENTS = 50_000_000
# Parameters from which on the slow contenders are left out: each one's state is 8 bytes a parameter.
LARGE = 200_000_000


@dataclass(frozen=True)
class Row:
    """One optimizer on one set of parameters.

    Attributes:
        parameters: Name of the set.
        tensors: Number of tensors in it.
        elements: Number of parameters in it.
        optimizer: Name of the contender.
        timing: Seconds per step.
        to_radam: Its median over that of torch's RAdam foreach.
        to_adamw_fused: Its median over that of torch's AdamW fused.
        bandwidth: Bytes per second, if it moved `BYTES_PER_PARAMETER`.
        of_triad: The median of an in-place triad that moves as many bytes, over its own.
    """

    parameters: str
    tensors: int
    elements: int
    optimizer: str
    timing: Timing
    to_radam: float
    to_adamw_fused: float
    bandwidth: float
    of_triad: float


def _adabelief_pytorch(params: list[Tensor]) -> Optimizer:
    module = importlib.import_module("adabelief_pytorch")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.AdaBelief(params, lr=1e-2, eps=1e-8, weight_decay=1e-2, print_change_log=False)


def _timm(params: list[Tensor], *, rectify: bool) -> Optimizer:
    module = importlib.import_module("timm.optim")
    return module.AdaBelief(params, lr=1e-2, eps=1e-8, weight_decay=1e-2, rectify=rectify)


def _makers() -> dict[str, Maker]:
    return {
        "RAdaBeliefW": RAdaBeliefW,
        "RAdaBeliefW foreach": lambda p: RAdaBeliefW(p, foreach=True),
        "RAdaBeliefW foreach=False": lambda p: RAdaBeliefW(p, foreach=False),
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        ADAMW_FUSED: lambda p: torch.optim.AdamW(p, fused=True),
        RADAM: lambda p: torch.optim.RAdam(p, foreach=True, weight_decay=1e-2, decoupled_weight_decay=True),
        "timm AdaBelief": lambda p: _timm(p, rectify=False),
        "timm RAdaBelief": lambda p: _timm(p, rectify=True),
        "adabelief-pytorch": _adabelief_pytorch,
    }


def _parameters(shapes: Sequence[Shape], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(device)
    return params


def _triad(elements: int, device: torch.device) -> Callable[[], object]:
    size = elements * BYTES_PER_PARAMETER // 12
    parts = -(-size // TRIAD_ELEMENTS)
    # in place as an optimizer is: a third array's lines would be read before they are written
    a, b = torch.zeros(size // parts, device=device), torch.ones(size // parts, device=device)

    def triad() -> None:
        for _ in range(parts):
            a.add_(b, alpha=0.5)

    return triad


def _contenders(shapes: Sequence[Shape], device: torch.device) -> tuple[dict[str, Callable[[], object]], list[str]]:
    elements = sum(map(_numel, shapes))
    found: dict[str, Callable[[], object]] = {TRIAD: _triad(elements, device)}
    missing = []
    # All step the same parameters: only their states would fill the memory.
    params = _parameters(shapes, device)
    for name, make in _makers().items():
        if elements >= LARGE and name in SLOW:
            continue
        try:
            found[name] = make(params).step
        except ImportError:
            missing.append(name)
    return found, missing


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _set_rows(name: str, rounds: int, device: torch.device) -> tuple[list[Row], list[str]]:
    shapes = SETS[name]()
    elements = sum(map(_numel, shapes))
    contenders, missing = _contenders(shapes, device)
    times = interleaved(contenders, rounds=rounds)
    radam, fused, triad = (times[key].median for key in (RADAM, ADAMW_FUSED, TRIAD))
    rows = []
    for optimizer, timing in times.items():
        speed = BYTES_PER_PARAMETER * elements / timing.median
        ratios = (timing.median / radam, timing.median / fused, speed, triad / timing.median)
        rows.append(Row(name, len(shapes), elements, optimizer, timing, *ratios))
    return rows, missing


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(sets: Sequence[str], rounds: int, threads: int | None) -> None:
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise ValueError(f"sets must name some of {tuple(SETS)}, got {tuple(sets)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1 or None, got {threads}")


def run(
    *, sets: Sequence[str] = tuple(SETS), rounds: int = 7, threads: int | None = None, device: str | None = None
) -> tuple[list[Row], list[str]]:
    """Time a step of every optimizer that is installed, all in turn in every round.

    Args:
        sets: Names among `SETS`.
        rounds: Measurements of each.
        threads: Threads of torch on the CPU; None leaves them.
        device: A torch device; None takes the GPU if there is one.

    Returns:
        The rows, and the names of the peers that are not installed.

    Raises:
        ValueError: An unknown set, or rounds or threads below 1.
    """
    _check(sets, rounds, threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    missing: list[str] = []
    with _threads(threads):
        for name in sets:
            found, missing = _set_rows(name, rounds, where)
            rows += found
    return rows, missing


def _line(row: Row) -> str:
    t = row.timing
    time = f"{t.median * 1e3:.3f} ({t.low * 1e3:.3f} to {t.high * 1e3:.3f})"
    ratios = f"{row.to_radam:.2f} | {row.to_adamw_fused:.2f}"
    return (
        f"| {row.parameters} | {row.optimizer} | {time} | {ratios} | {row.bandwidth / 1e9:.1f} | {row.of_triad:.0%} |"
    )


def bench_optimizer(
    *, sets: Sequence[str] = tuple(SETS), rounds: int = 7, threads: int | None = None, device: str | None = None
) -> str:
    """The times of `run` as a Markdown table, with the machine and what was left out."""
    rows, missing = run(sets=sets, rounds=rounds, threads=threads, device=device)
    with _threads(threads):
        lines = [f"{machine()}; median (lowest to highest) of {rounds} rounds, contenders in turn", ""]
    lines += [f"- {row.parameters}: {row.tensors} tensors, {row.elements:,} parameters" for row in rows if _first(row)]
    lines += [f"- left out, not installed: {', '.join(missing)}"] if missing else []
    lines += [f"- left out from {LARGE:,} parameters on, for their memory: {', '.join(SLOW)}"]
    lines += ["", f"GB/s and the share of the triad take {BYTES_PER_PARAMETER} bytes per parameter and step.", ""]
    lines += ["| parameters | optimizer | ms | / RAdam foreach | / AdamW fused | GB/s | of triad |"]
    lines += ["|---|---|---|---|---|---|---|", *map(_line, rows)]
    return "\n".join(lines)


def _first(row: Row) -> bool:
    return row.optimizer == TRIAD


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--help` lists the options.

    Args:
        argv: Command-line words; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="robust-dist bench optimizer", description=__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="parameter sets")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads on the CPU")
    parser.add_argument("--device", default=None, help="torch device; the GPU if there is one")
    print(bench_optimizer(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
