"""Every command on every page works: each is run here in a small form, or by a named test.

A new command on a page fails here until it has a form, and so does a form whose command is gone.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_dist.cli import main
from tests.forked import CONTEXT, begin, ensure_server

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = "--epochs 1 --model.name resnet8 --model.options '{stem_stride: 2}' --tracking.trackers [] "
SMALL += "--tracking.progress false"
PETS = f"{SMALL} --batch_size 8 --data.size 16 --data.eval_resize 16 --data.workers 0"
QUICKSTART = f"--config quickstart {SMALL} --batch_size 512 --run_dir runs/quickstart"

# Commands that train, in order: replacements for some words, and additions that make each small.
# Launchers' words go to the launcher's own parser, and the recipe's words train on one rank.
TRAINED = {
    "robust-dist train --config imagefolder --data.root /data/pets --run_dir runs/pets": ({}, PETS),
    "robust-dist train --accelerate ddp --num_processes 8 --config imagefolder --data.root /data/pets "
    "--run_dir runs/pets": ({}, PETS),
    "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 launch/train.py "
    "--config configs/recipes/imagefolder.yaml --data.root /data/pets --run_dir runs/pets": ({}, PETS),
    "robust-dist train --config imagefolder_small --data.root /data/pets --model.weights DEFAULT --optimizer.lr 0.001 "
    "--optimizer.head_lr_mult 10": (
        {"DEFAULT": "runs/pets"},
        PETS + " --data.eval_share null --optimizer.beta2 0.99 --run_dir runs/small",
    ),
    "robust-dist train --config RUN/recipe.yaml --init_from RUN --epochs 60 --run_dir runs/longer": (
        {"RUN": "runs/pets", "60": "1"},
        "",
    ),
    "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 4 launch/train.py "
    "--config configs/recipes/cifar10_resnet56.yaml --run_dir runs/lr05 --optimizer.lr 0.05": (
        {},
        f"{SMALL} --batch_size 512 --data.name digits",
    ),
}
# Commands of `robust-dist` that run after these: replacements for some words, and additions.
RUN = {
    "robust-dist evaluate runs/pets /data/pets/test": ({"/data/pets/test": "/data/pets/val"}, ""),
    "robust-dist predict runs/pets photo.jpg": ({}, ""),
    "robust-dist plan --model timm/vit_large_patch16_224 --nodes 8 --batch-size 4096 --precision bf16": (
        {"timm/vit_large_patch16_224": "timm/test_vit"},
        "",
    ),
    "robust-dist preview --config quickstart": ({}, "--rows 2"),
    "robust-dist convert SRC DST --to zero2 --world-size 8": ({"SRC": "runs/pets/checkpoints/step-00000003"}, ""),
    "robust-dist evaluate runs/quickstart": ({}, ""),
    "robust-dist predict runs/quickstart IMAGE_OR_FOLDER ... --top-k 3": (
        {"IMAGE_OR_FOLDER ...": "photo.jpg pets"},
        "",
    ),
    "robust-dist export runs/quickstart exported --format safetensors,torch.export": ({}, ""),
    "robust-dist runs runs --plot runs.png": ({}, ""),
    "robust-dist preview --config configs/recipes/imagefolder.yaml --data.root /data/pets": (
        {},
        "--rows 2 --data.size 16 --out pets.png",
    ),
    "robust-dist plan --config configs/recipes/cifar10_resnet34.yaml --gpus-per-node 4 --gpu a100-40": (
        {"cifar10_resnet34": "quickstart"},
        "",
    ),
    "robust-dist plan --model resnet50 --nodes 2 --batch-size 2048 --json": ({"resnet50": "resnet8"}, ""),
}
# Commands run by other tests: where, and a piece of the test's code that shows it.
ELSEWHERE = {
    "bash launch/quickstart.sh": ("launch/test_scripts.py", '"quickstart.sh"'),
    "robust-dist doctor": ("test_cli.py", '"doctor"'),
    "robust-dist train --config quickstart --model.name my_code:Net --optimizer.name my_code:Lion": (
        "test_walks.py",
        "own_model:SmallNet",
    ),
    "robust-dist recipe /data/pets --out pets.yaml": ("test_walks.py", "robust-dist recipe pictures --out"),
    "robust-dist train --config pets.yaml": ("test_walks.py", "robust-dist train --config pictures.yaml"),
    "robust-dist verify --minutes 5": ("verify/test_verify.py", '"verify"'),
    "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 -m robust_dist.verify": (
        "verify/test_verify.py",
        "robust_dist.verify",
    ),
    "robust-dist study run digits_table2 --workers 2": ("study/test_run.py", '"study", "run"'),
    "robust-dist study run configs/studies/digits_table2.yaml --workers 2": ("study/test_run.py", '"--workers"'),
    "robust-dist study run configs/studies/NAME.yaml --workers 2": ("study/test_run.py", '"--workers"'),
    "robust-dist study run configs/studies/digits_table2.yaml --dry-run": ("study/test_cost.py", '"--dry-run"'),
    "robust-dist study status runs/studies/digits_table2": ("study/test_run.py", '"status"'),
    "robust-dist study report runs/studies/digits_table2": ("study/test_run.py", '"report"'),
    "robust-dist study report runs/studies/NAME --out configs/studies/results/NAME": (
        "study/test_report.py",
        '"--out"',
    ),
    "robust-dist study report runs/studies/A --against runs/studies/B": ("study/test_report.py", '"--against"'),
    "robust-dist bench optimizer": ("bench/test_bench_optimizer.py", '"optimizer"'),
    "robust-dist plan --check": ("plan/test_measured.py", "check"),
    ".venv/bin/python -m tests.house": ("test_house.py", "house"),
    '[ -f "$RUN_DIR/stopped.json" ] && scontrol requeue "$SLURM_JOB_ID"': ("launch/test_slurm.py", "requeue"),
}
PRINTED_BY_PLAN = "robust_dist/plan/README.md"


def commands():
    """(page, command) for every line of a block of commands; a trailing backslash continues a line."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True).stdout
    for page in listed.split():
        for block in BLOCK.findall((ROOT / page).read_text()):
            for line in block.replace("\\\n", "").splitlines():
                command = " ".join(line.partition(" #")[0].split())
                parts = [command] if command.startswith("[") else command.split(" && ")
                yield from ((page, part) for part in parts if part)


COMMANDS = sorted(set(commands()))


def is_known(page, command):
    forms = (TRAINED, RUN, ELSEWHERE)
    # `bash tests/run.sh` runs this test; plan's output is on its page.
    simple = command.startswith(("bash tests/run.sh", "pip install ", ".venv/bin/python -m pytest "))
    return simple or any(command in form for form in forms) or (page == PRINTED_BY_PLAN and "accelerate" in command)


def test_every_command_of_a_page_has_a_form_and_every_form_a_command():
    assert [f"{page}: {command}" for page, command in COMMANDS if not is_known(page, command)] == []
    shown = {command for _, command in COMMANDS}
    assert [form for form in (*TRAINED, *RUN, *ELSEWHERE) if form not in shown] == []


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_that_another_test_runs_is_in_that_test(command):
    file, code = ELSEWHERE[command]
    assert code in (ROOT / "tests" / file).read_text()


def test_every_extra_that_a_page_installs_is_there():
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    extras = re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)
    wanted = [re.search(r"\[(.*)\]", command) for _, command in COMMANDS if command.startswith("pip install ")]
    assert {name for found in wanted if found for name in found[1].split(",")} <= set(extras)


def small(command, replaced):
    """The command with some words replaced."""
    for words, others in {**replaced, "/data/pets": "pets"}.items():
        assert words in command or words == "/data/pets"
        command = command.replace(words, others)
    return command


def script_words(command):
    """The recipe's words of a training command, after its launcher's own parser has taken the others."""
    from accelerate.commands.launch import launch_command_parser

    from robust_dist.train.__main__ import launch_command

    words = shlex.split(command)
    if words[:3] == ["robust-dist", "train", "--accelerate"]:
        words = launch_command(words[3], words[4:])[3:]
    elif words[0] == "accelerate":
        words = words[2:]
    else:
        return words[2:]
    taken = launch_command_parser().parse_args(words)
    assert Path(taken.config_file).is_file()
    rest = taken.training_script_args
    if "--num_processes" in rest:
        at = rest.index("--num_processes")
        rest = rest[:at] + rest[at + 2 :]
    return rest


def train_all(folder):
    begin(os.environ | {"ACCELERATE_USE_CPU": "true"})
    os.chdir(folder)
    from accelerate.state import AcceleratorState, GradientState

    todo = [shlex.split(QUICKSTART)]
    todo += [
        [*script_words(small(command, replaced)), *shlex.split(added)] for command, (replaced, added) in TRAINED.items()
    ]
    for words in todo:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        main(["train", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a reader of the pages: pictures, a photograph, the checkout's files, and trained runs."""
    folder = tmp_path_factory.mktemp("reader")
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for level, name in enumerate(("cat", "dog")):
            Path(folder, "pets", part, name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 128, (20, 24, 3), dtype=np.uint8) + np.uint8(100 * level)
                Image.fromarray(pixels).save(folder / "pets" / part / name / f"{number}.jpg")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    ensure_server()
    process = CONTEXT.Process(target=train_all, args=(str(folder),))
    process.start()
    process.join(timeout=300.0)
    assert process.exitcode == 0
    return folder


def test_the_commands_that_train_train(folder):
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [
        "longer",
        "lr05",
        "pets",
        "quickstart",
        "small",
    ]


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    replaced, added = RUN[command]
    assert main([*shlex.split(small(command, replaced))[1:], *added.split()]) == 0
    assert capsys.readouterr().out
