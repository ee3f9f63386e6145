"""A new user's walk: own model, data, optimizer, schedule and stages by name, then an own method in a study.

It happens in an environment that has the wheel, in a folder that holds the files of configs/examples and nothing else.
"""

import ast
import csv
import json
import shlex
import shutil

import pytest
import torch

from robust_dist.train.recipe import parse_recipe
from tests import fresh

EXAMPLES = fresh.ROOT / "configs" / "examples"
# What a user types; one process runs all of it, as the start of each would take seconds.
COMMANDS = """
robust-dist train {own} --batch_size 128 --epochs 2 --optimizer.lr 0.003 --run_dir runs/own
robust-dist evaluate runs/own
robust-dist predict runs/own stripes.png --format csv --out predicted.csv
robust-dist export runs/own exported
robust-dist study run own_study.yaml --dir runs/study
"""
DRIVER = """
import shlex, sys
from robust_dist.cli import main

if __name__ == "__main__":
    for line in sys.argv[1].strip().splitlines():
        print("$", line, flush=True)
        status = main(shlex.split(line)[1:])
        if status:
            sys.exit(status)
"""


def words_of(path):
    """The command of an example's first lines, without its folder."""
    said = ast.get_docstring(ast.parse(path.read_text())).partition("robust-dist train ")[2].replace("\\\n", " ")
    words = shlex.split(said)
    return words[: words.index("--run_dir")]


def scripts():
    return sorted(EXAMPLES.glob("own_*.py"))


def test_every_example_is_short_and_its_command_is_a_recipe_s():
    assert len(scripts()) == 5
    for path in EXAMPLES.iterdir():
        assert len(path.read_text().splitlines()) <= 30, path
    for path in scripts():
        recipe = parse_recipe(words_of(path))
        assert f"{path.stem}:" in f"{recipe.model} {recipe.data} {recipe.optimizer} {recipe.schedule} {recipe.augment}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    for path in EXAMPLES.iterdir():
        shutil.copy(path, folder)
    study = folder / "own_study.yaml"
    text = study.read_text()
    assert "epochs: 5" in text
    assert "batch_size: [64, 256]" in text
    study.write_text(text.replace("epochs: 5", "epochs: 3").replace("[64, 256]", "[64]"))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, 1::4] = image[:, :, ::4] = 200
    from torchvision.transforms.functional import to_pil_image

    to_pil_image(image).save(folder / "stripes.png")
    (folder / "drive.py").write_text(DRIVER)
    own = list(dict.fromkeys(word for path in scripts() for word in words_of(path)[2:]))
    status, said = fresh.run("drive.py", COMMANDS.format(own=shlex.join(["--config", "quickstart", *own])), cwd=folder)
    assert status == 0, said
    return folder, said


def test_own_parts_train_and_the_model_is_used_by_the_next_commands(walked):
    folder, said = walked
    assert "run: own_model:SmallNet" in said
    assert "own_optimizer:Lion" in said
    assert "on 128 images of own_data:Stripes" in said
    assert "the same)" in said
    (row,) = csv.DictReader((folder / "predicted.csv").open())
    assert row["class_1"] in ("standing", "lying")
    record = json.loads((folder / "exported/model.json").read_text())
    assert record["recipe"]["model"]["name"] == "own_model:SmallNet"
    noted = json.loads((folder / "runs/own/environment.json").read_text())["starts"][0]["own_code"]
    assert len(noted) == 6


def test_an_own_method_stands_in_a_study_s_report_beside_the_built_in_ones(walked):
    folder, said = walked
    report = json.loads((folder / "runs/study/report/report.json").read_text())
    found = {run["labels"][0]: run["accuracy"] for run in report["runs"]}
    assert found.keys() == {"ours", "AdamW", "Lion"}
    # Three epochs of digits, where guessing is right in 10 %.
    assert found["Lion"] > 0.2
    assert "[3/3]" in said
