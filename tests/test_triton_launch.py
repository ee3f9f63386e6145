"""A kernel's later launches pass the driver the same arguments as its first one, without Triton's binder."""

import pytest

from tests.forked import python

triton = pytest.importorskip("triton", minversion="3.3")

# A driver that loads and launches nothing, in its own process: Triton has one driver per process.
SCRIPT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

loads, launches = [], []

class Utils:
    def load_binary(self, name, *_):
        loads.append(name)
        return len(loads), 2, 32, 0, 1024
    def get_device_properties(self, device):
        return dict(max_shared_mem=232448, multiprocessor_count=132, warpSize=32, max_num_regs=65536)
    def unload_module(self, *_):
        pass

class Launcher:
    def __init__(self, source, metadata):
        self.launch_cooperative_grid = self.launch_pdl = False
        self.global_scratch_size = self.profile_scratch_size = 0
    def __call__(self, *arguments):
        launches.append([one for one in arguments if isinstance(one, (int, bool, torch.Tensor, triton.language.dtype))])

class Fake(CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = Utils(), Launcher
        self.get_current_stream, self.get_current_device = lambda device: 0, lambda: 0
        self.set_current_device, self.get_device_capability = lambda device: None, lambda device=0: (9, 0)
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

driver.set_active(Fake())
from robust_dist.optim import fused_triton
from robust_dist.triton_launch import Kernel

def same(one, other):
    return len(one) == len(other) and all(a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other))

binds = []
kernel = fused_triton.kernels().step
assert isinstance(kernel, Kernel)
run = kernel.jit.run
kernel.jit.run = lambda *a, **k: binds.append(1) or run(*a, **k)
table, grads = torch.zeros(21, 9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
chunks = torch.zeros(5, 2, dtype=torch.int64)
kinds = ("float32", "float32", "float32", "float32", False, False, False)

def step(grads, kinds=kinds):
    before = len(binds), len(loads)
    fused_triton._step(table, grads, chunks, kinds)
    return len(binds) - before[0], len(loads) - before[1]

assert step(grads) == (1, 1)
assert step(grads) == (0, 0) == step(grads), "bound again"
assert same(launches[0], launches[1]) and same(launches[0], launches[2]), (launches[0], launches[1])
odd = torch.zeros(10, dtype=torch.int64)[1:]
assert step(odd) == (1, 1), "an odd place needs other code"
assert step(odd) == (0, 0) == step(grads) == step(odd)
assert any(one is odd for one in launches[-1])
half = ("float16", "float16", "float32", "float32", False, False, False)
assert step(grads, half) == (1, 1)
assert step(grads, half) == (0, 0) == step(grads)
table = torch.zeros(21, 7, dtype=torch.int64)
assert step(grads) == (0, 0), "a number of rows for which nothing is compiled"
assert 7 in [one for one in launches[-1] if isinstance(one, int)]
"""


def test_what_was_compiled_is_launched_again_with_the_same_arguments_and_other_kinds_are_compiled():
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        pytest.skip("launched by the binder")
    code, said = python("-c", SCRIPT)
    assert code == 0, said[-3000:]


def test_the_installed_triton_is_one_whose_compiled_kernels_are_known():
    """A newer release launches through its binder until triton_launch.py lists it as known."""
    from robust_dist.triton_launch import KNOWN

    assert tuple(int(part) for part in triton.__version__.split(".")[:2]) <= KNOWN[1]
