"""What ranks tell each other: that their settings are equal, and their votes."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

_SLOTS = 32
_HEADER = 6


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
    """What every rank must have alike."""

    total_steps: int
    off_at: float
    step: int
    trigger: str
    num_groups: int
    base_weight_decay: tuple[float, ...]

    def encode(self) -> torch.Tensor:
        """int64 [32]: floats by their bits; decays past the 26th count by their checksum."""
        trigger = zlib.crc32(self.trigger.encode())
        decays = struct.pack(f"<{len(self.base_weight_decay)}d", *self.base_weight_decay)
        shown = decays[: 8 * (_SLOTS - _HEADER)].ljust(8 * (_SLOTS - _HEADER), b"\0")
        head = (self.total_steps, self.off_at, self.step, trigger, self.num_groups, zlib.crc32(decays))
        words = struct.unpack(f"<{_SLOTS}q", struct.pack("<qdqqqq", *head) + shown)
        return torch.tensor(words, dtype=torch.int64)


def _decode(row: Sequence[int]) -> dict[str, str]:
    total, bits, step, trigger, num_groups, checksum = row[:_HEADER]
    (off_at,) = struct.unpack("<d", struct.pack("<q", bits))
    shown = min(num_groups, _SLOTS - _HEADER)
    decays = struct.unpack(f"<{shown}d", struct.pack(f"<{shown}q", *row[_HEADER : _HEADER + shown]))
    names = {zlib.crc32(name.encode()): name for name in TRIGGERS}
    rest = f" and {num_groups - shown} more (checksum {checksum})" if num_groups > shown else ""
    values = (total, off_at, step, names.get(trigger, trigger), num_groups, f"{list(decays)}{rest}")
    return {field.name: str(value) for field, value in zip(fields(Report), values, strict=True)}


TRIGGERS = ("at a step", "any rank's", "all ranks'", "the majority's")


def compare(report: Report, group: dist.ProcessGroup | None, when: str) -> None:
    """Compare `report` between the ranks: one collective.

    Args:
        report: This rank's.
        group: The ranks to ask; None is the default group.
        when: "at the start" or "at the switch", for the message.

    Raises:
        RankDisagreementError: On every rank, where any differs.
    """
    mine = report.encode().to(device_of(group))
    rows = torch.empty((dist.get_world_size(group), _SLOTS), dtype=torch.int64, device=mine.device)
    dist.all_gather(list(rows.unbind(0)), mine, group=group)
    everyone: list[list[int]] = rows.tolist()
    if all(row == everyone[0] for row in everyone):
        return
    raise RankDisagreementError(_message([_decode(row) for row in everyone], group, when))


def _message(reports: list[dict[str, str]], group: dist.ProcessGroup | None, when: str) -> str:
    lines = []
    for name in reports[0]:
        holders: dict[str, list[int]] = {}
        for rank, one in enumerate(reports):
            global_rank = rank if group is None else dist.get_global_rank(group, rank)
            holders.setdefault(one[name], []).append(global_rank)
        if len(holders) > 1:
            lines.append(f"{name}: " + "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in holders.items()))
    return (
        f"the ranks' schedules differ {when}; give every rank the same settings, param groups and checkpoint:\n  "
        + "\n  ".join(lines)
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
