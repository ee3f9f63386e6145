"""The speed of the optimizer, the augmentation and a training step, compared with their limits, in one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robust_dist import RAdaBeliefW, RobustAugment
from robust_dist.augment import sample_keys
from robust_dist.bench.timing import interleaved
from robust_dist.verify.parts import Scene

ROUNDS = 7


def optimizer(scene: Scene) -> None:
    """RAdaBeliefW beside torch's fused AdamW and beside a copy of as many bytes, and its host time."""
    count = 100_000_000 if scene.device.type == "cuda" else 2_000_000
    # Reads parameter, gradient and two moments, writes three of them; so does AdamW.
    moved = 28 * count
    target, source = (torch.empty(moved // 2, dtype=torch.uint8, device=scene.device) for _ in range(2))
    ours, theirs = (_flat(scene.device, count, kind) for kind in ("ours", "torch"))
    found = timed(scene.device, {"copy": lambda: target.copy_(source), "ours": ours, "AdamW": theirs})
    gpu = scene.device.type == "cuda"
    share, ratio = found["copy"] / found["ours"], found["ours"] / found["AdamW"]
    what = f"RAdaBeliefW's step of {count:,} float32 parameters"
    _speed(scene, f"{what}: share of a copy's bandwidth", share, 0.9 if gpu else None, least=True)
    _speed(scene, f"{what}: its time over that of torch's fused AdamW", ratio, 1.0 if gpu else None)
    many = _many(scene.device)
    for _ in range(5):
        many()
    scene.claims.add(
        "host time of a step of 161 tensors", "", f"{1e6 * _until_return(scene.device, many):.0f} us", "measured"
    )
    _synchronisations(scene, many)


def _flat(device: torch.device, count: int, kind: str) -> Callable[[], Any]:
    param = torch.randn(count, device=device, requires_grad=True)
    param.grad = torch.randn(count, device=device)
    if kind == "ours":
        return RAdaBeliefW([param]).step
    return torch.optim.AdamW([param], fused=True).step


def _many(device: torch.device) -> Callable[[], Any]:
    """A step over as many tensors as ResNet-50 has, with a changing rate."""
    params = [torch.randn(64, device=device, requires_grad=True) for _ in range(161)]
    for param in params:
        param.grad = torch.randn(64, device=device)
    stepper, steps = RAdaBeliefW(params), [0]

    def step() -> None:
        steps[0] += 1
        stepper.param_groups[0]["lr"] = 0.01 / (1 + steps[0] % 100)
        stepper.step()

    return step


def _synchronisations(scene: Scene, call: Callable[[], Any]) -> None:
    """Check that a steady call never waits for the device, as reported by torch itself."""
    what = "host synchronisations in a steady optimizer step"
    if scene.device.type != "cuda":
        scene.claims.skip(what, "a CPU has none")
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        scene.claims.equal(what, 0, 0)
    except RuntimeError as error:
        scene.claims.check(what, 0, str(error).splitlines()[0], False)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def augmentation(scene: Scene) -> None:
    """The whole pipeline compared with a bare copy that normalises, and what it compiles after its first calls."""
    gpu = scene.device.type == "cuda"
    for count, side in ((512, 32), (256, 224)) if gpu else ((128, 32),):
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=scene.device)
        labels = torch.randint(0, 10, (count,), device=scene.device)
        keys = sample_keys(0, 0, torch.arange(count)).to(scene.device)
        ours = RobustAugment(10, side, (0.5,) * 3, (0.2,) * 3, dtype=torch.bfloat16).to(scene.device)
        bare = RobustAugment(
            10, side, (0.5,) * 3, (0.2,) * 3, dtype=torch.bfloat16, crop=None, flip=False, trivial=False, cutmix=False
        ).to(scene.device)

        def call(module: RobustAugment, inputs: tuple[Tensor, ...] = (images, labels, keys)) -> Callable[[], Any]:
            return lambda: module(*inputs)

        found = timed(scene.device, {"ours": call(ours), "bare": call(bare)})
        what = f"augmentation of {count} images of {side}x{side}: its time over that of normalising alone"
        _speed(scene, what, found["ours"] / found["bare"], 3.0 if gpu else None)
        scene.claims.add(f"augmentation of {side}x{side}", "", f"{count / found['ours']:,.0f} images/s", "measured")


def step(scene: Scene) -> None:
    """A training step of ResNet-56 at batch 128 (on a CPU ResNet-8 at 32), with and without a CUDA graph."""
    gpu = scene.device.type == "cuda"
    name, size = ("resnet56", 128) if gpu else ("resnet8", 32)
    with scene.claims.needing(f"a training step of {name}", "accelerate", "yaml"):
        from robust_dist.bench.train import run

        precision = "bf16" if gpu else "no"
        found = run(models=[name], batch=size, rounds=3, precision=precision, cuda_graph=gpu, device=str(scene.device))
        for who, why in found.left_out.items():
            scene.claims.skip(f"a training step of {name}, {who}", why)
        for row in found.rows:
            rate = f"{size / row.timing.median:,.0f} images/s"
            scene.claims.add(
                f"a training step of {name}, batch {size}, augmentation {row.augmentation}", "", rate, "measured"
            )


def _speed(scene: Scene, what: str, found: float, limit: float | None, *, least: bool = False) -> None:
    if limit is None:
        scene.claims.add(what, "", f"{found:.2f}", "measured")
        return
    fine = found >= limit if least else found <= limit
    scene.claims.add(what, f"at {'least' if least else 'most'} {limit}", f"{found:.2f}", "right" if fine else "slow")


def timed(device: torch.device, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, over rounds in which every call takes its turn."""
    found = interleaved(calls, rounds=ROUNDS, warmup=3, device=device)
    return {name: timing.median for name, timing in found.items()}


def _until_return(device: torch.device, call: Callable[[], Any]) -> float:
    """Median seconds until a call returns while the device is idle."""
    found = []
    for _ in range(50):
        _wait(device)
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
