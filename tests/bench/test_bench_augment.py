"""The benchmark times every contender and finds out by itself what each one does."""

import pytest
import torch

pytest.importorskip("torchvision")

from robust_dist.augment import CutMix, TrivialAugment
from robust_dist.bench import augment, augment_peers
from robust_dist.bench.augment import (
    TASKS,
    bench_augment,
    fingerprints,
    look_at_mixing,
    look_at_operations,
    picture,
    report,
    run,
    shifted,
    torchvision_outcomes,
)
from robust_dist.bench.augment_peers import (
    CLASSES,
    COPY,
    LOOP,
    ONE_BOX,
    PIL_LOOP,
    Contender,
    Stages,
    mix_makers,
    pipeline_makers,
    trivial_makers,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
SIDE = 16


@pytest.fixture(scope="module")
def outcomes():
    return torchvision_outcomes(picture(SIDE).unsqueeze(0))


def looked(call, outcomes):
    return look_at_operations(lambda images, labels: (call(images), labels), picture(SIDE), outcomes)


def test_fingerprints_tell_every_image_from_every_other():
    images = torch.randint(0, 2, (1000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(set(fingerprints(images))) == len({image.numpy().tobytes() for image in images})
    changed = images[0].clone()
    changed[2, 3, 3] ^= 1
    assert fingerprints(images[:1]) != fingerprints(changed[None])


def test_every_one_of_torchvisions_outcomes_is_made(outcomes):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    transform, image = v2.TrivialAugmentWide(), picture(SIDE)
    drawn = {fingerprints(transform(image)[None])[0] for _ in range(400)}
    assert drawn <= outcomes
    # 14 operations, of which 5 have 31 bins and signs twice over, without those that change nothing
    assert 400 < len(outcomes) < 868


def test_ours_is_found_to_be_per_sample_and_equal_to_torchvision(outcomes):
    look = looked(TrivialAugment(), outcomes)
    assert (look.draws, look.equals) == ({"operation"}, 1.0)


def test_one_operation_per_batch_is_found_out(outcomes):
    call = trivial_makers(False)["torchvision, once per batch"](picture(SIDE)[None]).call
    look = look_at_operations(call, picture(SIDE), outcomes)
    assert (look.draws, look.equals) == (set(), 1.0)


def test_a_peer_with_other_pixels_is_found_out(outcomes):
    look = looked(lambda x: TrivialAugment()(x) ^ 1, outcomes)
    assert look.draws == {"operation"}
    assert look.equals < 0.2

    def rarely_wrong(images):
        out = TrivialAugment()(images)
        out[0, 0, 0, 0] ^= 1
        return out

    assert looked(rarely_wrong, outcomes).equals < 1


def test_boxes_per_sample_and_exact_targets_are_found_out():
    names = ('ours, torch, "elem"', 'ours, torch, "batch"', ONE_BOX)
    looks = {name: look_at_mixing(mix_makers(False)[name](picture(32)[None]).call, 32, CPU) for name in names}
    assert (looks['ours, torch, "elem"'].draws, looks['ours, torch, "elem"'].exact) == ({"box"}, 1.0)
    assert (looks['ours, torch, "batch"'].draws, looks['ours, torch, "batch"'].exact) == (set(), 1.0)
    assert (looks[ONE_BOX].draws, looks[ONE_BOX].exact) == (set(), 1.0)
    mix = CutMix(CLASSES)

    def inverted(images, labels):
        mixed, targets = mix(images, labels)
        return mixed, (1 - targets) * (targets > 0)

    assert look_at_mixing(inverted, 32, CPU).exact < 1


def test_every_crop_and_mirror_image_of_a_picture_is_made():
    image = picture(SIDE)
    found = shifted(image)
    assert found.shape == (9 * 9 * 2, 3, SIDE, SIDE)
    assert len(set(fingerprints(found))) == len(found)
    assert fingerprints(image[None])[0] in fingerprints(found)


@pytest.mark.parametrize(("name", "draws"), [("ours, torch", {"operation", "box"}), (LOOP, {"operation"})])
def test_a_pipeline_is_looked_at_part_by_part(name, draws):
    look = augment.pipeline_task(CPU, False).look(name)
    assert (look.draws, look.equals, look.exact) == (draws, 1.0, 1.0)


def test_a_pipeline_that_crops_elsewhere_is_found_out():
    outcomes = torchvision_outcomes(shifted(picture(SIDE))[:40])
    make = pipeline_makers(SIDE, torch.float32, False, Stages(cutmix=False))["ours, torch"]
    assert look_at_operations(make(picture(SIDE)[None]).call, picture(SIDE), outcomes).equals < 0.9


def _raise(images, labels):
    raise RuntimeError("no such operator")


@pytest.fixture(scope="module")
def small():
    """All tasks on tiny batches, with a contender that fails."""
    broken = {"broken": lambda images: Contender(_raise), "absent": lambda images: __import__("no_such_package")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "trivial_makers", lambda compiled: {**trivial_makers(compiled), **broken})
        patch.setattr(augment, "_CALLS", 1)
        return run(batch_32=4, batch_224=0, rounds=1, threads=1, device="cpu")


def test_the_tables_have_a_row_for_every_contender_that_works(small):
    lines = report(small).splitlines()
    assert [line for line in lines if line.startswith("###")] == [f"### {name}, 4 images of 32x32" for name in TASKS]
    for makers in (trivial_makers(False), mix_makers(False), pipeline_makers(32, torch.float32, False)):
        for name in makers:
            assert any(line.startswith((f"| {name} |", "- left out: ")) and name in line for line in lines), name
    heads = [line for line in lines if line.startswith("| contender |")]
    assert len(heads) == 3
    assert len({len(line.split("|")) for line in lines if line.startswith("|")}) == 1


def test_a_contender_that_fails_or_is_absent_becomes_a_line(small):
    assert small.left_out["TrivialAugment, broken"] == "RuntimeError: no such operator"
    assert small.left_out["TrivialAugment, absent"] == "no_such_package is not installed"
    assert "broken" not in [row.name for row in small.rows]


def test_ratios_and_counts_are_what_they_say(small):
    rows = {(row.task, row.name): row for row in small.rows}
    for task, yardstick in zip(TASKS, (LOOP, ONE_BOX, LOOP), strict=True):
        assert rows[task, yardstick].times == rows[task, COPY].to_copy == 1.0
        assert rows[task, COPY].over_floor == 1.0
        assert rows[task, COPY].counts.operations == 1
        assert rows[task, yardstick].counts.waits > 0
    # PIL's work is not seen.
    assert rows["TrivialAugment", PIL_LOOP].over_floor is None
    assert rows["TrivialAugment", "ours, torch"].over_floor > 1


def test_with_a_choice_of_backends_each_is_a_contender(monkeypatch):
    class Choosing(torch.nn.Module):
        def __init__(self, *, backend="auto"):
            super().__init__()
            if backend == "triton":
                raise RuntimeError('backend="triton" cannot be used: no GPU')
            self.backend = backend

        def forward(self, images):
            return images ^ (self.backend == "native")

    monkeypatch.setattr(augment_peers, "TrivialAugment", Choosing)
    makers, image = trivial_makers(False), picture(SIDE)[None]
    made = {name: makers[f"ours, {name}"](image).call(image, None)[0] for name in ("torch", "native")}
    assert made["torch"].equal(image)
    assert made["native"].equal(image ^ 1)
    with pytest.raises(RuntimeError, match="no GPU"):
        makers["ours, triton"](image)


def test_the_table_and_a_picture_are_written(monkeypatch, small, tmp_path):
    monkeypatch.setattr(augment, "run", lambda **settings: small)
    text = bench_augment(rounds=1, device="cpu", out=tmp_path)
    assert (tmp_path / "augment.md").read_text() == text + "\n"
    assert (tmp_path / "augment.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", [{"batch_32": -1}, {"batch_224": -1}, {"rounds": 0}, {"threads": 0}])
def test_wrong_numbers_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* is below"):
        bench_augment(**settings)
