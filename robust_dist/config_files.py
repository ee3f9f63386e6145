"""The recipes, studies and launcher configurations that come with the package, by name.

`robust_dist/configs` is the checkout's `configs`, which a wheel carries along.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def find_config(kind: str, given: str | Path) -> Path:
    """A file as given, or the package's file of that name.

    Args:
        kind: "recipes", "studies" or "accelerate".
        given: A path, or the name of one of the package's files, with or without `.yaml`. A file of the current
            folder comes first.

    Returns:
        The path; as given where there is no such file either, which its reader then reports.
    """
    path = Path(given)
    if path.is_file() or len(path.parts) != 1:
        return path
    packaged = CONFIGS / kind / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
    return packaged if packaged.is_file() else path


def config_names(kind: str) -> list[str]:
    """The names that `find_config` knows, sorted."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
