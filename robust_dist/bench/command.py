"""The words of `robust-dist bench`."""

import argparse
from collections.abc import Callable
from typing import Any

_ROUNDS, _THREADS, _BATCH = "--rounds", "--threads", "--batch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a sub-command with its options for each benchmark."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    optimizer = _add(kinds, "optimizer", "a step of RAdaBeliefW beside other optimizers and the memory's speed")
    optimizer.add_argument("--sets", nargs="+", help="parameter sets: resnet56 resnet18 resnet50 vit_l flat")
    _add_device(optimizer)
    augment = _add(
        kinds, "augment", "TrivialAugment, CutMix and the whole pipeline beside torchvision, kornia, DALI, timm"
    )
    augment.add_argument(
        _BATCH, type=int, help="images a call: of 32x32, and an eighth of it of 224x224 (default: 512)"
    )
    augment.add_argument("--compile", action="store_true", help="also time ours through torch.compile")
    _add_device(augment)
    train = _add(kinds, "train", "images a second of whole training steps, with and without augmentation", rounds=None)
    train.add_argument(_BATCH, type=int, help="images a step (default: 128)")
    train.add_argument("--models", nargs="+", help="models by name (default: resnet56 resnet18_cifar)")
    train.add_argument("--precision", choices=["no", "bf16"], help="autocast (default: bf16 on a GPU, else no)")
    train.add_argument("--compile", action="store_true", help="also with the augmentation through torch.compile")
    train.add_argument("--cuda-graph", action="store_true", help="also with the step captured in a CUDA graph")
    _add_device(train)
    data = _add(kinds, "data", "reading images that do not fit a device, beside torchvision, datasets, webdataset")
    data.add_argument("--images", type=int, help="number of images to make (default: by the size)")
    sizes = ("500x375", "1600x1200", "4000x3000")
    data.add_argument("--size", nargs="+", choices=sizes, default=sizes[:1], help="of the images, a table each")
    data.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="of the images (default: %(default)s)")
    data.add_argument("--workers", type=int, help="processes that read (default: one per core)")
    data.add_argument("--step-ms", type=float, help="the consumer's time on a batch for data wait, ms")
    _add(kinds, "checkpoint", "what a checkpoint costs training")
    host = _add(kinds, "host", "the host's time of a steady optimizer step, launches left out", rounds=3)
    host.add_argument("--beside", metavar="DIR", help="also time the version in this folder in the same run")
    _add(kinds, "dtensor", "a step on sharded parameters beside their local tensors")
    _add(kinds, "scale", "shards, memory, collectives up to 16,384 ranks")


def _add(kinds: Any, name: str, text: str, *, rounds: int | None = 7) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
    shown = "fewer on a CPU" if rounds is None else "%(default)s"
    parser.add_argument(_ROUNDS, type=int, default=rounds, help=f"turns of every contender (default: {shown})")
    parser.add_argument(_THREADS, type=int, help="CPU threads (default: torch's own choice)")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--out", metavar="DIR", help="also write the table (Markdown) and a picture (PNG) there")


def run(words: argparse.Namespace) -> int:
    """Print the table of one benchmark; returns the exit status, always 0.

    Args:
        words: Parsed words of `robust-dist bench`.

    Raises:
        ValueError: --threads below 1, or whatever the benchmark refuses.
    """
    import torch

    if words.threads is not None and words.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {words.threads}")
    if words.threads is not None:
        torch.set_num_threads(words.threads)
    print(_BENCHMARKS[words.what](words))
    if getattr(words, "out", None):
        print(f"\nwrote {words.out}/{words.what}.md and {words.what}.png")
    return 0


def _given(words: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The given options; the benchmark's own defaults hold for the others."""
    return {name: getattr(words, name) for name in names if getattr(words, name) is not None}


def _optimizer(words: argparse.Namespace) -> str:
    from robust_dist.bench.optimizer import bench_optimizer

    return bench_optimizer(**_given(words, "sets", "rounds", "threads", "device", "out"))


def _augment(words: argparse.Namespace) -> str:
    from robust_dist.bench.augment import bench_augment

    sizes = {} if words.batch is None else {"batch_32": words.batch, "batch_224": words.batch // 8}
    return bench_augment(**sizes, **_given(words, "rounds", "threads", "device", "out"), compiled=words.compile)


def _train(words: argparse.Namespace) -> str:
    from robust_dist.bench.train import bench_train

    given = _given(words, "batch", "models", "precision", "rounds", "threads", "device", "out")
    return bench_train(**given, compiled=words.compile, cuda_graph=words.cuda_graph)


def _data(words: argparse.Namespace) -> str:
    from robust_dist.bench.data import bench_data

    given = {name: getattr(words, name) for name in ("images", "workers", "rounds", "step_ms", "format")}
    return "\n\n".join(bench_data(size=size, **given) for size in words.size)


def _checkpoint(words: argparse.Namespace) -> str:
    from robust_dist.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(rounds=words.rounds)


def _dtensor(words: argparse.Namespace) -> str:
    from robust_dist.bench.dtensor import bench_dtensor

    return bench_dtensor(rounds=words.rounds)


def _host(words: argparse.Namespace) -> str:
    from robust_dist.bench.host_step import bench_host

    return bench_host(**_given(words, "rounds", "beside"))


def _scale(_: argparse.Namespace) -> str:
    from robust_dist.bench.scale import bench_scale

    return bench_scale()


_BENCHMARKS: dict[str, Callable[[argparse.Namespace], str]] = {
    "optimizer": _optimizer,
    "augment": _augment,
    "train": _train,
    "data": _data,
    "checkpoint": _checkpoint,
    "host": _host,
    "dtensor": _dtensor,
    "scale": _scale,
}
