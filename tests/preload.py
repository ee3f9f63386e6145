"""Imports of the fork server, which processes forked from it then need not repeat."""

import contextlib
import gc
import importlib
import os

# Missing packages are missing in the tests too, which say so. DeepSpeed is not here: it changes functions of torch.
MODULES = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "torch.testing",
    "torch.utils.tensorboard",
    "accelerate",
    "hypothesis",
    "matplotlib.pyplot",
    "pytest",
    "safetensors.torch",
    "sklearn.datasets",
    "timm",
    "torchvision",
    "transformers",
    "robust_dist.cli",
    "robust_dist.train.main",
)

for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

threads = len(os.listdir("/proc/self/task"))
assert threads == 1, f"a fork of {threads} threads would lose all but one of them, with their locks held"

# A collection in a forked process would write to, and so copy, every page of what was imported here.
gc.collect()
gc.freeze()
