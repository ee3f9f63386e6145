"""Every piece of code of the page runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import robust_dist.augment
from tests.augment.reference import pictures

BATCH = 128


def pieces():
    text = Path(robust_dist.augment.__file__).with_name("README.md").read_text()
    found = re.finditer(r"^## (.+?)$|^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    title = ""
    for match in found:
        title = match[1] or title
        if match[2]:
            yield title, match[2]


PIECES = list(pieces())


def hub_dataset(images, labels):
    datasets = pytest.importorskip("datasets")
    rows = {"image": list(images.permute(0, 2, 3, 1).numpy()), "label": labels.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(("title", "code"), PIECES, ids=[f"{i} {title}" for i, (title, _) in enumerate(PIECES)])
def test_a_piece_of_the_page_runs(title, code):
    if "torchvision" in code or " v2" in code:
        pytest.importorskip("torchvision")
    images, labels = pictures("noise", (BATCH, 3, 32, 32)), torch.arange(BATCH) % 10
    names = {
        "torch": torch,
        "MEAN": (0.5, 0.5, 0.5),
        "STD": (0.25, 0.25, 0.25),
        "seed": 0,
        "device": torch.device("cpu"),
        "dataset": TensorDataset(images, labels),
        "model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)),
        "images": images,
        "labels": labels,
        "indices": torch.arange(BATCH),
        "masks": images[:, 0].clone(),
        "boxes": torch.tensor([[[2.0, 3, 20, 30]]]).repeat(BATCH, 1, 1),
    }
    if "hub_dataset" in code:
        names["hub_dataset"] = hub_dataset(images, labels)
    exec(code, names)
    check = {"Segmentation masks": check_masks, "Bounding boxes": check_boxes}.get(title, check_batch)
    check(names)


def check_batch(names):
    if "targets" not in names:
        image = names["hub_dataset"][0]["image"]
        assert image.size == (32, 32)
        return
    assert names["images"].dtype == torch.float32
    assert names["images"].shape[1:] == (3, 32, 32)
    torch.testing.assert_close(names["targets"].sum(1), torch.ones(len(names["images"])))
    assert ((names["targets"] > 0).sum(1) == 2).float().mean() > 0.7


def check_masks(names):
    assert names["masks"].shape == (BATCH, 32, 32)
    assert names["augmented"].shape == (BATCH, 3, 32, 32)
    assert names["masks"].eq(255).float().mean() > 0.05


def check_boxes(names):
    assert names["boxes"].shape == (BATCH, 1, 4)
    assert 0.8 < names["keep"].float().mean() < 1


def test_the_page_has_a_piece_for_each_way_of_use():
    assert [title for title, _ in PIECES] == [
        "A plain loop",
        "Keyed draws",
        "A dataset in memory",
        "Accelerate",
        "In the loader's workers",
        "Hugging Face datasets",
        "Hugging Face datasets",
        "A torchvision Compose",
        "Segmentation masks",
        "Bounding boxes",
    ]
