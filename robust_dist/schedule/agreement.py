"""What ranks must have alike, and the error that says where they do not."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

_SHOWN = 26

TRIGGERS = ("at a step", "any rank's", "all ranks'", "the majority's")


class RankDisagreementError(RuntimeError):
    """Ranks that must schedule alike do not; the message lists every rank's values."""


def taking_part(group: dist.ProcessGroup | None) -> bool:
    """Whether this process has others in `group` (None: the default group) to agree with."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor must be for `group` to reduce it: the CPU where the backend takes it, else the current device."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    kind = devices[0]
    return torch.device(kind, getattr(torch, kind).current_device())


@dataclass(frozen=True)
class Report:
    """What every rank must have alike as it makes the same optimizer step."""

    total_steps: int
    off_at: float
    step: int
    trigger: str
    decay_is_off: bool
    base_weight_decay: tuple[float, ...]

    def encode(self) -> str:
        """JSON of strings by name; equal reports have equal texts. Decays past the 26th count by their checksum."""
        decays = self.base_weight_decay
        rest = decays[_SHOWN:]
        checksum = f" and {len(rest)} more (checksum {zlib.crc32(repr(rest).encode())})" if rest else ""
        values = {
            "total_steps": self.total_steps,
            "off_at": self.off_at,
            "step": self.step,
            "trigger": self.trigger,
            "weight_decay": "off" if self.decay_is_off else "on",
            "num_groups": len(decays),
            "base_weight_decay": f"{list(decays[:_SHOWN])}{checksum}",
        }
        return json.dumps({name: str(value) for name, value in values.items()})


def disagreement(reports: Mapping[int, str], when: str) -> RankDisagreementError:
    """The error for ranks whose reports differ.

    Args:
        reports: What `Report.encode()` gave, by global rank.
        when: "at the start" or "during the run", for the message.
    """
    decoded = {rank: json.loads(text) for rank, text in sorted(reports.items())}
    lines = []
    for name in next(iter(decoded.values())):
        holders: dict[str, list[int]] = {}
        for rank, values in decoded.items():
            holders.setdefault(values[name], []).append(rank)
        if len(holders) > 1:
            lines.append(f"{name}: " + "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in holders.items()))
    return RankDisagreementError(
        f"the ranks' schedules differ {when}; give every rank the same settings, param groups and checkpoint, and call "
        "step() after every optimizer step on every rank (or give process_group, if not all ranks share a schedule):"
        "\n  " + "\n  ".join(lines)
    )


def _ranks(ranks: list[int]) -> str:
    """`rank 3` or `ranks 0-4, 7`: every rank is named, however many there are."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return ("rank " if len(ranks) == 1 else "ranks ") + text
