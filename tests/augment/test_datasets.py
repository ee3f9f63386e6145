"""Each sample keeps its index, through loaders, workers, ranks and other libraries' data sets."""

import copy
import pickle
from collections import UserDict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from robust_dist.augment import (
    Augmented,
    CutMix,
    Indexed,
    RandomCrop,
    RandomHorizontalFlip,
    RobustAugment,
    TrivialAugment,
    sample_keys,
)
from tests.augment.loader_ranks import SAMPLES, build, epoch_of_a_rank, samples
from tests.ranks import run_ranks

Pair = namedtuple("Pair", ["image", "label"])
STAGES = [RandomCrop(2), RandomHorizontalFlip(), TrivialAugment()]


def on_the_batch(images, seed, epoch):
    keys = sample_keys(seed, epoch, range(len(images)))
    for stage in STAGES:
        images = stage(images, keys)
    return images


class Rows:
    """Dicts, and a count of how often a whole batch was asked for."""

    def __init__(self):
        self.images, self.batches = samples()[0], 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return {"image": self.images[i], "label": i % 10}

    def __getitems__(self, indices):
        self.batches += 1
        return [self[i] for i in indices]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_gives_each_sample_with_its_index(shuffle):
    images, labels = samples()
    for batch, numbers, indices in DataLoader(Indexed(TensorDataset(images, labels)), 10, shuffle=shuffle):
        assert indices.dtype == torch.int64
        assert torch.equal(batch, images[indices])
        assert torch.equal(numbers, labels[indices])


def test_samples_of_dicts_and_single_values_are_named_too():
    rows = Rows()
    assert Indexed(rows, name="place")[3]["place"] == 3
    assert Indexed(range(5, 9))[1] == (6, 1)
    assert Indexed(rows)[-1]["index"] == SAMPLES - 1
    with pytest.raises(IndexError):
        Indexed(rows)[SAMPLES]


def test_a_data_set_that_fetches_batches_is_asked_for_batches():
    rows = Rows()
    batches = list(DataLoader(Indexed(rows), 16))
    assert rows.batches == 4
    assert torch.equal(torch.cat([b["index"] for b in batches]), torch.arange(SAMPLES))
    assert torch.equal(torch.cat([b["image"] for b in batches]), rows.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_live_on_give_the_batchs_pixels_in_every_epoch(workers):
    images, labels = samples()
    dataset = Augmented(Indexed(TensorDataset(images, labels)), STAGES, seed=3)
    loader = DataLoader(dataset, 16, num_workers=workers, persistent_workers=workers > 0)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([batch for batch, _, _ in loader]))
        assert torch.equal(epochs[-1], on_the_batch(images, 3, epoch))
    assert not torch.equal(epochs[0], epochs[1])


def test_an_augmented_data_set_takes_dicts_copies_and_pickles():
    dataset = Augmented(Rows(), STAGES, seed=3, image="image")
    dataset.set_epoch(2)
    expected = on_the_batch(samples()[0], 3, 2)
    for other in (dataset, copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert torch.equal(torch.stack([other[i]["image"] for i in range(SAMPLES)]), expected)
        assert other[-1]["label"] == (SAMPLES - 1) % 10
        assert other.epoch == 2


@pytest.mark.parametrize(
    ("dataset", "settings", "words"),
    [
        (iter([]), {}, "dataset must have a length"),
        (["ab"], {}, "samples must be tuples, or dicts with image=NAME, got str"),
        ([("a", 1)], {}, r"image=0 must be a uint8 tensor \[C, H, W\], got str"),
        ([{"picture": 1}], {"image": "image"}, "image='image' must be a uint8 tensor.*got NoneType"),
    ],
)
def test_what_is_no_set_of_tensors_is_refused_by_name(dataset, settings, words):
    with pytest.raises(TypeError, match=words):
        Augmented(dataset, STAGES, **settings)[0]


def test_stages_that_mix_samples_are_refused_by_name_when_they_are_given():
    torchvision = pytest.importorskip("torchvision.transforms.v2")
    mixing = [CutMix(10), RobustAugment(10, 32, (0.5,), (0.2,)), torchvision.MixUp(num_classes=10)]
    for stage, name in zip(mixing, ("CutMix", "RobustAugment", "MixUp"), strict=True):
        with pytest.raises(TypeError, match=f"{name} mixes samples, .* call it with the batch"):
            Augmented(Rows(), [*STAGES, stage])
    with pytest.raises(TypeError, match="stages must be callable as stage\\(images, keys\\), got int"):
        Augmented(Rows(), [3])
    with pytest.raises(TypeError, match=r"ColorJitter returned tuple"):
        Augmented(Rows(), [torchvision.ColorJitter()], image="image")[0]


def test_negative_indices_are_named_as_the_samples_they_are():
    rows = Rows()
    assert [sample["index"] for sample in Indexed(rows).__getitems__([-1, 3])] == [SAMPLES - 1, 3]
    assert [index for _, index in Indexed(range(9)).__getitems__([-9, torch.tensor(8)])] == [0, 8]


def test_an_index_of_the_samples_own_is_not_written_over():
    rows = [{"index": 77, "x": 1}]
    with pytest.raises(ValueError, match=r"samples have 'index' already: .* Indexed\(..., name=NAME\)"):
        Indexed(rows)[0]
    assert Indexed(rows, name="place")[0] == {"index": 77, "x": 1, "place": 0}


def test_mappings_and_named_tuples_are_right_or_refused_by_name():
    images = samples()[0]
    mapping, pair = UserDict(image=images[3], label=7), Pair(images[3], 7)
    ours = Indexed([mapping])[0]
    assert ours["label"] == 7
    assert ours["index"] == 0
    assert "index" not in mapping
    with pytest.raises(TypeError, match="samples must not be named tuples, got Pair"):
        Indexed([pair])[0]
    expected = on_the_batch(images[3:4], 0, 0)[0]
    assert torch.equal(Augmented([mapping], STAGES, image="image")[0]["image"], expected)
    for place in (0, -2, "image"):
        augmented = Augmented([pair], STAGES, image=place)[0]
        assert type(augmented) is Pair
        assert torch.equal(augmented.image, expected)
        assert augmented.label == 7
    with pytest.raises(TypeError, match="image=2 is not a position in samples that are tuples of 2"):
        Augmented([pair], STAGES, image=2)[0]


def test_accelerates_ranks_give_the_samples_pairs_and_targets_of_one_process():
    pytest.importorskip("accelerate")
    images, labels = samples()
    expected = build()(images, labels, sample_keys(5, 1, range(SAMPLES)))
    ranks = run_ranks(epoch_of_a_rank, 2, 16)
    indices = torch.cat([rank[0] for rank in ranks])
    assert torch.equal(indices.sort().values, torch.arange(SAMPLES))
    for ours, whole in zip(zip(*(rank[1:] for rank in ranks), strict=True), expected, strict=True):
        assert torch.equal(torch.cat(ours), whole[indices])


def test_accelerate_sets_the_epoch_of_an_augmented_data_set():
    pytest.importorskip("accelerate")
    data_loader = pytest.importorskip("accelerate.data_loader")
    dataset = Augmented(TensorDataset(*samples()), STAGES)
    data_loader.DataLoaderShard(dataset, batch_size=16).set_epoch(4)
    assert dataset.epoch == 4


def test_a_hub_data_set_gives_tensors_with_their_indices():
    datasets = pytest.importorskip("datasets")
    images, labels = samples()
    rows = {"image": list(images.permute(0, 2, 3, 1).numpy()), "label": labels.tolist()}
    hub = datasets.Dataset.from_dict(
        rows, datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    for batch in DataLoader(Indexed(hub.with_format("torch")), 16, shuffle=True):
        assert torch.equal(batch["image"], images[batch["index"]])
        assert torch.equal(batch["label"], labels[batch["index"]])
    one = Augmented(hub.with_format("torch"), STAGES, seed=3, image="image")[9]["image"]
    assert torch.equal(one, on_the_batch(images, 3, 0)[9])
