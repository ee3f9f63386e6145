"""The preview shows what training does: the same samples, keys, stages and mixing ratios."""

from dataclasses import replace

import pytest
import torch

from robust_dist.augment import RobustAugment, TrivialAugment, tables
from robust_dist.augment.keys import permutation, sample_keys
from robust_dist.data import DeviceLoader, ImageSet
from robust_dist.data.batches import Cut
from robust_dist.data.decode import decode_rgb, to_tensor
from robust_dist.data.errors import DataError
from robust_dist.preview import columns, draw, mixture, operation
from tests.data.tiny_sets import encoded

pytest.importorskip("matplotlib")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
N, SIZE, BATCH = 40, 16, 16


@pytest.fixture(scope="module")
def pets():
    images = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(N) % 3, ("cat", "dog", "ship"), "pets")


def pipeline(**options):
    return RobustAugment(3, SIZE, MEAN, STD, **({"crop": 2} | options))


def shown(pets, augment, rows=BATCH, seed=3, epoch=2):
    return columns(pets, augment, rows=rows, seed=seed, epoch=epoch, batch_size=BATCH)


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_the_last_column_is_what_the_model_gets_in_training(pets, mode):
    augment = pipeline(cutmix_mode=mode)
    ((batch,), *_) = DeviceLoader(pets, batch_size=BATCH, seed=3).epoch(2)
    trained, targets = augment(batch.images, batch.labels, batch.keys)
    last = shown(pets, augment)[-1]
    torch.testing.assert_close(augment.normalize(last.images), trained)
    assert [targets_of(caption) for caption in last.captions] == [
        pytest.approx(row, abs=0.0051) for row in targets.tolist()
    ]


@pytest.mark.parametrize(("mode", "rows"), [("elem", 5), ("batch", 3)])
def test_a_streamed_set_s_preview_shows_the_first_training_batch_s_crops(mode, rows):
    from robust_dist.data.decode import RandomCrop
    from robust_dist.data.stream_set import StreamSet
    from tests.data.coloured import CLASSES, Coloured

    source = Coloured(9, 20, 11)
    streamed = StreamSet(source, RandomCrop(8, (0.1, 1), (1, 1)), torch.device("cpu"), workers=0, shuffle_window=15)
    augment = RobustAugment(len(CLASSES), 8, MEAN, STD, crop=None, cutmix_mode=mode, block=4)
    ((batch,), *_) = streamed.loader(Cut(BATCH, seed=3, block=4)).epoch(2)
    trained, _ = augment(batch.images, batch.labels, batch.keys)
    original, first, *_, last = columns(streamed, augment, rows=rows, seed=3, epoch=2, batch_size=BATCH)
    assert (original.title, first.title) == ("original", "random crop")
    for row, index in enumerate(batch.indices[:rows].tolist()):
        whole = to_tensor(decode_rgb(source.read(index)[0]))
        assert torch.equal(original.images[row], whole)
        left, top, right, bottom = map(int, original.boxes[row])
        cut = whole[None, :, top:bottom, left:right]
        assert (cut == cut[..., :1, :1]).all()
        assert torch.equal(first.images[row, :, 0, 0], cut[0, :, 0, 0])
        assert original.captions[row] == f"{whole.shape[2]} x {whole.shape[1]} px"
    assert torch.equal(first.images, batch.images[:rows])
    torch.testing.assert_close(augment.normalize(last.images), trained[:rows])


def targets_of(caption):
    """The soft label described by a caption such as "0.62 ship + 0.38 cat"."""
    shares = dict.fromkeys(("cat", "dog", "ship"), 0.0)
    for part in caption.split(" + "):
        share, name = part.split()
        shares[name] += float(share)
    return list(shares.values())


def test_the_first_column_is_the_epochs_first_samples_as_stored(pets):
    first = shown(pets, pipeline(), rows=5)[0]
    indices = permutation(3, 2, N)[:5]
    assert torch.equal(first.images, pets.images[indices])
    assert first.captions == [pets.classes[label] for label in pets.labels[indices]]


def test_the_operation_named_is_the_one_applied(pets):
    augment = pipeline(crop=None, flip=False, cutmix=False)
    stored, trivial = shown(pets, augment)
    plan = augment.trivial.plan(sample_keys(3, 2, permutation(3, 2, N)[:BATCH]))
    assert torch.equal(trivial.images, augment.trivial.apply(stored.images, plan))
    assert [caption.split()[0] for caption in trivial.captions] == [augment.trivial.OPS[op] for op in plan.op]


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({}, ["as stored", "crop and flip", "TrivialAugment", "CutMix"]),
        ({"crop": None}, ["as stored", "flip", "TrivialAugment", "CutMix"]),
        ({"flip": False}, ["as stored", "crop", "TrivialAugment", "CutMix"]),
        ({"crop": None, "flip": False}, ["as stored", "TrivialAugment", "CutMix"]),
        ({"trivial": False}, ["as stored", "crop and flip", "CutMix"]),
        ({"crop": None, "flip": False, "trivial": False, "cutmix": False}, ["as stored"]),
    ],
)
def test_a_stage_that_is_off_has_no_column(pets, options, titles):
    assert [column.title for column in shown(pets, pipeline(**options))] == titles


@pytest.mark.parametrize(
    ("name", "magnitude_bin", "negative", "caption"),
    [
        ("Identity", 7, False, "Identity"),
        ("ShearX", 10, True, "ShearX -0.33"),
        ("TranslateY", 30, False, "TranslateY +32 px"),
        ("Rotate", 9, True, "Rotate -40.5°"),
        ("Brightness", 30, False, "Brightness x 1.99"),
        ("Sharpness", 10, True, "Sharpness x 0.67"),
        ("Posterize", 30, False, "Posterize 2 bits"),
        ("Solarize", 0, False, "Solarize from 255"),
        ("Equalize", 3, True, "Equalize"),
    ],
)
def test_the_magnitude_stands_in_the_operations_own_unit(name, magnitude_bin, negative, caption):
    trivial = TrivialAugment()
    plan = trivial.plan(torch.zeros(1, dtype=torch.int64))
    plan.op.fill_(tables.OP[name])
    plan.magnitude_bin.fill_(magnitude_bin)
    plan.negative.fill_(negative)
    assert operation(trivial, plan, 0) == caption


@pytest.mark.parametrize(
    ("own", "partner", "lam", "text"),
    [
        ("ship", "cat", 0.62, "0.62 ship + 0.38 cat"),
        ("1", "8", 0.51, "0.51 '1' + 0.49 '8'"),
        ("cat", "cat", 0.5, "1.00 cat"),
        ("cat", "dog", 1.0, "1.00 cat"),
        ("cat", "dog", 0.0, "0.00 cat + 1.00 dog"),
    ],
)
def test_a_mixture_names_its_shares(own, partner, lam, text):
    assert mixture(own, partner, lam) == text


def test_a_png_is_written_into_a_new_folder_and_the_data_stay_as_they_are(pets, tmp_path):
    before = pets.images.clone()
    path = tmp_path / "new" / "preview.png"
    draw(columns(pets, pipeline(), rows=3), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert torch.equal(pets.images, before)


def test_the_same_call_draws_the_same_picture_and_another_epoch_another(pets, tmp_path):
    pictures = []
    for number, epoch in enumerate((0, 0, 1)):
        draw(columns(pets, pipeline(), rows=2, epoch=epoch), tmp_path / f"{number}.png")
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_grey_images_are_drawn(tmp_path):
    grey = ImageSet(torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4), torch.zeros(4).long(), ("a",), "grey")
    augment = RobustAugment(1, 4, (0.5,), (0.5,), crop=None, flip=True, trivial=False, cutmix=True)
    draw(columns(grey, augment, rows=2), tmp_path / "grey.png")
    assert (tmp_path / "grey.png").stat().st_size > 1000


@pytest.mark.parametrize("rows", [0, 41])
def test_rows_outside_the_batch_are_refused_before_anything_is_written(pets, tmp_path, rows):
    with pytest.raises(ValueError, match=rf"--rows {rows} must be from 1 to {N}, the samples"):
        columns(pets, pipeline(), rows=rows)
    assert list(tmp_path.iterdir()) == []


def test_the_crop_and_the_flip_are_told_as_they_happened(pets):
    stored, moved = shown(pets, pipeline(trivial=False, cutmix=False))
    for before, after, caption in zip(stored.images, moved.images, moved.captions, strict=True):
        right, down = (int(word) for word in caption.removeprefix("moved ").split(" px")[0].split(", "))
        unmirrored = after.flip(2) if caption.endswith(", mirrored") else after
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        top, left = 2 - down, 2 - right
        assert torch.equal(unmirrored, padded[:, top : top + SIZE, left : left + SIZE])
    assert 0 < sum("mirrored" in caption for caption in moved.captions) < BATCH


class Junk:
    """Images, some of which cannot be read."""

    name, classes, group_sizes = "junk", ("a\nb", "caf\udce9", "$x_$"), (12,)

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 12

    def read(self, index):
        return (b"junk" if index in self.bad else encoded(index, index % 3)), index % 3

    def where(self, index):
        return f"{index}\n.jpg"


def junk(bad):
    from robust_dist.data.decode import RandomCrop
    from robust_dist.data.stream_set import StreamSet

    return StreamSet(Junk(bad), RandomCrop(SIZE, (0.1, 1), (1, 1)), torch.device("cpu"), workers=0)


def test_stand_ins_are_marked_in_every_column_and_warned_of(tmp_path):
    indices = permutation(3, 0, 12)[:4].tolist()
    augment = pipeline(crop=None)
    with pytest.warns(
        UserWarning, match=rf"junk: 2 of the first \d+ images cannot be read: {indices[1]}\\n.jpg \(not an"
    ):
        stages = columns(junk({indices[1], indices[3]}), augment, rows=4, seed=3, epoch=0, batch_size=12)
    assert [column.stand_ins for column in stages] == [{1, 3}] * len(stages)
    draw(stages, tmp_path / "marked.png")
    draw([replace(column, stand_ins=frozenset()) for column in stages], tmp_path / "plain.png")
    assert (tmp_path / "marked.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_set_of_which_nothing_can_be_read_has_no_preview(tmp_path):
    with pytest.raises(DataError, match=r"junk: 12 of the first 12 images cannot be read: .*not an image"):
        columns(junk(set(range(12))), pipeline(crop=None, cutmix_mode="batch"), rows=2)
    assert list(tmp_path.iterdir()) == []


def test_classes_that_are_no_utf_8_have_line_feeds_or_formulas_are_drawn(tmp_path):
    draw(columns(junk(set()), pipeline(crop=None), rows=6), tmp_path / "names.png")
    assert (tmp_path / "names.png").stat().st_size > 1000
