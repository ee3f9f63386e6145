"""Checks that each rank makes alone: backends against float64, pixels and draws against the CPU's."""

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from robust_dist import RAdaBeliefW, RobustAugment
from robust_dist.augment import TrivialAugment, backends, permutation, sample_keys
from robust_dist.augment.trivial import TrivialAugmentPlan
from robust_dist.optim.reference import reference_step
from robust_dist.verify.parts import Claims, Scene

STEPS = 8
SHAPES = ((64, 33), (7,), (3, 5, 5), (4099,))
SCALES = (1.0, 1e-2, 1e-5, 0.1)
# Relative to the largest parameter; a float32 update rounds a few times in each of eight steps.
TOLERANCE = 3e-6
CPU = torch.device("cpu")


def machine(scene: Scene) -> None:
    """Versions, the device, and the backends that are available."""
    import robust_dist

    claims = scene.claims
    claims.add("versions", "", f"robust_dist {robust_dist.__version__}, torch {torch.__version__}", "measured")
    name = torch.cuda.get_device_name(scene.device) if scene.device.type == "cuda" else platform.processor() or "CPU"
    claims.add("device", "", f"{scene.device}: {name}", "measured")
    for backend in ("triton",) if scene.device.type == "cuda" else ("native",):
        why = backends.missing(backend)
        if why is None:
            claims.check(f"augmentation by {backend}", "there", "there", True)
        else:
            claims.skip(f"augmentation by {backend}", why)


def made(**options: Any) -> tuple[list[Tensor], RAdaBeliefW]:
    """Parameters of several shapes, and RAdaBeliefW over them."""
    generator = torch.Generator().manual_seed(0)
    device = options.pop("device")
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in SHAPES]
    return params, RAdaBeliefW(params, lr=0.01, weight_decay=0.05, **options)


def gradients() -> Iterator[list[Tensor]]:
    """Gradients of eight steps, some so small that eps dominates."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, SCALES, strict=True)]


def expected_parameters() -> list[Tensor]:
    """The parameters after all steps of the readable reference, in float64."""
    params = [param.detach().double() for param in made(device=CPU)[0]]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for step, grads in enumerate(gradients(), 1):
        for place, grad in enumerate(grads):
            params[place], *new = reference_step(
                params[place], grad.double(), *moments[place], step, lr=0.01, weight_decay=0.05
            )
            moments[place] = (new[0], new[1])
    return params


def stepped(device: torch.device, **options: Any) -> list[Tensor]:
    """The parameters after all steps of a backend, on the CPU."""
    params, optimizer = made(device=device, **options)
    for grads in gradients():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device)
        optimizer.step()
    return [param.detach().cpu() for param in params]


BACKENDS: Mapping[str, dict[str, Any]] = {
    "single-tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def optimizer(scene: Scene) -> None:
    """Every backend of the optimizer against the float64 reference, and backends against each other."""
    wanted, found = expected_parameters(), {}
    for device in dict.fromkeys((CPU, scene.device)):
        for name, options in BACKENDS.items():
            what = f"RAdaBeliefW, {name} on {device.type}, {STEPS} steps"
            try:
                found[f"{name} on {device.type}"] = params = stepped(device, **options)
            except ValueError as error:
                scene.claims.skip(what, str(error))
                continue
            worst = max(_error(param, right) for param, right in zip(params, wanted, strict=True))
            scene.claims.check(
                f"{what}: error against float64", f"at most {TOLERANCE}", f"{worst:.2e}", worst <= TOLERANCE
            )
    first = next(iter(found))
    for name in list(found)[1:]:
        pairs = zip(found[first], found[name], strict=True)
        equal = sum(int((left == right).sum()) for left, right in pairs) / sum(param.numel() for param in found[first])
        scene.claims.add(f"parameters with the same bits, {first} and {name}", "", f"{equal:.2%}", "measured")
    _default_is_fused(scene)


def _default_is_fused(scene: Scene) -> None:
    """The default backend gives the fused one's bits, so no fallback goes unnoticed."""
    try:
        fused = stepped(scene.device, fused=True)
    except ValueError:
        return
    same = all(torch.equal(left, right) for left, right in zip(stepped(scene.device), fused, strict=True))
    scene.claims.check(f"the default backend on {scene.device.type} is the fused one", "equal bits", same, same)


def _error(param: Tensor, right: Tensor) -> float:
    return float((param.double() - right).abs().max() / right.abs().max())


PIPELINES: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
    ((3, 32, 32), {}),
    ((1, 28, 28), {"cutmix_mode": "batch"}),
    ((3, 65, 47), {"interpolation": "bilinear"}),
)


def augmentation(scene: Scene) -> None:
    """Pixels of every operation and of the whole pipeline, and draws, compared with plain torch on the CPU."""
    fast = backends.choose("auto", scene.device)
    if fast == "torch":
        scene.claims.skip("pixels of the fast backend", f"there is none on {scene.device.type}")
    else:
        _operations(scene, fast)
        _pipelines(scene, fast)
    if scene.device.type != "cpu":
        _draws(scene.claims, scene.device)


def _operations(scene: Scene, fast: str) -> None:
    plain, ours = TrivialAugment(backend="torch"), TrivialAugment(backend=fast)
    bins = plain.num_bins
    images = torch.randint(0, 256, (2 * bins, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    # Equalize and AutoContrast leave a full range as it is.
    images[::3] //= 3
    for number, name in enumerate(TrivialAugment.OPS):
        op = torch.full((2 * bins,), number)
        plan = TrivialAugmentPlan(op, torch.arange(2 * bins) % bins, torch.arange(2 * bins) >= bins)
        there = TrivialAugmentPlan(*(value.to(scene.device) for value in (plan.op, plan.magnitude_bin, plan.negative)))
        differ = int((plain.apply(images, plan) != ours.apply(images.to(scene.device), there).cpu()).sum())
        scene.claims.equal(f"{name} by {fast}: pixels that differ from torch on the CPU", 0, differ)


def _pipelines(scene: Scene, fast: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for shape, options in PIPELINES:
        images = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=generator)
        labels, keys = torch.randint(0, 10, (64,), generator=generator), sample_keys(3, 1, torch.arange(64))
        scale = (0.5,) * shape[0]
        plain = RobustAugment(10, shape[1:], scale, scale, backend="torch", **options)
        faster = RobustAugment(10, shape[1:], scale, scale, backend=fast, **options).to(scene.device)
        pixels, targets = plain(images, labels, keys)
        ours, our_targets = faster(*(value.to(scene.device) for value in (images, labels, keys)))
        differ = int((pixels != ours.cpu()).sum()) + int((targets != our_targets.cpu()).sum())
        scene.claims.equal(f"whole pipeline by {fast}, {'x'.join(map(str, shape))}: values that differ", 0, differ)


def _draws(claims: Claims, device: torch.device) -> None:
    index = torch.arange(4096)
    same = torch.equal(sample_keys(7, 2, index), sample_keys(7, 2, index.to(device)).cpu())
    claims.check(f"keys of 4,096 samples on {device.type}", "the CPU's", "equal" if same else "others", same)
    same = torch.equal(permutation(7, 2, 50_000), permutation(7, 2, 50_000, device).cpu())
    claims.check(f"order of 50,000 samples on {device.type}", "the CPU's", "equal" if same else "another", same)
