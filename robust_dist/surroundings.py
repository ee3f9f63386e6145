"""Problems of the environment that would make a run fail: limits, ports, stale files, environment variables."""

import math
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Packages whose versions a run records and `robust-dist doctor` shows, besides torch.
PACKAGES = ("torchvision", "accelerate", "deepspeed", "numpy")
MIN_SHARED_BYTES = 256 * 2**20
MIN_TEMPORARY_BYTES = 512 * 2**20
MIN_OPEN_FILES = 1024
STALE_LOCK_SECONDS = 15 * 60
DEFAULT_PORT = 29500
TRUE_WORDS = {"1", "true", "yes", "y", "on", "t"}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Problem:
    """A problem: its subject, its effect on a run, and the command that fixes it."""

    name: str
    detail: str
    remedy: str


def problems(*, has_gpu: bool) -> list[Problem]:
    """Every problem found on this machine, in this process's environment."""
    found = (
        shared_memory(Path("/dev/shm")),
        open_files(),
        temporary_folder(Path(tempfile.gettempdir())),
        port(DEFAULT_PORT),
        host_name(),
        rank_variables(os.environ),
        forced_cpu(os.environ, has_gpu=has_gpu, has_deepspeed=has_module("deepspeed")),
        compiler(has_deepspeed=has_module("deepspeed")),
        *(stale_locks(extension_folder(os.environ)) if locks_outlive_builds(extension_source()) else ()),
    )
    return [problem for problem in found if problem is not None]


def processor() -> str | None:
    """The processor's name on Linux; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def usable_cores() -> float:
    """Cores that this process may use: its affinity, capped by the cgroup quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(float(cores), quota(Path("/sys/fs/cgroup/cpu.max")))


def quota(cpu_max: Path) -> float:
    """Cores granted by a cgroup's cpu.max file; infinity if it sets no limit."""
    try:
        limit, period = cpu_max.read_text().split()[:2]
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def has_nvidia_device() -> bool:
    """Whether the kernel shows an NVIDIA device, with or without a usable driver."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists()


def shared_memory(folder: Path, at_least: int = MIN_SHARED_BYTES) -> Problem | None:
    """Too little shared memory kills loader workers and NCCL with a bus error (Docker's default is 64 MB)."""
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    if free >= at_least:
        return None
    detail = f"{free / 2**20:.0f} MiB free in {folder}: loader workers and NCCL may die of a bus error"
    return Problem("shared memory", detail, "docker run --shm-size=8g ... (or: mount -o remount,size=8G /dev/shm)")


def open_files() -> Problem | None:
    """A low limit on open files ends loader workers with "Too many open files"."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        return None
    detail = f"at most {soft} open files: loader workers may end with 'Too many open files'"
    most = 65536 if hard == resource.RLIM_INFINITY else hard
    return Problem("open files", detail, f"ulimit -n {most}")


def temporary_folder(folder: Path, at_least: int = MIN_TEMPORARY_BYTES) -> Problem | None:
    """Torchrun's logs, builds and sockets need room in the temporary folder."""
    free = shutil.disk_usage(folder).free
    if os.access(folder, os.W_OK) and free >= at_least:
        return None
    state = f"{free / 2**20:.0f} MiB free" if os.access(folder, os.W_OK) else "not writable"
    detail = f"{folder} is {state}; builds and launchers need it"
    return Problem("temporary folder", detail, "export TMPDIR=/a/folder/with/room")


def port(number: int) -> Problem | None:
    """Torchrun and accelerate use port 29500 by default."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", number))
        except OSError as error:
            detail = f"port {number}, the ranks' default, cannot be bound ({error.strerror}): is another run using it?"
            return Problem("port", detail, "accelerate launch --main_process_port 29501 ...")
    return None


def host_name() -> Problem | None:
    """Gloo looks up this host's own name when ranks start."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        detail = f"this host's name {name!r} has no address ({error.strerror}): gloo may not start"
        return Problem("host name", detail, f"export GLOO_SOCKET_IFNAME=lo (one machine), or add {name} to /etc/hosts")
    return None


def rank_variables(environ: Mapping[str, str]) -> Problem | None:
    """Leftover launcher variables make a plain start wait for ranks that never come."""
    found = [name for name in RANK_VARIABLES if name in environ]
    if not found:
        return None
    shown = ", ".join(f"{name}={environ[name]}" for name in found)
    detail = f"{shown} is set here: a run started without a launcher waits for other ranks"
    return Problem("rank variables", detail, f"unset {' '.join(found)}")


def forced_cpu(environ: Mapping[str, str], *, has_gpu: bool, has_deepspeed: bool) -> Problem | None:
    """ACCELERATE_USE_CPU hides GPUs, and silently turns DeepSpeed off."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() not in TRUE_WORDS:
        return None
    effects = ["accelerate leaves the GPUs unused"] if has_gpu else []
    effects += ["a launch with --use_deepspeed silently runs without DeepSpeed"] if has_deepspeed else []
    if not effects:
        return None
    return Problem("ACCELERATE_USE_CPU", f"is set: {', and '.join(effects)}", "unset ACCELERATE_USE_CPU")


def compiler(*, has_deepspeed: bool, which: Callable[[str], str | None] = shutil.which) -> Problem | None:
    """DeepSpeed on the CPU builds its communication with a C++ compiler and ninja at the first start."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    lacking = [] if any(name and which(name) for name in names) else ["a C++ compiler"]
    lacking += [] if which("ninja") or has_module("ninja") else ["ninja"]
    if not has_deepspeed or not lacking:
        return None
    detail = f"{' and '.join(lacking)} not found: DeepSpeed cannot build what it needs at its first start"
    return Problem("compiler", detail, "apt-get install g++ ninja-build")


def has_module(name: str) -> bool:
    """Whether a top-level module is installed; it is not imported."""
    return find_spec(name) is not None


def extension_folder(environ: Mapping[str, str]) -> Path:
    """Where torch builds extensions: TORCH_EXTENSIONS_DIR, else torch_extensions in the user's cache."""
    if environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(environ["TORCH_EXTENSIONS_DIR"])
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "torch_extensions")


def extension_source() -> str:
    """The source of torch's extension builder; empty if it cannot be read."""
    spec = find_spec("torch.utils.cpp_extension")
    return Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""


def locks_outlive_builds(source: str) -> bool:
    """Whether torch locks a build by a file's existence; newer versions hold a lock that ends with the process."""
    return "FileBaton(" in source


def stale_locks(folder: Path, processes: Path = Path("/proc")) -> Iterator[Problem]:
    """A killed build leaves a `lock` file, and every later build waits for it forever.

    A live build on this machine keeps its lock open; if processes cannot be seen, the lock's age decides.
    """
    for lock in sorted(folder.rglob("lock")):
        age = time.time() - lock.stat().st_mtime
        held = is_open(lock, processes)
        if held or (held is None and age < STALE_LOCK_SECONDS):
            continue
        detail = f"{lock}, {age / 60:.0f} minutes old, belongs to no live build: later builds wait for it forever"
        yield Problem("build lock", detail, f"rm {shlex.quote(str(lock))}")


def is_open(path: Path, processes: Path = Path("/proc")) -> bool | None:
    """Whether a process of this user on this machine has the file open; None without /proc."""
    if not (processes / "self" / "fd").is_dir():
        return None
    target = str(path.resolve())
    return any(_link(entry) == target for entry in processes.glob("[0-9]*/fd/*"))


def _link(entry: Path) -> str | None:
    try:
        return os.readlink(entry)
    except OSError:
        return None
