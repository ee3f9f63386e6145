"""`robust-dist train`, `python -m robust_dist.train` and `accelerate launch -m robust_dist.train`."""

# Nothing else at the top: the server that forks the image readers imports this file.
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def launch_command(file: str, words: Sequence[str]) -> list[str]:
    """The `accelerate launch` command that trains a recipe.

    Args:
        file: An Accelerate configuration, or the name of one in the package (ddp, fsdp2, zero2, ...).
        words: The recipe's words; `--num_processes N` among them also goes to the launcher.

    Raises:
        ValueError: The file does not exist.
        DocumentError: It is not YAML.
    """
    from robust_dist.documents import CONFIGS, config_names, find_config, read_yaml

    path = find_config("accelerate", file)
    try:
        data = read_yaml(path).data or {}
    except FileNotFoundError:
        known = ", ".join(config_names("accelerate"))
        raise ValueError(f"--accelerate {file}: there is no such file or configuration; known are {known}") from None
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    json = (data.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if json is not None and not Path(json).exists() and (CONFIGS.parent / json).is_file():
        # The package's files name it by its path in a checkout.
        command += ["--deepspeed_config_file", str(CONFIGS.parent / json)]
    for word, value in zip(words, [*words[1:], ""], strict=False):
        name, equals, given = word.partition("=")
        if name == "--num_processes":
            command += [name, given if equals else value]
    return [*command, "-m", "robust_dist.train", *words]


def launch(file: str, words: Sequence[str]) -> None:
    """Replace this process with the launcher of a recipe's ranks; see `launch_command`."""
    command = launch_command(file, words)
    print(shlex.join(command), flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    from robust_dist.train.main import main

    main()
