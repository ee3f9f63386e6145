"""`fit`: a recipe with your own model, images, optimizer or augmentation (robust_dist/train/README.md)."""

import importlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import robust_dist
from robust_dist.data import load_dataset
from robust_dist.data.registry import DATASETS
from robust_dist.models import MODELS, build_model
from robust_dist.train import main
from robust_dist.train.fit import fit, image_set
from robust_dist.train.folder import RunFolderError
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import PrecisionConfig, parse_recipe
from tests.forked import python

QUIET = ["--tracking.trackers", "[]", "--tracking.progress", "false", "--optimizer.lr", "0.05"]
WORDS = ["--model.name", "resnet8", "--batch_size", "128", "--epochs", "2", *QUIET]
NAMED = [*WORDS, "--model.options", "{stem_stride: 2}"]


def rows(result):
    return [without_measured(row) for row in result.rows]


def digits(part):
    return load_dataset("digits", "data", train=part == "train")


@pytest.fixture(scope="module")
def by_name(tmp_path_factory):
    """The results with the recipe's own parts."""
    return fit(parse_recipe(NAMED), run_dir=tmp_path_factory.mktemp("by") / "name")


def test_a_run_by_name_is_the_one_of_the_command_line(by_name, tmp_path):
    assert rows(by_name) == [
        without_measured(row) for row in main.train(parse_recipe([*NAMED, "--run_dir", str(tmp_path / "run")]))
    ]
    assert by_name.best["eval_accuracy"] == max(row["eval_accuracy"] for row in by_name.rows)
    assert by_name.checkpoint.name == "step-00000024"
    assert (by_name.run_dir / "curves.png").is_file()


def test_parts_of_one_s_own_that_are_the_recipe_s_give_its_bits(by_name, tmp_path):
    def optimizer(groups):
        from robust_dist import RAdaBeliefW

        return RAdaBeliefW(groups, lr=0.05)

    own = fit(
        parse_recipe(WORDS),
        model=lambda classes: build_model("resnet8", classes, stem_stride=2),
        optimizer=optimizer,
        run_dir=tmp_path,
    )
    assert rows(own) == rows(by_name)


class Flat(nn.Sequential):
    def __init__(self, classes, side=32):
        super().__init__(nn.Flatten(), nn.Linear(3 * side * side, classes))


def test_own_images_are_taken_as_tensors_and_as_a_data_set_of_pictures(tmp_path):
    train, test = digits("train"), digits("test")

    class Pictures:
        def __init__(self, of):
            self.of, self.classes = of, train.classes

        def __len__(self):
            return len(self.of)

        def __getitem__(self, index):
            from torchvision.transforms.functional import to_pil_image

            return to_pil_image(self.of.images[index]), int(self.of.labels[index])

    kept = image_set(Pictures(test), "pictures")
    assert torch.equal(kept.images, test.images)
    assert torch.equal(kept.labels, test.labels)
    words = {"model": Flat, "recipe": parse_recipe(WORDS)}
    pairs = fit(
        train_set=(train.images, train.labels), eval_set=(test.images, test.labels), run_dir=tmp_path / "a", **words
    )
    pictures = fit(train_set=Pictures(train), eval_set=Pictures(test), run_dir=tmp_path / "b", **words)
    assert rows(pairs) == rows(pictures)
    assert json.loads((tmp_path / "a/data.json").read_text())["name"] == "own"


def test_an_own_augmentation_is_called_with_bytes_labels_and_keys(tmp_path):
    seen = []

    def halved(images, labels, keys):
        seen.append(
            (images.dtype, tuple(images.shape[1:]), labels.dtype, keys.dtype, len(keys) == len(labels) == len(images))
        )
        return images.float() / 510, labels

    result = fit(parse_recipe(NAMED), augment=halved, run_dir=tmp_path)
    assert set(seen) == {(torch.uint8, (3, 32, 32), torch.int64, torch.int64, True)}
    assert len(seen) == 24
    assert json.loads((tmp_path / "environment.json").read_text())["starts"][0]["backends"]["augmentation"] == "own"
    # As if it had never stopped: the same call finds a finished run.
    assert rows(fit(parse_recipe(NAMED), augment=halved, run_dir=tmp_path)) == rows(result)
    assert len(seen) == 24


def test_nothing_stays_behind_after_a_run(by_name):
    assert "own" not in DATASETS
    assert "own" not in MODELS
    with pytest.raises(ValueError, match="own"):
        parse_recipe(["--optimizer.name", "own"])


def test_a_folder_of_other_parts_is_refused(by_name):
    with pytest.raises(RunFolderError, match=r"model\.name: 'own' here, 'resnet8' in the folder"):
        fit(parse_recipe(WORDS), model=Flat, run_dir=by_name.run_dir)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {"train_set": digits("train")}, "train_set is given but eval_set is not"),
        (lambda: {"eval_set": digits("test")}, "eval_set is given but train_set is not"),
        (lambda: {"train_set": oblong(), "eval_set": oblong()}, "train_set: images of 8x9 are not square"),
        (
            lambda: {"train_set": mixed(), "eval_set": mixed()},
            r"train_set: image 1 is \(3, 9, 9\), but image 0 is \(3, 8, 8\)",
        ),
        (lambda: {"model": lambda classes: nn.Flatten()}, r"returns \[2, 3072\] for 2 images, expected \[2, 10\]"),
    ],
)
def test_parts_that_cannot_be_used_are_refused_before_the_first_step(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(parse_recipe(WORDS), run_dir=tmp_path / "run", **parts())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def oblong():
    return torch.zeros(4, 3, 8, 9, dtype=torch.uint8), torch.arange(4)


def mixed():
    return [(torch.zeros(3, side, side, dtype=torch.uint8), 0) for side in (8, 9)]


def example():
    page = Path(main.__file__).with_name("README.md").read_text().partition("## Your own model, images, optimizer")[2]
    return re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]


def test_the_page_s_example_trains_on_two_ranks_and_the_process_may_train_again_in_another_precision(tmp_path):
    script = tmp_path / "own.py"
    again = """
    recipe = parse_recipe(["--batch_size", "64", "--epochs", "1", "--precision.mixed", "bf16"])
    again = fit(recipe, model=Small, train_set=(images, labels), eval_set=(images, labels), run_dir="runs/again")
    assert {"run_dir", "checkpoint", "metrics", "curves", "recipe"} <= again.paths.keys()
"""
    script.write_text(example() + again.removeprefix("\n"))
    config = Path(__file__).parents[2] / "configs/accelerate/cpu.yaml"
    code, said = python("-m", "accelerate.commands.launch", "--config_file", config, script, cwd=tmp_path)
    assert code == 0, said[-2000:]
    assert said.count("2 ranks") == 2
    assert len((tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "runs/again/metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_of_own_parts_is_loaded_with_its_model_and_predicts_as_it_was_evaluated(tmp_path):
    labels = torch.arange(64) % 4
    images = (labels.view(-1, 1, 1, 1) * 60 + torch.arange(3).view(3, 1, 1)).expand(64, 3, 8, 8).byte().contiguous()
    model = Flat(4, side=8)
    recipe = parse_recipe([*WORDS, "--batch_size", "16", "--epochs", "3"])
    sets = {"train_set": (images, labels), "eval_set": (images, labels)}
    result = fit(recipe, model=model, **sets, run_dir=tmp_path)
    own, preprocess = robust_dist.load(tmp_path, model=model)
    with torch.no_grad():
        right = sum(
            own(preprocess(image)[None]).argmax().item() == label for image, label in zip(images, labels, strict=True)
        )
    assert right / 64 == result.rows[-1]["eval_accuracy"]
    with pytest.raises(ValueError, match=r"your own.*load\(RUN, model="):
        robust_dist.load(tmp_path)


def test_a_notebook_s_cell_shows_the_progress_bar(tmp_path):
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import run_kernel

    words = [word for word in NAMED if word not in ("--tracking.progress", "false")]
    cell = (
        "from robust_dist.train import fit\n"
        "from robust_dist.train.recipe import parse_recipe\n"
        f"print(fit(parse_recipe({words + ['--epochs', '1']!r}), run_dir='run').best['eval_samples'])\n"
    )
    shown = []
    with run_kernel(kernel_name="python3", cwd=str(tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"}) as client:
        client.execute_interactive(cell, timeout=300, output_hook=lambda message: shown.append(message["content"]))
    text = "".join(content.get("text", "") for content in shown) + str(
        [c.get("evalue") for c in shown if "evalue" in c]
    )
    assert "359\n" in text
    assert "/12 [" in text


def test_a_process_may_train_again_in_another_precision_unless_its_own_accelerator_has_one(tmp_path):
    images, labels = torch.zeros(64, 3, 8, 8, dtype=torch.uint8), torch.arange(64) % 4
    words = {
        "model": lambda classes: Flat(classes, side=8),
        "train_set": (images, labels),
        "eval_set": (images, labels),
    }
    # Runs started by the command line's function leave their precision behind.
    AcceleratorState._reset_state(True)
    for precision in ("no", "bf16"):
        recipe = parse_recipe([*WORDS, "--epochs", "1", "--batch_size", "32", "--precision.mixed", precision])
        assert fit(recipe, **words, run_dir=tmp_path / precision).rows[0]["eval_samples"] == 64
    Accelerator(cpu=True)
    try:
        with pytest.raises(ValueError, match=r"precision.mixed='bf16', but this process has an Accelerator of its own"):
            fit(recipe, **words, run_dir=tmp_path / "third")
        assert fit(replace(recipe, precision=PrecisionConfig()), **words, run_dir=tmp_path / "third").rows
    finally:
        AcceleratorState._reset_state(True)


def test_fit_is_one_function_by_both_of_its_paths():
    import robust_dist.train

    assert robust_dist.train.fit is fit
    assert importlib.import_module("robust_dist.train.fit").fit is fit


def test_stages_of_a_recipe_and_an_augmentation_of_a_call_do_not_go_together():
    with pytest.raises(ValueError, match=r"augment is given, but the recipe has stages of its own \(mine:stage\)"):
        fit(parse_recipe([*NAMED, "--augment.before", "[mine:stage]"]), augment=lambda images, labels, keys: None)
