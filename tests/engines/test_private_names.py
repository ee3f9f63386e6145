"""engines/README.md lists the private interfaces of libraries that we depend on, and no other is used."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = Path(ROOT, "robust_dist", "engines", "README.md").read_text().partition("## Private interfaces we depend on")[2]


def private_imports(path):
    """Modules and names of other packages that begin with an underscore, as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("robust_dist", "__")):
            for name in node.names:
                if any(part.startswith("_") for part in f"{node.module}.{name.name}".split(".")):
                    yield node.module, name.name


def test_every_private_import_is_on_the_page():
    used = {pair for path in Path(ROOT, "robust_dist").rglob("*.py") for pair in private_imports(path)}
    assert used
    missing = [f"{module}.{name}" for module, name in used if name not in PAGE and module not in PAGE]
    assert not [name for name in missing if "torch.testing._internal" not in name]


def test_the_files_and_the_tests_on_the_page_are_there():
    files = re.findall(r"`([\w/]+\.py)`", PAGE.partition("## Transformers")[0])
    assert len(files) > 20
    assert not [name for name in files if not Path(ROOT, "robust_dist", name).is_file()]
    tests = "".join(path.read_text() for path in Path(ROOT, "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE.partition("## Transformers")[0]))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in tests]
