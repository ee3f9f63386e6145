"""DeepSpeed on processors."""

import os
from collections import defaultdict


def get_ready() -> None:
    """Let this process, a rank, run DeepSpeed on its processor, with nothing compiled."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=os.environ.get("WORLD_SIZE", "1"))
    import deepspeed.ops

    # Its own collectives in shared memory serve inference alone, and take a minute to compile.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
