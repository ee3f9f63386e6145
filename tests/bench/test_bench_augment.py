"""The benchmark times every contender and finds out by itself what each one does."""

import pytest
import torch

pytest.importorskip("torchvision")

from robust_dist.augment import TrivialAugment
from robust_dist.bench import augment
from robust_dist.bench.augment import bench_augment

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def picture():
    return augment._picture(1)


@pytest.fixture(scope="module")
def outcomes(picture):
    return augment.torchvision_outcomes(picture, draws=12_000)


def test_ours_is_found_to_be_per_sample_and_equal_to_torchvision(picture, outcomes):
    assert augment.look_at_trivial(TrivialAugment(), picture, outcomes) == (True, 1.0)


def test_one_operation_per_batch_is_found_out(picture, outcomes):
    contenders = augment.trivial_contenders(picture[None], compiled=False)
    assert augment.look_at_trivial(contenders["torchvision, once per batch"], picture, outcomes) == (False, 1.0)


def test_other_pixels_are_found_out(picture, outcomes):
    per_sample, agrees = augment.look_at_trivial(lambda x: TrivialAugment()(x) ^ 1, picture, outcomes)
    assert per_sample
    assert agrees < 0.2


def test_boxes_per_sample_and_exact_targets_are_found_out():
    contenders = augment.mix_contenders(compiled=False)
    looks = {name: augment.look_at_mix(mix) for name, mix in contenders.items()}
    assert looks['CutMix "elem" (ours)'] == (True, 1.0)
    assert looks['CutMix "batch" (ours)'] == (False, 1.0)
    assert looks[augment.ONE_BOX] == (False, 1.0)

    def inverted(images, labels):
        mixed, targets = contenders[augment.ONE_BOX](images, labels)
        return mixed, (1 - targets) * (targets > 0)

    assert augment.look_at_mix(inverted)[1] < 1


def test_the_tables_name_every_contender_and_give_the_yardsticks_ratio_as_one(monkeypatch):
    monkeypatch.setattr(augment, "torchvision_outcomes", lambda picture, draws=0: set())
    text = bench_augment(batch_32=8, batch_224=0, rounds=1)
    blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for name in [*augment.trivial_contenders(blank, False), *augment.mix_contenders(False)]:
        assert f"| {name} | 32x32 | 8 |" in text
    for yardstick in (augment.LOOP, augment.ONE_BOX):
        line = next(line for line in text.splitlines() if line.startswith(f"| {yardstick} |"))
        assert line.split("|")[6].strip() == "1.00"


@pytest.mark.parametrize("settings", [{"batch_32": 0}, {"batch_224": -1}, {"rounds": 0}])
def test_wrong_numbers_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least"):
        bench_augment(**settings)
