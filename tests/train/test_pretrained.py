"""A run starts from existing weights, and its head has its own learning rate."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robust_dist.models import build_model
from robust_dist.models.weights import head_of, read_published
from robust_dist.train.build import build_optimizer, build_schedule
from robust_dist.train.fit import fit
from robust_dist.train.metrics import without_measured
from robust_dist.train.optimizers import OptimizerConfig
from robust_dist.train.recipe import ModelConfig, Recipe, parse_recipe
from robust_dist.train.weights import Weights, load

QUIET = ["--tracking.trackers", "[]", "--tracking.progress", "false", "--optimizer.lr", "0.05", "--batch_size", "16"]
SMALL = "squeezenet1_1"


def tiny(classes):
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *pool, nn.Linear(16, classes))


def images(classes=4):
    labels = torch.arange(32) % classes
    return (labels.view(-1, 1, 1, 1) * 60 + torch.arange(192).view(1, 3, 8, 8) % 50).byte(), labels


def train(run_dir, *words, classes=4):
    recipe = parse_recipe([*QUIET, "--epochs", "2", *words])
    return fit(recipe, model=tiny, train_set=images(classes), eval_set=images(classes), run_dir=run_dir)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of four classes."""
    folder = tmp_path_factory.mktemp("source") / "run"
    train(folder)
    return folder


def test_a_resume_of_a_run_that_began_with_another_s_weights_never_reads_them_again(source, tmp_path, capsys):
    begun = shutil.copytree(source, tmp_path / "source")
    words = ["--init_from", str(begun), "--checkpoint.every_epochs", "1"]
    rows = train(tmp_path / "run", *words).rows
    assert f"weights: {begun}, step 4, head included" in capsys.readouterr().out
    first, *_ = (source / "metrics.jsonl").read_text().splitlines()
    assert rows[0]["train_loss"] < json.loads(first)["train_loss"]
    shutil.rmtree(begun)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    again = train(tmp_path / "run", *words).rows
    assert list(map(without_measured, again)) == list(map(without_measured, rows))
    assert f"weights: {begun}" not in capsys.readouterr().out


def test_other_classes_get_a_new_head_and_all_else_is_taken(source, tmp_path, capsys):
    words = ["--optimizer.lr", "0", "--model.weights", str(source)]
    made = train(tmp_path / "three", *words, classes=3)
    said = "it has 4 classes, this run 3: the head (5) is new, with 3 outputs"
    assert f"weights: {source}, step 4; {said}" in capsys.readouterr().out
    (there,) = source.glob("checkpoints/step-*04/model.safetensors")
    before, after = load_file(there), load_file(made.checkpoint / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in ("0.weight", "0.bias", "1.weight"))
    assert after["5.weight"].shape == (3, 16)
    with pytest.raises(ValueError, match=r"it has 4 classes, this run 3; to keep all but the head, set model"):
        train(tmp_path / "refused", "--init_from", str(source), classes=3)
    assert not (tmp_path / "refused").exists()


def filled(model, entries, **recipe):
    recipe = Recipe(model=ModelConfig("own", weights="here"), **recipe)
    return load(recipe, model, Weights("here", entries), ("a", "b", "c", "d"))


def test_one_error_lists_everything_that_does_not_fit():
    entries = tiny(4).state_dict() | {"0.weight": torch.zeros(8, 3, 3, 3), "9.bias": torch.zeros(1)}
    del entries["1.running_mean"]
    with pytest.raises(ValueError, match="do not fit") as caught:
        filled(tiny(4), entries)
    for part in (
        "it lacks 1.running_mean",
        "it has in addition 9.bias",
        "0.weight [8, 3, 3, 3] instead of [4, 3, 3, 3]",
    ):
        assert part in str(caught.value)


def test_weights_of_a_body_alone_leave_the_head_as_it_was():
    entries = {key: value + 1 for key, value in tiny(4).state_dict().items() if not key.startswith("5.")}
    model = tiny(4)
    head = model[5].weight.clone()
    begun = filled(model, entries)
    assert "it has no head for the 4 classes of this run" in begun.lines[0]
    assert torch.equal(model[5].weight, head)
    assert torch.equal(model[1].running_var, entries["1.running_var"])


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_file_of_a_state_dict_is_taken_and_a_torn_one_named(form, tmp_path):
    torch.manual_seed(1)
    entries = {f"module.{key}": value for key, value in tiny(4).state_dict().items()}
    path = tmp_path / f"weights.{form}"
    save_file(entries, path) if form == "safetensors" else torch.save({"state_dict": entries, "epoch": 3}, path)
    made = train(tmp_path / "run", "--optimizer.lr", "0", "--epochs", "1", "--model.weights", str(path))
    (saved,) = made.run_dir.glob("checkpoints/*/model.safetensors")
    assert torch.equal(load_file(saved)["5.weight"], entries["module.5.weight"])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"model.weights='{path}': {path}: torn, or "):
        train(tmp_path / "torn", "--model.weights", str(path))


def put_weights_of_torchvision(home, monkeypatch):
    """Write what would have been downloaded; returns the state dict."""
    from torchvision.models import get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(home))
    torch.manual_seed(5)
    entries = build_model(SMALL, 1000).state_dict()
    file = Path(home, "hub", "checkpoints", Path(get_model_weights(SMALL).DEFAULT.url).name)
    file.parent.mkdir(parents=True)
    torch.save(entries, file)
    return entries


def test_published_weights_fill_all_but_the_head_and_warn_of_other_pixels(tmp_path, monkeypatch):
    entries = put_weights_of_torchvision(tmp_path, monkeypatch)
    found = read_published(SMALL, "DEFAULT", 10, 3, {})
    model = build_model(SMALL, 10)
    recipe = Recipe(model=ModelConfig(SMALL, weights="DEFAULT"))
    begun = load(recipe, model, Weights(**vars(found)), tuple("0123456789"))
    weights = model.state_dict()
    assert all(torch.equal(weights[key], entries[key]) for key in entries if not key.startswith("classifier.1"))
    assert "it has 1,000 classes, this run 10: the head (classifier.1) is new, with 10 outputs" in begun.lines[0]
    (warning,) = begun.warnings
    assert "std [0.229, 0.224, 0.225]; this run has mean [0.3051, 0.3051, 0.3051]" in warning
    assert read_published(SMALL, "SqueezeNet1_1_Weights.IMAGENET1K_V1", 10, 3, {}).num_classes == 1000
    with pytest.raises(ValueError, match="give DEFAULT, IMAGENET1K_V1"):
        read_published(SMALL, "IMAGENET1K_V3", 10, 3, {})
    with pytest.raises(ValueError, match="no weights are published for this model"):
        read_published("resnet20", "DEFAULT", 10, 3, {})


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """What HF_HUB_OFFLINE=1 and HF_HUB_CACHE set when the Hub's package is first imported."""
    huggingface = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(huggingface, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_weights_of_timm_come_from_the_hub_s_cache(tmp_path):
    entries = build_model("timm/test_vit", 1000).state_dict()
    place = tmp_path / "models--timm--test_vit.r160_in1k"
    for folder in ("refs", f"snapshots/{'a' * 40}"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    save_file(entries, place / "snapshots" / ("a" * 40) / "model.safetensors")
    recipe = Recipe(model=ModelConfig("timm/test_vit", weights="DEFAULT"))
    model = recipe.model.build(10, 3, seed=0)
    head = model.head.weight.clone()
    found = read_published("timm/test_vit", "DEFAULT", 10, 3, {})
    begun = load(recipe, model, Weights(**vars(found)), tuple("0123456789"))
    assert "it has 1,000 classes, this run 10: the head (head) is new, with 10 outputs" in begun.lines[0]
    assert "trained on images with mean [0.5, 0.5, 0.5]" in begun.warnings[0]
    assert torch.equal(model.head.weight, head)
    weights = model.state_dict()
    assert all(torch.equal(weights[key], entries[key]) for key in entries if not key.startswith("head."))


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        read_published(SMALL, "DEFAULT", 10, 3, {})
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    place = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    assert f"Fetch {url} where there is a network, put it at {place}" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"Fetch https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.saf"
    ):
        read_published("timm/test_vit", "r160_in1k", 10, 3, {})


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet8", ("fc",)),
        (SMALL, ("classifier.1",)),
        ("timm/test_vit", ("head",)),
        ("mobilenet_v3_small", ("classifier.3",)),
    ],
)
def test_the_head_is_found(name, head):
    assert head_of(build_model(name, 7), 7) == head


@pytest.mark.parametrize("name", ["RAdaBeliefW", "nag", "adamw", "nadamw"])
def test_the_head_s_rate_is_a_multiple_of_the_body_s_at_every_step(name):
    recipe = Recipe(
        optimizer=OptimizerConfig(name=name, lr=0.02, head_lr_mult=5.0, no_decay=["bias"], weight_decay=0.1)
    )
    model = tiny(4)
    optimizer = build_optimizer(recipe, model, 8, num_classes=4)
    schedule = build_schedule(recipe, optimizer, 8)
    head = {id(parameter) for parameter in model[5].parameters()}
    for step in range(8):
        rates = {id(p) in head: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[True] == pytest.approx(5 * rates[False], rel=1e-12)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == ([0.1, 0.0, 0.1, 0.0] if step < 6 else [0.0] * 4)
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        schedule.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])


@pytest.mark.parametrize(
    ("optimizer", "model", "named"),
    [
        (OptimizerConfig(name="prodigy", head_lr_mult=2), tiny(4), "name='prodigy', which has one learning rate"),
        (OptimizerConfig(head_lr_mult=2), tiny(5), "no linear layer with as many outputs as classes"),
        (OptimizerConfig(head_lr_mult=2), nn.Linear(3, 4), "nothing but its head"),
    ],
)
def test_a_head_without_a_rate_of_its_own_is_refused(optimizer, model, named):
    with pytest.raises(ValueError, match=named):
        build_optimizer(Recipe(optimizer=optimizer), model, 8, num_classes=4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--init_from", "a", "--model.weights", "b"],
            "init_from='a' is not valid: it must be left out with model.weights='b'",
        ),
        (["--init_checkpoint", "best"], "init_checkpoint='best'"),
        (["--init_checkpoint", "first", "--init_from", "a"], "it must be last, best or a step"),
        (["--optimizer.head_lr_mult", "-1"], "optimizer.head_lr_mult"),
        (["--model.options", "{weights: DEFAULT}", "--model.name", "resnet8"], "use model.weights"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, named):
    with pytest.raises(ValueError, match=named):
        parse_recipe(words).model.build(10, 3, seed=0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("nowhere/run", "there is no such folder"),
        ("checkpoints", "it belongs to a run: name "),
        ("checkpoints/step-00000004/model.safetensors", "is a file; name a run's folder"),
    ],
)
def test_a_place_without_a_run_is_named(given, named, source, tmp_path):
    with pytest.raises(ValueError, match=named):
        train(tmp_path / "run", "--init_from", str(source / given))
