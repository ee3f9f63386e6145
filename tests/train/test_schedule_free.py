"""Schedule-free training: its average is evaluated and saved at an epoch's end, and it resumes bit for bit."""

import pytest
import schedulefree
import torch
from safetensors.torch import load_file
from torch import nn

from robust_dist.data import DeviceLoader, ImageSet
from robust_dist.train.evaluate import STATISTICS_STEPS, use_averaged_weights
from tests.train.launching import finish, kill_after, metrics, start

WORDS = ["--schedule.name", "constant", "--epochs", "2", "--batch_size", "64", "--checkpoint.every_steps", "8"]
PACKAGE = ["--optimizer.name", "schedulefree_adamw", "--schedule.warmup_steps", "5", "--optimizer.lr", "0.01"]
AUTO = ["--optimizer.clip_norm", "1", "--label_smoothing", "0.1", "--accumulation", "2", "--optimizer.lr", "auto"]
# Without augmentation a few steps learn something.
WORDS += ["--augment.trivial", "false", "--augment.cutmix", "false"]


def last_weights(run_dir):
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


@pytest.mark.parametrize(("ranks", "words"), [(1, PACKAGE), (2, AUTO)], ids=["package", "auto"])
def test_a_schedule_free_run_that_is_killed_goes_on_bit_for_bit(ranks, words, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*WORDS, *words]
    code, output = finish(start(ranks, *words, "--run_dir", str(whole)))
    assert code == 0, output
    process = start(ranks, *words, "--run_dir", str(killed))
    kill_after(process, killed, 31)  # in the second epoch, whose start undoes what the first one's end did
    code, output = finish(start(ranks, *words, "--run_dir", str(killed)))
    assert code == 0, output
    assert "resuming" in output
    assert metrics(killed) == metrics(whole)
    ours, theirs = last_weights(killed), last_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(whole)[-1]["eval_accuracy"] > 0.5
    rates = [row["lr"] for row in metrics(whole)]
    assert rates == [0.01, 0.01] if words[-1] == "0.01" else 0 < rates[1] < rates[0]


@pytest.fixture
def parts():
    """A model with batch normalisation, ten schedule-free steps, and the loader of its images."""
    torch.manual_seed(0)
    images = torch.randint(256, (64, 3, 2, 2), dtype=torch.uint8)
    loader = DeviceLoader(ImageSet(images, torch.arange(64) % 2, ("a", "b"), "noise"), batch_size=16, seed=0, block=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    for _ in range(10):
        for (batch,) in loader.epoch(0):
            nn.functional.cross_entropy(model(prepare(batch)), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return optimizer, model, loader


def prepare(batch):
    return batch.images.float() / 255


def test_the_average_is_evaluated_with_statistics_of_its_own_and_training_goes_on_from_its_own_weights(parts):
    optimizer, model, loader = parts
    trained, state = model[1].weight.clone(), optimizer.state[model[1].weight]
    use_averaged_weights(optimizer, model, loader, 0, prepare)
    # y = (1 - b1) z + b1 x, hence x = (y - (1 - b1) z) / b1
    average = (trained - 0.1 * state["z"]) / 0.9
    assert torch.allclose(model[1].weight, average, atol=1e-6)
    assert not torch.allclose(model[1].weight, trained, atol=1e-3)
    inputs = torch.cat([model[:2](prepare(batch)) for (batch,) in loader.epoch(0)])
    assert torch.allclose(model[2].running_mean, inputs.mean(0), atol=0.02)
    optimizer.train()
    assert torch.allclose(model[1].weight, trained, atol=1e-6)


def test_other_optimizers_are_left_alone_and_cost_nothing(parts):
    _, model, loader = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_averaged_weights(torch.optim.SGD(model.parameters(), lr=0.1), model, loader, 0, prepare)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert STATISTICS_STEPS >= 50  # 0.9 ** 50 = 0.005 of the former statistics is left
