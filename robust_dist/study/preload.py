"""Imported by the fork server of a study's training processes, which saves seconds in every run.

Nothing here may start a thread, which a fork would lose with its locks held.
"""

import gc
import importlib

for _name in (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "robust_dist.data.worker_server",
    "robust_dist.train.main",
):
    importlib.import_module(_name)

# A collection in a forked process would write to, and so copy, every page of what was imported here.
gc.collect()
gc.freeze()
