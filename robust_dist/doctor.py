"""`robust-dist doctor`: what is installed, what would go wrong, and the commands that fix it."""

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

import torch

import robust_dist
from robust_dist import surroundings
from robust_dist.documents import first_line
from robust_dist.extras import PACKAGE, extra_names, extra_requirements, version_tuple

Status = Literal["ok", "warn", "fail"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
VERSIONED = (*surroundings.PACKAGES, "transformers", "timm", "triton")
LOWEST_TORCH, LOWEST_PYTHON = (2, 6), (3, 10)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was checked.
        status: "ok"; "warn": something would go wrong, or a part cannot be used; "fail": `import robust_dist` or
            training cannot work.
        detail: What was found.
        remedy: The command that fixes it, or None.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


def report() -> list[Check]:
    """Every finding, in reading order; needs only torch and changes nothing."""
    return [check for group in GROUPS for check in _guarded(group)]


def format_report(checks: Iterable[Check]) -> str:
    """The findings as text: one per line, with the remedy on the next line, then a line of totals."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = [line for check in checks for line in _lines(check, width)]
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())])


def exit_code(checks: Iterable[Check]) -> int:
    """1 if a check failed, else 0."""
    return int(any(check.status == "fail" for check in checks))


def _lines(check: Check, width: int) -> Iterator[str]:
    yield f"{check.status:<4}  {check.name:<{width}}  {check.detail}"
    if check.remedy:
        yield f"{'':<4}  {'':<{width}}  -> {check.remedy}"


def _guarded(group: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A group's checks; a check that raises becomes a finding and does not stop the others."""
    try:
        yield from group()
    except Exception as error:
        yield Check(group.__name__.lstrip("_"), "warn", f"this check failed to run: {type(error).__name__}: {error}")


def _versions() -> Iterator[Check]:
    yield Check(PACKAGE, "ok", f"{robust_dist.__version__} in {Path(robust_dist.__file__).parent}")
    yield _at_least("python", platform.python_version(), LOWEST_PYTHON, None)
    yield _at_least("torch", torch.__version__, LOWEST_TORCH, "pip install -U torch torchvision")
    found = {name: _installed(name) for name in VERSIONED}
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield Check("packages", "ok", text or "no optional packages")
    yield _trackers()


def _trackers() -> Check:
    """The names that `tracking.trackers` can use here."""
    found = {name: _installed(name) or (_installed("mlflow-skinny") if name == "mlflow" else None) for name in TRACKERS}
    there = [f"{name} {version}" for name, version in found.items() if version]
    missing = [name for name, version in found.items() if not version]
    text = ", ".join(there) or "none installed"
    return Check("trackers", "ok", f"{text} (not installed: {', '.join(missing)})" if there and missing else text)


def _at_least(name: str, version: str, lowest: tuple[int, ...], remedy: str | None) -> Check:
    if version_tuple(version) >= lowest:
        return Check(name, "ok", version)
    wanted = ".".join(map(str, lowest))
    return Check(name, "fail", f"{version}, but {wanted} or later is required", remedy)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> Iterator[Check]:
    """Torchvision's compiled part works only with the torch version it was built for."""
    if _installed("torchvision") is None:
        return
    remedy = "pip install --force-reinstall torch torchvision"
    try:
        import_module("torchvision")
        nms = torch.ops.torchvision.nms
    except Exception as error:
        detail = f"does not load with torch {torch.__version__}: {error}"
        yield Check("torchvision", "warn", detail, remedy)
    else:
        yield Check("torchvision", "ok", f"loads with torch {torch.__version__}, {nms} is available")


def _numpy() -> Iterator[Check]:
    """A torch built for NumPy 1 cannot use NumPy 2; otherwise this only shows when data are read."""
    if _installed("numpy") is None:
        return
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        yield Check("numpy", "warn", f"torch cannot use it: {error}", "pip install 'numpy<2'")


def _cpu() -> Iterator[Check]:
    cores, threads = surroundings.usable_cores(), torch.get_num_threads()
    detail = f"{cores:g} usable cores, {threads} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    if threads <= max(1, cores):
        yield Check("cpu", "ok", detail)
    else:
        remedy = f"export OMP_NUM_THREADS={max(1, int(cores))}"
        yield Check("cpu", "warn", f"{detail}: more threads than cores slow each other down", remedy)


def _offload() -> Iterator[Check]:
    """How many cores a CPU step takes, as in ZeRO-Offload, where the GPU waits for it."""
    from robust_dist.optim import fused_cpu

    cores, threads = int(surroundings.usable_cores()), fused_cpu.threads()
    if fused_cpu.why_not() is not None:
        detail = f"ZeRO-Offload would step with torch's operations, several times slower: {fused_cpu.why_not()}"
        yield Check("offload", "warn", detail, "pip install --force-reinstall --no-deps robust_dist")
    elif threads == 1 < cores:
        detail = f"ZeRO-Offload's step takes 1 of {cores} cores; a launched rank uses its share of them"
        yield Check("offload", "warn", detail, f"export OMP_NUM_THREADS={cores}")
    else:
        detail = f"ZeRO-Offload's step takes {threads} of {max(1, cores)} cores; a launched rank uses its share of them"
        yield Check("offload", "ok", detail)


def _devices() -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _cuda_device(index)
    elif torch.version.cuda is None and torch.version.hip is None:
        yield _cpu_only()
    else:
        yield _no_driver()


def _cpu_only() -> Check:
    if surroundings.has_nvidia_device():
        detail = "torch is built without CUDA, but this machine has an NVIDIA device: training runs on the CPU"
        return Check("gpu", "warn", detail, "pip install --force-reinstall torch torchvision")
    return Check("gpu", "ok", "none: training runs on the CPU")


def _no_driver() -> Check:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if surroundings.has_nvidia_device():
        detail = f"torch is built for {built} and there is an NVIDIA device, but no usable driver"
        return Check("gpu", "warn", f"{detail}: training runs on the CPU", "nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    because = f"CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else "no device or driver"
    return Check("gpu", "ok", f"none (torch is built for {built}; {because}): training runs on the CPU")


def _cuda_device(index: int) -> Check:
    name = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    detail = f"{properties.name}, capability {properties.major}.{properties.minor}"
    try:
        torch.ones(8, 8, device=name).mm(torch.ones(8, 8, device=name)).sum().item()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        detail = f"{detail}: cannot compute ({first_line(error)}); torch has kernels for {torch.cuda.get_arch_list()}"
        return Check(name, "fail", detail, f"nvidia-smi -i {index}")
    return Check(name, "ok", f"{detail}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _optimizer_backends() -> Iterator[Check]:
    """Each backend's own answer, so the report cannot go stale."""
    from robust_dist.optim import RAdaBeliefW

    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        for option in ("foreach", "fused"):
            parameter = torch.nn.Parameter(torch.ones(4, device=device))
            parameter.grad = torch.ones_like(parameter)
            name = f"{option} ({device})"
            try:
                RAdaBeliefW([parameter], foreach=option == "foreach" or None, fused=option == "fused" or None).step()
            except (RuntimeError, ValueError, TypeError, ImportError) as error:
                yield _unavailable(name, error, needed=option == "foreach")
            else:
                yield Check(name, "ok", "available")


def _augment_backends() -> Iterator[Check]:
    """The backend that the augmentation itself chooses."""
    from robust_dist.augment import backends

    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        chosen, name = backends.choose("auto", torch.device(device)), f"augmentation ({device})"
        if chosen != "torch":
            kind = getattr(backends.module_of(chosen), "instruction_set", None)
            yield Check(name, "ok", f"{chosen}, {kind()}" if kind else chosen)
        else:
            fastest = backends.FASTEST[device]
            yield Check(name, "ok", f"torch's operations; {fastest} is not available: {backends.missing(fastest)}")


def _unavailable(name: str, error: Exception, *, needed: bool) -> Check:
    detail = f"not available: {first_line(error)}"
    return Check(name, "warn", detail, "pip install -U torch") if needed else Check(name, "ok", detail)


def _extras() -> Iterator[Check]:
    try:
        names = extra_names()
    except metadata.PackageNotFoundError:
        detail = f"{PACKAGE} runs from its source folder and is not installed, so its extras are unknown"
        yield Check("extras", "warn", detail, "pip install -e '.[train]'")
        return
    for name in names:
        yield _extra(name)


def _extra(name: str) -> Check:
    requirements = extra_requirements(name)
    problems = [problem for requirement in requirements if (problem := requirement.problem())]
    if not problems:
        return Check(f"[{name}]", "ok", f"complete, {len(requirements)} packages")
    return Check(f"[{name}]", "warn", "; ".join(problems), f"pip install '{PACKAGE}[{name}]'")


def _embedded_data() -> Iterator[Check]:
    from robust_dist.data import load_dataset

    try:
        sizes = [len(load_dataset("digits", ".", train=train, download=False)) for train in (True, False)]
    except ImportError as error:
        yield Check("digits", "warn", str(error), f"pip install '{PACKAGE}[train]'")
    else:
        yield Check("digits", "ok", f"the bundled data set loads, {sizes[0]} + {sizes[1]} images")


def _surroundings() -> Iterator[Check]:
    problems = surroundings.problems(has_gpu=torch.cuda.is_available())
    for problem in problems:
        yield Check(problem.name, "warn", problem.detail, problem.remedy)
    if not problems:
        looked = "shared memory, open files, temporary folder, port, host name, environment variables, build locks"
        yield Check("surroundings", "ok", f"no problems ({looked})")


GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (
    _versions,
    _torchvision,
    _numpy,
    _cpu,
    _offload,
    _devices,
    _optimizer_backends,
    _augment_backends,
    _extras,
    _embedded_data,
    _surroundings,
)

if __name__ == "__main__":
    findings = report()
    print(format_report(findings))
    sys.exit(exit_code(findings))
