"""The package as `pip install` leaves it: a wheel of this checkout, and an environment with it."""

import atexit
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def folder() -> Path:
    """A folder that lasts as long as this process."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def wheel() -> Path:
    """The wheel, from the files git would include: the checkout's build folder may hold another version's files."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("robust_dist/", "configs/", "pyproject", "README", "LICENSE")) and "/results/" not in name:
            target = folder() / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                target.symlink_to(os.readlink(ROOT / name))
            else:
                target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", folder() / "out", folder() / "source"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next((folder() / "out").glob("*.whl"))


@cache
def interpreter() -> Path:
    """The interpreter of an environment with the wheel, and this one's other packages behind it."""
    place = folder() / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = next(place.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel()) as archive:
        archive.extractall(packages)
    others = dict.fromkeys([sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("site-packages"))])
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return place / "bin" / "python"


def run(*words: str | Path, cwd: Path) -> tuple[int, str]:
    """Run the environment's Python; returns its exit status and output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [interpreter(), *words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr
