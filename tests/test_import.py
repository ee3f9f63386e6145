"""`import robust_dist` needs only torch, is fast, and changes nothing."""

import subprocess
import sys

import pytest

# An entry of None in sys.modules is a module that cannot be imported.
ALONE = "import sys\nsys.modules.update(dict.fromkeys({refused!r}))\n"
EXTRAS = {"accelerate", "torchvision", "deepspeed", "jsonargparse", "yaml", "tqdm", "matplotlib", "sklearn", "timm"}
EXTRAS |= {"triton", "transformers", "datasets", "tensorboard", "kornia", "schedulefree", "prodigyopt"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


CORE = """
import torch
from robust_dist import *
model = torch.nn.Linear(4, 3)
optimizer = RAdaBeliefW(param_groups(model, 0.01), lr=0.1)
schedule = RobustSchedule(optimizer, 10)
augment = RobustAugment(3, 8, (0.5,) * 3, (0.2,) * 3)
images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
images, targets = augment(images, torch.tensor([0, 1, 2, 0]), sample_keys(0, 0, range(4)))
model(images[:, 0, 0, :4]).sum().backward()
optimizer.step()
schedule.step()
register()
print("done", targets.shape)
"""
COMMAND = "from robust_dist.cli import main; import sys; sys.exit(main(['preview']))"


@pytest.fixture(scope="module")
def alone():
    return run(ALONE.format(refused=EXTRAS) + CORE + COMMAND)


def test_the_core_works_with_torch_alone(alone):
    assert "done" in alone.stdout, alone.stderr


def test_importing_and_asking_for_the_engines_changes_nothing_of_torch():
    code = """
import torch
before = set(vars(torch.optim)), set(vars(torch.optim.lr_scheduler)), torch.get_rng_state().sum().item()
import robust_dist
after = set(vars(torch.optim)), set(vars(torch.optim.lr_scheduler)), torch.get_rng_state().sum().item()
import sys
from robust_dist.engines.engine import kinds
libraries = ("deepspeed", "accelerate", "torchvision", "torch.distributed.checkpoint", "robust_dist.inference")
print(before == after, len(kinds()), *(name in sys.modules for name in libraries))
"""
    assert run(code).stdout.split() == ["True", "6", *["False"] * 5]


@pytest.mark.slow
def test_importing_costs_less_than_a_tenth_of_torch():
    code = """
import time
start = time.perf_counter()
import torch, torch.optim.lr_scheduler, torch.distributed
middle = time.perf_counter()
import robust_dist
print((time.perf_counter() - middle) / (middle - start))
"""
    assert min(float(run(code).stdout) for _ in range(3)) < 0.1


def test_a_command_whose_extra_is_missing_names_the_extra(alone):
    assert alone.returncode == 2
    assert "robust_dist[train]" in alone.stderr
    assert "Traceback" not in alone.stderr
