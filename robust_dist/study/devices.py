"""Which part of the machine each worker gets: a GPU, or a share of the threads."""

from collections.abc import Mapping

from robust_dist.surroundings import usable_cores

# A launcher's variables, which would make a run wait for ranks that never come.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    named = environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(index) for index in range(count)] if named is None else [n.strip() for n in named.split(",") if n]
    return found[:count]


def slot_environment(slot: int, num_slots: int, gpus: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of worker `slot`'s training process.

    GPUs go round by the worker's index; more workers than GPUs share them. Without GPUs every worker has an equal share
    of the cores as threads, unless OMP_NUM_THREADS says how many each has.

    Args:
        slot: Which of the workers, from 0.
        num_slots: How many there are in this command.
        gpus: `gpus()`.
        environ: This process's environment.
    """
    ours = {k: v for k, v in environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC_")}
    if gpus:
        return ours | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    share = str(max(1, int(usable_cores() / num_slots)))
    return ours | {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", share)}
