"""Accelerate's FSDP on CPU ranks, for tests alone: it patches a private method of Accelerate, which has no such set-up.

In a rank: `pretend_fsdp_runs_on_cpus()`, before the first Accelerator or TrainingArguments. Around a script:
`accelerate launch --config_file F -m tests.engines.fsdp_on_cpu SCRIPT ARGS...`, or the same with torchrun.
"""

import functools
import os
import runpy
import sys
from pathlib import Path

_BROADCASTS = ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING")


def _patch_backend(state):
    """A rank with gloo counts as one with a GPU, which is all that Accelerate asks before it takes FSDP."""
    original = state.PartialState._prepare_backend

    @functools.wraps(original)
    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if cpu or deepspeed or "LOCAL_RANK" not in os.environ:
            return original(self, cpu, sagemaker_dp, backend)
        return "gloo", state.DistributedType.MULTI_GPU

    state.PartialState._prepare_backend = prepare_backend


def _patch_plugin(cls):
    """torch's FSDP1 broadcasts the ranks' weights on GPUs only; here every rank must build the same ones itself."""
    original = cls.__post_init__

    @functools.wraps(original)
    def post_init(self):
        os.environ.update(dict.fromkeys(_BROADCASTS, "false"))
        if self.sync_module_states is not None:
            self.sync_module_states = False
        if self.cpu_ram_efficient_loading is not None:
            self.cpu_ram_efficient_loading = False
        original(self)

    cls.__post_init__ = post_init


def pretend_fsdp_runs_on_cpus():
    """Let Accelerate (and Trainer) use FSDP1 and FSDP2 with gloo; may be called again."""
    import accelerate.state as state
    from accelerate.utils import FullyShardedDataParallelPlugin

    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not hasattr(state.PartialState._prepare_backend, "__wrapped__"):
        _patch_backend(state)
        _patch_plugin(FullyShardedDataParallelPlugin)


def main():
    """Run the script that the command line names, after the patch."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.engines.fsdp_on_cpu SCRIPT [ARGS...]")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    pretend_fsdp_runs_on_cpus()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
