"""`module:Name` in a recipe: only the user's own code is imported, and each mistake is reported with its key."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import robust_dist
from robust_dist import RobustAugment, own_code
from robust_dist.data.image_set import ImageSet
from robust_dist.models import build_model
from robust_dist.preview import columns
from robust_dist.study.outcome import chance_of
from robust_dist.study.parse import load_study
from robust_dist.train.augment_config import own_stage
from robust_dist.train.build import check_own
from robust_dist.train.main import train
from robust_dist.train.optimizers import OptimizerConfig, choice_of
from robust_dist.train.recipe import parse_recipe
from robust_dist.train.sources import open_sets
from tests.study.studies import write

CODE = """
import torch
from torch import nn
from os import system
from robust_dist.data.registry import dataset_info

class Net(nn.Sequential):
    def __init__(self, classes, width=4):
        super().__init__(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(4 * width, classes))

class Wordy(Net):
    def __init__(self, width=4, *, num_classes, in_channels, bias):
        super().__init__(num_classes, width)

class Shapeless(Net):
    def __init__(self, classes):
        super().__init__(classes + 1)

class Narrow(nn.Linear):
    def __init__(self, classes):
        super().__init__(7, classes)

class Broken(nn.Module):
    def __init__(self, classes):
        raise KeyError("width")

class Signed(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())

def wide(classes):
    return Net(classes, 8)

def no_rate(params):
    return torch.optim.LBFGS(params) if False else WithoutRate(params, {})

class WithoutRate(torch.optim.Optimizer):
    pass

net = Net(10)
digits = dataset_info("digits")

def nothing(*given, **named):
    return None

def line(step, total_steps):
    return 1 - step / total_steps

def negative(step, total_steps):
    return -1.0

def squares(train, count=64):
    labels = torch.arange(count) % 4
    return (labels.view(-1, 1, 1, 1) * 60).expand(-1, 3, 16, 16).byte().contiguous(), labels

def flipped(images, labels, keys):
    return images.flip(3), labels

def floats(images, labels, keys):
    return images / 255, labels

class Twice(nn.Module):
    def forward(self, images, targets, keys):
        return images * 2, targets
"""
SOURCE = """
import io
from PIL import Image
from robust_dist.train.data_config import SourceChoice

class Squares:
    name, classes, group_sizes = "squares", ("dark", "red"), (8,)

    def __len__(self):
        return 8

    def read(self, index):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (200 * (index % 2), 0, 0)).save(file, "PNG")
        return file.getvalue(), index % 2

    def where(self, index):
        return f"square {index}"

def open_squares(data, part, classes, download, shade=0):
    return Squares()

choice = SourceChoice(open=open_squares)
"""
QUIET = ["--tracking.trackers", "[]", "--tracking.progress", "false"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder, with the user's own code in it."""
    place, before, path = tmp_path_factory.mktemp("own"), Path.cwd(), list(sys.path)
    (place / "mycode.py").write_text(CODE)
    (place / "broken_import.py").write_text("x = 1\nraise LookupError('no licence')\n")
    (place / "wrong_syntax.py").write_text("x = 1\ndef f(:\n")
    (place / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    (place / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (place / "mysource.py").write_text(SOURCE)
    (place / "json.py").write_text("raise SystemExit('the own json was imported')\n")
    (place / "yaml.py").write_text("raise SystemExit('the own yaml was imported')\n")
    (place / "nets" / "inner").mkdir(parents=True)
    (place / "nets" / "inner" / "small.py").write_text("from mycode import Net\n")
    os.chdir(place)
    AcceleratorState._reset_state(True)
    yield place
    os.chdir(before)
    sys.path[:] = path
    own_code.named.clear()


def recipe(*words):
    return parse_recipe([*QUIET, *words])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.name", "os:system", r"'os' is not yours.*--import os to the command line"),
        ("model.name", "json:loads", r"'json' is not yours.*--import json"),
        ("model.name", "torchvision.models:resnet18", r"is not yours.*--import torchvision.models"),
        ("model.name", "robust_dist.cli:main", r"'robust_dist' is not yours"),
        ("model.name", "yaml:Net", r"another module 'yaml' \(.*site-packages.*rename yours"),
        ("model.name", "mycod:Net", r"there is no module 'mycod'; did you mean mycode\?.*--import MODULE"),
        ("model.name", "nets.outer.small:Net", r"there is no module 'nets.outer'"),
        ("model.name", "mycode:Nett", r"mycode.py has no name 'Nett'; did you mean mycode:Net"),
        ("model.name", "../mycode:Net", r"write MODULE:NAME"),
        ("model.name", "mycode:", r"write MODULE:NAME"),
        ("model.name", "broken_import:Net", r"LookupError: no licence \(.*broken_import.py, line 2"),
        ("model.name", "wrong_syntax:Net", r"SyntaxError.*wrong_syntax.py, line 2"),
        ("model.name", "needs_more:Net", r"No module named 'a_package_that_is_not_there' \(.*needs_more.py, line 1"),
        ("model.name", "leaves:Net", r"leaves cannot be imported: SystemExit: 3"),
        ("model.name", "mycode:net", r"is a Net; it must be a class of torch.nn.Module"),
        ("model.name", "mycode:Signed", r"is the type Signed; it must be a class of torch.nn.Module"),
        ("optimizer.name", "mycode:Net", r"it must be a class of torch.optim.Optimizer"),
        ("optimizer.name", "mycode:net", r"it must be a class of torch.optim.Optimizer"),
        ("data.name", "mycode:line", r"cannot be called as line\(train=True\).*signature is line\(step, total_steps\)"),
        ("schedule.name", "mycode:Net", r"it must be a function of step and total_steps"),
        ("schedule.name", "mycode:flipped", r"cannot be called as flipped\(int, int\).*missing a required argument"),
        ("schedule.name", "mycode:negative", r"returns -1.0 at step 0 of 1000; it must be finite and at least 0"),
        ("schedule.name", "mycode:nothing", r"returns None at step 0"),
        ("data.name", "mycode:net", r"is a Net; it must be a Dataset class"),
        ("data.name", "mycode:Net", r"is the type Net; it must be a Dataset class"),
        ("augment.before", "[mycode:line]", r"cannot be called as line\(Tensor, Tensor, Tensor\)"),
        ("augment.after", "[mycode:Signed]", r"it must be a function of images, labels and keys"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_key_value_and_what_would_be_right(key, value, said):
    shown = value.strip("[]")
    with pytest.raises(ValueError, match=rf"(?s)^{key}='{shown}'.*{said}"):
        check_own(recipe(f"--{key}", value))
    assert "os" not in own_code.named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.name", "mycode:Net", "--model.options.depth", "3"], r"unexpected keyword argument 'depth'"),
        (["--model.name", "mycode:Shapeless"], r"returns \[2, 11\] for 2 images, expected \[2, 10\]"),
        (["--model.name", "mycode:Narrow"], r"failed: RuntimeError: mat1 and mat2"),
        (["--model.name", "mycode:Broken"], r"failed: KeyError: 'width' \(.*mycode.py, line \d+: raise KeyError"),
        (["--model.name", "mycode:system"], r"model.name='mycode:system'"),
        (["--model.name", "mycode:nothing"], r"returned a NoneType; it must be a torch.nn.Module"),
        (["--optimizer.name", "mycode:nothing"], r"returned a NoneType; it must return a torch.optim.Optimizer"),
        (["--optimizer.name", "mycode:no_rate"], r"param groups without a learning rate"),
        (["--optimizer.name", "mycode:Signed", "--optimizer.options.r", "1"], r"unexpected keyword argument 'r'"),
        (["--data.name", "mycode:nothing"], r"a NoneType is not a set of images"),
        (["--data.name", "mycode:squares", "--data.size", "64"], r"data.size=64 is for data.name=imagefolder"),
        (["--augment.before", "[mycode:floats]"], r"turned images of torch.uint8 .* into torch.float32"),
        (["--augment.after", "[mycode:nothing]"], r"returned a NoneType; it must return two tensors"),
    ],
)
def test_what_does_not_do_its_part_is_refused_before_the_first_step(words, said, tmp_path):
    small = ["--model.name", "resnet8", "--batch_size", "512", "--epochs", "1"]
    with pytest.raises(ValueError, match=said):
        train(recipe(*small, *words, "--run_dir", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_reading_a_recipe_imports_nothing(folder):
    (folder / "marked.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    keys = ("model.name", "data.name", "optimizer.name", "schedule.name")
    words = [word for key in keys for word in (f"--{key}", "marked:Name")]
    found = recipe(*words, "--augment.before", "[marked:Name]", "--augment.after", "[marked:Name]")
    assert found.model.name == "marked:Name"
    assert not Path("imported").exists()
    with pytest.raises(own_code.OwnCodeError, match="has no name 'Name'"):
        check_own(found)
    assert Path("imported").exists()


def test_names_are_taken_at_the_keys_of_names_alone_and_never_from_options_or_a_file_s_import(folder):
    with pytest.raises(ValueError, match=r"class_path is not allowed: a recipe is data"):
        recipe("--model.options", "{a: {class_path: 'mycode:Net'}}")
    assert recipe("--model.options.a", "mycode:Net").model.options == {"a": "mycode:Net"}
    (folder / "r.yaml").write_text("import: os\n")
    with pytest.raises(SystemExit):
        parse_recipe(["--config", "r.yaml"])
    with pytest.raises(ValueError, match="write the dotted name of a module"):
        parse_recipe(["--import", "../os"])
    assert "os" not in own_code.named


def test_a_module_that_the_command_line_names_is_taken_and_what_lies_below_it():
    with pytest.raises(ValueError, match="is not yours"):
        build_model("torchvision.models.alexnet:alexnet", 10)
    parse_recipe(["--import", "torchvision.models"])
    assert build_model("torchvision.models.alexnet:alexnet", 7).classifier[-1].out_features == 7
    with pytest.raises(ValueError, match="is not yours"):
        build_model("torchvision.ops:MLP", 10)


def test_a_folder_of_pythonpath_counts_and_one_of_installed_packages_does_not(tmp_path, monkeypatch):
    for name in ("code", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in_{name[:4]}.py").write_text("from mycode import Net\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(tmp_path / name) for name in ("code", "site-packages")))
    assert build_model("in_code:Net", 3)[-1].out_features == 3
    with pytest.raises(ValueError, match="no module 'in_site'"):
        build_model("in_site:Net", 3)


def test_a_run_s_own_folder_is_no_place_of_code(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "data.json").touch()
    (tmp_path / "recipe.yaml").write_text("model: {name: planted:Net}\n")
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no module 'planted'.*none here"):
        check_own(parse_recipe(["--config", "recipe.yaml"]))


def test_a_model_gets_what_its_signature_has_and_the_recipe_s_seed():
    assert build_model("nets.inner.small:Net", 5, width=6)[-1].in_features == 24
    assert build_model("mycode:wide", 5)[0].out_channels == 8
    assert build_model("mycode:Wordy", 5, bias=False)[-1].out_features == 5
    with pytest.raises(ValueError, match=r"cannot be called as Wordy\(num_classes=5.*missing a required.*'bias'"):
        build_model("mycode:Wordy", 5)
    first, second = (recipe("--model.name", "mycode:Net").model.build(10, 3, seed=4) for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)


def test_an_optimizer_gets_those_of_the_recipe_s_settings_that_it_takes():
    config = OptimizerConfig(name="mycode:Signed", lr=0.5)
    assert choice_of(config.name).arguments(config, config.betas) == {"lr": 0.5}
    config = OptimizerConfig(name="mycode:nothing", eps=1e-3)
    assert set(choice_of(config.name).arguments(config, config.betas)) == {"lr", "betas", "eps", "weight_decay"}


def test_a_run_of_own_parts_notes_their_source_and_warns_once_where_it_has_changed(folder, tmp_path, capsys):
    (folder / "changing.py").write_text(
        "from mycode import *\n\ndef noise(images, labels, keys):\n    return images, labels\n"
    )
    words = ["--model.name", "mycode:Net", "--optimizer.name", "mycode:Signed", "--schedule.name", "mycode:line"]
    words += ["--data.name", "mycode:squares", "--augment.before", "[mycode:flipped, changing:noise]"]
    words += ["--augment.after", "[mycode:Twice]", "--batch_size", "16", "--epochs", "2"]
    asked = recipe(*words, "--run_dir", str(tmp_path))
    rows = train(asked)
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * (1 - step / 8) for step in (3, 7)])
    noted = json.loads((tmp_path / "environment.json").read_text())["starts"][0]["own_code"]
    assert noted["augment.before=changing:noise"]["file"] == str(folder / "changing.py")
    assert "name: mycode:Net" in (tmp_path / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "data.json").read_text())["classes"] == list("0123")
    assert chance_of(asked, tmp_path) == 0.25
    model, preprocess = robust_dist.load(tmp_path)
    assert (type(model).__name__, preprocess.classes) == ("Net", tuple("0123"))
    with (folder / "changing.py").open("a") as file:
        file.write("# Changed.\n")
    capsys.readouterr()
    assert train(asked) == rows
    assert capsys.readouterr().out.count("changing.py has changed since this run was last started") == 1
    assert train(asked) == rows
    assert "has changed" not in capsys.readouterr().out


def test_files_of_one_s_own_are_read_by_the_source_that_is_named_with_the_keys_of_all_files():
    words = ["--data.name", "mysource:choice", "--data.size", "16", "--data.workers", "0", "--data.options.shade", "1"]
    train_set, _ = open_sets(recipe(*words).data, torch.device("cpu"), download=False)
    first = train_set.first_samples(0, 0, 4, 4)
    assert first.images.shape == (4, 3, 16, 16)
    assert [bool(image[0].any()) for image in first.images] == [bool(label) for label in first.labels]
    with pytest.raises(ValueError, match=r"data.options=\{'colour': 1\} do not suit data.name='mysource:choice'"):
        check_own(recipe(*words[:2], "--data.options.colour", "1"))


def test_the_preview_has_a_column_for_each_stage_of_one_s_own_before_the_crop():
    images = ImageSet(
        torch.arange(12 * 64, dtype=torch.int64).remainder(255).byte().view(4, 3, 8, 8),
        torch.arange(4),
        tuple("abcd"),
        "s",
    )
    augment = RobustAugment(4, 8, (0.5,) * 3, (0.5,) * 3, crop=1, flip=False, trivial=False, cutmix=False)
    before = {"mycode:flipped": own_stage("augment.before", "mycode:flipped")}
    found = columns(images, augment, rows=2, seed=0, epoch=0, batch_size=4, before=before)
    assert [column.title for column in found] == ["as stored", "mycode:flipped", "crop"]
    assert torch.equal(found[1].images, found[0].images.flip(3))


def test_a_study_takes_own_names_and_refuses_a_wrong_one_with_its_cell(tmp_path):
    axes = {"optimizer.name": ["adamw", "mycode:Signed"], "schedule.name": ["cosine", "mycode:line"]}
    _, recipes = load_study(write(tmp_path / "s.yaml", axes=axes))
    assert sorted(recipes)[-1] == "mycode-Signed_mycode-line"
    with pytest.raises(ValueError, match=r"cell os:system: optimizer.name='os:system' is refused"):
        load_study(write(tmp_path / "s.yaml", axes={"optimizer.name": ["adamw", "os:system"]}))
