"""Figures of the code base: `python -m tests.house` prints the guide table."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "robust_dist"
# Private by name but documented; torch's own optimizers are written with its _foreach functions.
DOCUMENTED = re.compile(r"_(asdict|exit|getframe|current_frames|fields|foreach_\w+)$")
ENGINES = {"ddp", "fsdp", "fsdp1", "fsdp2", "hsdp", "deepspeed", "zero0", "zero1", "zero2", "zero3"}


@cache
def modules() -> dict[str, Path]:
    """Every module's file by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def _for_types_alone(module: ast.Module) -> set[int]:
    guarded = (node for node in ast.walk(module) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    return {id(inner) for node in guarded for inner in ast.walk(node)}


@cache
def imports(name: str) -> frozenset[str]:
    """The package's modules that a module imports, also inside functions; type-checking imports do not count."""
    found, skipped = set(), _for_types_alone(tree(name))
    for node in ast.walk(tree(name)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset((found & modules().keys()) - {name})


def reached(name: str) -> set[str]:
    """All modules reachable from a module by imports, including itself."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {other for one in new for other in imports(one)} - found
    return found


def circles() -> list[tuple[str, str]]:
    """Pairs of files that import each other, except packages' own `__init__` files."""
    files = [name for name in modules() if modules()[name].name != "__init__.py"]
    return [(one, other) for one in files for other in imports(one) if one < other and one in imports(other)]


def room(name: str) -> str:
    """The folder of a module below robust_dist; "" for files at the top."""
    parts = modules()[name].relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def arrows() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {room(name): set() for name in modules()}
    for name in modules():
        found[room(name)] |= {room(other) for other in imports(name)} - {room(name)}
    return found


def naming_deepspeed() -> list[str]:
    """Files that mention DeepSpeed, in code or text."""
    return [name for name, path in modules().items() if "deepspeed" in path.read_text(encoding="utf-8").lower()]


def with_engine_names() -> list[str]:
    """Files with an engine's name as a string in the code."""
    return [name for name in modules() if any(_constants(name))]


def with_object_collectives() -> list[str]:
    """Files that call torch's or Accelerate's object collectives."""
    called = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")
    return [name for name in modules() if any(called.fullmatch(one) for one in _names(name))]


def _names(name: str) -> Iterator[str]:
    """All names in a module's code: variables, attributes and imports."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.Name, ast.alias)):
            yield node.id if isinstance(node, ast.Name) else node.name


def _constants(name: str) -> Iterator[str]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lower() in ENGINES:
            yield node.value


def private_places() -> list[tuple[str, str]]:
    """Uses of other packages' private names: (module, name)."""
    own = {found for name in modules() for found in _defined(name)}
    places = set()
    for name in modules():
        skipped = _for_types_alone(tree(name))
        for node in ast.walk(tree(name)):
            used: list[str] = []
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Attribute):
                used = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("robust_dist"):
                used = [alias.name for alias in node.names] + (node.module or "").split(".")
            places |= {
                (name, one)
                for one in used
                if re.match(r"_[a-zA-Z]", one) and one not in own and not DOCUMENTED.match(one)
            }
    return sorted(places)


def _defined(name: str) -> Iterator[str]:
    """Private names that the package itself defines: functions, classes, variables, attributes, arguments."""
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
    if name.rpartition(".")[2].startswith("_"):
        yield name.rpartition(".")[2]


def import_share() -> float:
    """Time of `import robust_dist` after `import torch`, relative to that of `import torch`; the least of five."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import robust_dist; "
        "print((time.perf_counter() - b) / (b - a))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    return min(float(run.stdout) for run in runs)


def figures(*, timed: bool = True) -> dict[str, object]:
    """The guide table; `timed` includes the import time, which takes a while."""
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values())
    return {
        "lines of robust_dist, Python": lines,
        "files": len(modules()),
        "files that train.main reaches by imports": len(reached("robust_dist.train.main")),
        "files that name DeepSpeed": len(naming_deepspeed()),
        "files that hold engine-name strings": len(with_engine_names()),
        "files that use object collectives": len(with_object_collectives()),
        "import circles": len(circles()),
        "private names of other packages, by file": len(private_places()),
        **({"time of `import robust_dist` over `import torch`": round(import_share(), 3)} if timed else {}),
    }


if __name__ == "__main__":
    for what, value in figures().items():
        print(f"{what}: {value}")
    if "--list" in sys.argv:
        print(*(f"{name}: {private}" for name, private in private_places()), sep="\n")
        for one, others in arrows().items():
            print(one or "(top)", "->", ", ".join(sorted(other or "(top)" for other in others)))
