"""Ranks that a launcher starts once more find each other, not the addresses of the ranks before.

torch's static rendezvous (the default of `torchrun` and `accelerate launch`) keeps one store over all restarts, and
gloo's and NCCL's addresses in it: restarted ranks then wait for dead ones (seen with torch 2.14).
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from robust_dist.ranks.claim import host_id

_SCHEME = "robust-dist"
_meetings = itertools.count()


def init_method() -> str | None:
    """The init_method for `init_process_group`; None where no launcher of torch started this rank."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # A second run of this process finds it registered.
    with contextlib.suppress(RuntimeError):
        register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://"


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """As "env://", in a part of the store that no earlier attempt has used."""
    for store, rank, world_size in rendezvous(url.replace(_SCHEME, "env", 1), timeout=timeout, **options):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # A store that remembers this launcher's earlier attempt is one for all attempts.
        mine = f"robust_dist/{host_id()}/{os.getppid()}/{os.environ.get('LOCAL_RANK', '0')}"
        first = store.compare_set(mine, "", attempt).decode()
        part = store if first == attempt else PrefixStore(f"attempt-{attempt}", store)
        # A group that this process has closed has left its keys.
        number = next(_meetings)
        yield (PrefixStore(f"meeting-{number}", part) if number else part), rank, world_size
