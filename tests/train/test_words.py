"""Errors in a command line, a launcher's file or a model's options are reported before anything is built."""

import os
import re

import pytest

from robust_dist.engines import accelerate
from robust_dist.engines.accelerate import EngineError, check_launch, gpus_wanted
from robust_dist.train.build import build_classifier
from robust_dist.train.main import main
from robust_dist.train.parse import check_recipe_is_named
from robust_dist.train.recipe import ModelConfig, Recipe, parse_recipe
from tests.train.under_engines import ROOT

CONFIGS = ROOT / "configs" / "accelerate"


@pytest.mark.parametrize("words", [[], ["--run_dir", "here"], ["--epochs=3", "--data.root", "images"]])
def test_a_start_without_a_recipe_lists_the_recipes(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: no recipe is given: set --config to a file or one of the package's: cifar" in said
    assert all(path.stem in said for path in (ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--optimizer.lrr", "--optimizer.lr"),
        ("--optimiser.weight_decay=1", "--optimizer.weight_decay"),
        ("--lr", "--optimizer.lr"),
        ("--epoch", "--epochs"),
        ("--data.rot", "--data.root"),
        ("--data.train+", "--data.train"),
    ],
)
@pytest.mark.parametrize("value", [["1"], ["-1"], []])
def test_an_unknown_setting_says_the_nearest_ones_beside_all_else_that_is_wrong(word, near, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--epochs", "1.5", word, *value])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.search(rf"unknown setting {re.escape(word.partition('=')[0])}; did you mean .*'{near}'", said)
    assert "epochs=1.5" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--model.name", "resnet8", "--model.options.depth", "3"],
        ["--data.name", "digits", "--optimizer", "{lr: 0.2}", "--optimizer.lr", "1"],
    ],
)
def test_a_recipe_may_be_written_on_the_command_line_alone(words):
    check_recipe_is_named(words)
    assert parse_recipe(words) != Recipe()


def launcher(config, *options):
    words = ["python", "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    return [*words, "launch/train.py", "--config", "R.yaml"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("ddp", True), ("cpu", False), ("zero2", False), ("fsdp2", False), ("multinode_ddp", False)]
)
def test_a_file_for_the_gpus_of_one_host_is_known(name, wanted):
    assert bool(gpus_wanted(launcher(CONFIGS / f"{name}.yaml", "--num_processes", "8"))) == wanted


def test_what_is_no_launcher_or_no_file_says_nothing(tmp_path):
    assert gpus_wanted(["python", "-m", "pytest", "--config_file", str(CONFIGS / "ddp.yaml")]) is None
    assert gpus_wanted(launcher(tmp_path / "absent.yaml")) is None
    assert gpus_wanted(["accelerate", "launch", "--multi_gpu", "launch/train.py"]) is None


@pytest.fixture
def launched(monkeypatch):
    """A process on a host without GPUs, started by a launcher's command; returns the command to fill in."""
    words = []
    monkeypatch.setattr(accelerate.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accelerate, "_launcher_words", lambda: words)
    return words


def test_gpu_ranks_without_a_gpu_are_refused_with_the_processor_s_command(launched, monkeypatch):
    launched += launcher(CONFIGS / "ddp.yaml", "--num_processes", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    cores = min(8, len(os.sched_getaffinity(0)))
    command = rf"configs/accelerate/cpu.yaml --num_processes {cores} launch/train.py --config R.yaml$"
    with pytest.raises(EngineError, match=rf"ddp.yaml is for GPUs .*torch sees no GPU here; 8 ranks .*{command}"):
        check_launch()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launch()


def test_one_process_in_place_of_several_is_refused_with_the_processor_s_command(launched, monkeypatch):
    words = ["/bin/accelerate", "launch", "--num_processes=2", "launch/train.py", "--config", "R.yaml"]
    launched[:] = words
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EngineError, match=r"asked for 2 processes and started ONE.*cpu.yaml --num_processes \d launch"):
        check_launch()
    # The recipe's own key does not concern the launcher.
    launched[:] = [*words[:2], *words[3:], "--num_processes", "2"]
    check_launch()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_vit", {"pretrained": True}, "model.options.pretrained=True cannot be set: use model.weights"),
        ("resnet18", {"weights": "DEFAULT"}, "model.options.weights='DEFAULT' cannot be set"),
        ("resnet8", {"pretrained": True}, "model.options.pretrained=True cannot be set"),
        ("timm/test_vit", {"in_chans": 1}, "model.options.in_chans=1 cannot be set: it follows from the data"),
        ("resnet18", {"dropuot": 1}, "^model.options.dropuot=1 with model.name='resnet18': .*'dropuot'"),
        (
            "mlp",
            {"width": 0, "side": 32},
            r"^model.options.width=0 with model.name='mlp': width=0 is below 1: it",
        ),
        ("resnet8", {"width": "wide"}, "^model.options.width='wide' with model.name='resnet8': width='wide' is a str"),
        ("resnet18", {"groups": 0}, "^model.options.groups=0 with model.name='resnet18': "),
        ("resnet50", {"width_per_group": -4}, "^model.options.width_per_group=-4 with model.name='resnet50': "),
    ],
)
def test_options_that_a_model_cannot_have_are_named_without_a_library_s_words(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_classifier(Recipe(model=ModelConfig(name=name, options=options)), 10, 3)
    assert "()" not in str(error.value)
