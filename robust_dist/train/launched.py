"""What `accelerate launch` was asked for, as far as a rank can see; a configuration for GPUs needs GPUs."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from robust_dist.engines.accelerate import EngineError

_LAUNCHER = re.compile(r"(^|/)accelerate(-launch)?$|^accelerate\.commands\.")
_SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def check_launch() -> None:
    """Refuse ranks that a configuration for GPUs started on a host that has none, or one process in place of several.

    FSDP is refused elsewhere; DeepSpeed finds the processor by itself. With ACCELERATE_USE_CPU=true ranks on a
    processor are what was asked for.

    Raises:
        EngineError: Says how the same is started on the processor.
    """
    if torch.cuda.is_available() or any(_is_true(name) for name in (*_SHARDING, "ACCELERATE_USE_CPU")):
        return
    words = _launcher_words()
    wanted, found = gpus_wanted(words), int(os.environ.get("WORLD_SIZE", "1"))
    ranks = max(found, int(_option(words, "--num_processes") or 1)) if _is_launcher(words) else found
    if wanted:
        problem = (
            f"{wanted}, and torch sees no GPU here; {ranks} ranks on the processor would be slow and may need more "
        )
        problem += "memory than there is"
    elif "RANK" not in os.environ and ranks > 1:
        problem = f"accelerate launch was asked for {ranks} processes and started ONE, as torch sees no GPU here"
    else:
        return
    raise EngineError(
        f"{problem}. If you want ranks on the processor: accelerate launch --config_file configs/accelerate/cpu.yaml "
        f"--num_processes {min(ranks, cores_here())} {shlex.join(_script(words))}"
    )


def gpus_wanted(words: Sequence[str]) -> str | None:
    """Which file of a launcher's command line is a configuration for the GPUs of one host; None where none is.

    Args:
        words: The launcher's command line, `accelerate launch --config_file FILE ... SCRIPT ...`.
    """
    if not _is_launcher(words):
        return None
    name = _option(words, "--config_file")
    try:
        config: Any = yaml.safe_load(Path(name).read_text(encoding="utf-8")) if name else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or config.get("use_cpu") or config.get("distributed_type") != "MULTI_GPU":
        return None
    if int(_option(words, "--num_machines") or config.get("num_machines") or 1) > 1:
        return None
    return f"{name} is for GPUs (distributed_type: MULTI_GPU, use_cpu: false)"


def _is_launcher(words: Sequence[str]) -> bool:
    return any(_LAUNCHER.search(word) for word in words)


def cores_here() -> int:
    """Cores of this host that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of a launcher's option; the training command's own do not count."""
    words = words[: _script_at(words)]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _script(words: Sequence[str]) -> list[str]:
    """The training command in a launcher's words."""
    return list(words[_script_at(words) :]) or ["launch/train.py"]


def _script_at(words: Sequence[str]) -> int:
    return next((number for number, word in enumerate(words) if word.endswith("train.py")), len(words))


def _launcher_words() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
