"""New users' first steps, in an environment with the wheel and a folder with only the user's files.

A student has a folder of pictures; an engineer a script and a DeepSpeed JSON (tests/walks); a researcher a model, data,
an optimizer, a schedule and stages of their own (configs/examples), and a method for a study.
"""

import ast
import csv
import json
import shlex
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from robust_dist.train.recipe import parse_recipe
from tests import fresh

EXAMPLES = fresh.ROOT / "configs" / "examples"
# What a user types; one process runs all of it, as each start would take seconds.
STUDENT = """
robust-dist recipe pictures --out pictures.yaml
robust-dist train --config pictures.yaml --model.name resnet8 --data.size 16 --epochs 8 --run_dir runs/pictures
robust-dist evaluate runs/pictures
robust-dist predict runs/pictures pictures --format csv --out predictions.csv
robust-dist export runs/pictures exported
"""
ENGINEER = """
robust-dist inspect checkpoint
robust-dist export checkpoint exported
"""
RESEARCHER = """
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


def walk(folder, commands, afterwards=""):
    """The commands' output, followed by the piece of Python."""
    (folder / "drive.py").write_text(DRIVER + afterwards)
    status, said = fresh.run("drive.py", commands, cwd=folder)
    assert status == 0, said
    return said


def test_a_student_s_folder_of_pictures_leads_to_predictions_and_a_model_in_use(tmp_path):
    for level, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            picture = Image.new("RGB", (24, 20), (80 * level + number, 200 - 80 * level, 60))
            picture.save(tmp_path / "pictures" / name / f"{number}.png")
    use = """
    import robust_dist

    model, preprocess = robust_dist.load("exported")
    print("is", preprocess.classes[model(preprocess("pictures/bee/3.png")[None]).argmax()])
"""
    said = walk(tmp_path, STUDENT, use)
    assert ", the same)" in said
    assert said.splitlines()[-1] in ("is ant", "is bee", "is cat")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 36
    assert (tmp_path / "exported" / "model.json").is_file()


def test_an_engineer_s_script_with_a_deepspeed_json_leads_to_an_exported_model(tmp_path):
    pytest.importorskip("deepspeed")
    shutil.copytree(fresh.ROOT / "tests" / "walks", tmp_path, dirs_exist_ok=True)
    words = ["--num_processes", "2", "--use_deepspeed", "--deepspeed_config_file", "ds.json", "train.py"]
    status, said = fresh.run("-m", "accelerate.commands.launch", *words, cwd=tmp_path)
    assert status == 0, said
    said = walk(tmp_path, ENGINEER)
    assert "exp_avg_sq: 4 tensors" in said
    found, logits = load_file(tmp_path / "exported" / "model.safetensors"), torch.load(tmp_path / "logits.pt")
    outputs = torch.nn.functional.conv2d(torch.ones(1, 3, 16, 16), found["0.weight"], found["0.bias"], stride=2).relu()
    outputs = outputs.flatten(1) @ found["3.weight"].T + found["3.bias"]
    torch.testing.assert_close(outputs, logits)


def words_of(path):
    """The command in an example's first lines, without its folder."""
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
    own = list(dict.fromkeys(word for path in scripts() for word in words_of(path)[2:]))
    return folder, walk(folder, RESEARCHER.format(own=shlex.join(["--config", "quickstart", *own])))


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
    # Three epochs of digits, where guessing gives 10 %.
    assert found["Lion"] > 0.2
    assert "[3/3]" in said
