"""`data.decode: fast`: exact's boxes, bad images and order, and its pixels within a stated bound."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from robust_dist.data import fast_decode
from robust_dist.data.batches import Cut
from robust_dist.data.decode import MAX_PIXELS, CentralCrop, RandomCrop, decode_rgb
from robust_dist.data.errors import BadImageError
from robust_dist.data.fast_decode import fast_crop, plain_size, resized
from robust_dist.data.source import Upright
from robust_dist.data.stream_set import StreamSet
from robust_dist.train.data_config import DataConfig
from robust_dist.train.folder import RunFolder
from robust_dist.train.recipe import Recipe, conflicts, recipe_dict
from robust_dist.train.sources import with_decoder

CPU = torch.device("cpu")
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# For pictures of 260 x 194: at full size, and at a half, a quarter and an eighth.
FULL = [RandomCrop(160, SCALE, RATIO), CentralCrop(190, 194)]
SHRUNK = {2: RandomCrop(70, (0.8, 1.0), RATIO), 4: RandomCrop(36, (0.8, 1.0), RATIO), 8: CentralCrop(20, 23)}
KINDS = [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"mode": "L"}, {"format": "MPO"}]


@pytest.fixture(params=["simplejpeg", "Pillow"])
def package(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(fast_decode, "simplejpeg", None)
    elif fast_decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def photograph(seed=0, width=260, height=194):
    """Noise whose amplitudes fall with frequency like those of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    falling = 1 / np.maximum(frequency, 1 / width) ** 1.1
    planes = [np.fft.irfft2(falling * np.exp(2j * np.pi * rng.random(falling.shape)), (height, width)) for _ in "rgb"]
    return Image.fromarray(np.stack([128 + 45 * plane / plane.std() for plane in planes], 2).clip(0, 255).astype("u1"))


def ramp(width=260, height=194):
    """Levels that rise evenly, so that a shift of the box shows in them."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([250 * x / width, 250 * y / height, 125 * (x / width + y / height)], 2).astype("u1")
    )


def encoded(image, format="JPEG", mode="RGB", orientation=None, **options):
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.convert(mode).save(file, format, **options)
    return file.getvalue()


def apart(data, crop, key):
    """The largest and the mean difference from the exact pixels."""
    distance = (fast_crop(data, crop, key).short() - crop(decode_rgb(data), key).short()).abs().float()
    return distance.max().item(), distance.mean().item()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_jpeg_at_full_size_is_within_two_levels_of_the_exact_pixels(kind, package):
    data = encoded(photograph(), **kind)
    for crop in FULL:
        for key in range(0, 8):
            most, mean = apart(data, crop, key)
            assert most <= 2
            assert mean < 0.1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_jpeg_that_its_decoder_shrinks_is_within_the_stated_bound(kind, package):
    for shrink, crop in SHRUNK.items():
        for key in range(0, 4):
            data = encoded(photograph(key), **kind)
            assert shrink <= crop.window(260, 194, key).scale < 2 * shrink
            most, mean = apart(data, crop, key)
            assert most <= 24
            assert mean <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_the_exact_ways_box_upright_or_as_stored_at_any_shrinking(orientation, package):
    data = encoded(ramp(), orientation=orientation, quality=98, subsampling=0)
    for file in (data, Upright(data)):
        for crop in (*FULL, *SHRUNK.values()):
            most, mean = apart(file, crop, 11)
            # A shift by one pixel would be four levels or more at 1/4, and two of them.
            assert most <= 4, crop
            assert mean < 0.6, crop


@pytest.mark.parametrize("kind", [*KINDS, {"subsampling": 1}, {"restart_marker_rows": 1}], ids=str)
def test_pixels_are_those_of_the_whole_file_decoded(kind, package):
    data = encoded(photograph(), **kind)
    for shrink, crop in (*((1, crop) for crop in FULL), *SHRUNK.items()):
        whole = np.asarray(decode_rgb(data, shrink=shrink))
        for key in range(0, 6):
            window = crop.window(260, 194, key)
            assert torch.equal(fast_crop(data, crop, key), resized(whole, window, shrink, shrink))


def test_each_usual_jpeg_is_decoded_once_and_no_further_than_its_box(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    rows = []

    class Counting:
        def decode_jpeg(self, data, space, *, buffer, **options):
            rows.append(len(buffer))
            return simplejpeg.decode_jpeg(data, space, buffer=buffer, **options)

    monkeypatch.setattr(fast_decode, "simplejpeg", Counting())
    crop = RandomCrop(40, (0.1, 0.3), RATIO)
    for kind in ({}, {"subsampling": 0}, {"mode": "L"}, {"quality": 30}):
        data = encoded(photograph(), **kind)
        for key in range(0, 20):
            fast_crop(data, crop, key)
            (decoded,) = rows
            rows.clear()
            window = crop.window(260, 194, key)
            shrink = 2 if window.scale >= 2 else 1
            # Some rows of context, in whole blocks of 16.
            assert decoded <= -(-min(194, window.box[3] + 21) // shrink)


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_file_that_is_torn_below_the_box_is_what_it_is_for_exact(end, package):
    crop = RandomCrop(40, (0.1, 0.3), RATIO)
    for kind in ({}, {"subsampling": 0}, {"restart_marker_rows": 2}, {"progressive": True}):
        data = encoded(photograph(), **kind)
        for at in (len(data) - 2, len(data) - 40, len(data) * 9 // 10):
            for key in range(0, 8):
                exact = outcome(lambda d=data[:at] + end, k=key: crop(decode_rgb(d), k))
                fast = outcome(lambda d=data[:at] + end, k=key: fast_crop(d, crop, k))
                assert fast == exact if isinstance(exact, str) else isinstance(fast, torch.Tensor)


def test_both_packages_give_the_same_pixels():
    pytest.importorskip("simplejpeg")
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS:
            data = Upright(encoded(photograph(), orientation=6, **kind))
            crops = [*FULL, *SHRUNK.values()]
            found = [fast_crop(data, crop, 5) for crop in crops]
            patch.setattr(fast_decode, "simplejpeg", None)
            assert all(torch.equal(one, fast_crop(data, crop, 5)) for one, crop in zip(found, crops, strict=True))
            patch.undo()


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("GIF", "L")],
)
def test_all_other_files_have_the_exact_pixels_to_the_bit(format, mode, package):
    image = photograph(1)
    if mode == "I;16":
        image, mode = Image.fromarray((np.asarray(image)[..., 0].astype(np.uint16) << 8) + 77), None
    data = encoded(image, format, mode)
    for crop in (*FULL, *SHRUNK.values()):
        assert torch.equal(fast_crop(data, crop, 3), crop(decode_rgb(data), 3))


def outcome(decode):
    """Pixels, or the reason for having none."""
    try:
        return decode()
    except BadImageError as error:
        return str(error)


def damaged(data, rng):
    """A file that is truncated, or in which some bytes are changed, missing or new."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at : at + rng.randrange(1, 40)]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    else:
        # Most can go wrong in the header.
        for _ in range(rng.choice((1, 1, 20))):
            data[rng.randrange(700 if kind == 3 else len(data))] = rng.randrange(256)
    return bytes(data)


def test_damaged_files_are_bad_for_the_exact_ways_reasons_and_never_a_crash(package):
    rng, crop = random.Random(5), RandomCrop(20, SCALE, RATIO)
    small = [photograph(seed, 90, 70) for seed in range(2)]
    files = [encoded(one, **kind) for one in small for kind in ({}, {"progressive": True}, {"mode": "L"})]
    files.append(encoded(small[0], orientation=6))
    found = [0, 0]
    for _ in range(400):
        data = rng.choice((bytes, Upright))(damaged(rng.choice(files), rng))
        exact, fast = outcome(lambda d=data: crop(decode_rgb(d), 7)), outcome(lambda d=data: fast_crop(d, crop, 7))
        is_bad = isinstance(exact, str)
        assert isinstance(fast, str) == is_bad
        assert not is_bad or fast == exact
        found[is_bad] += 1
    assert min(found) > 50


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"no image", b"\xff\xd8\xff\xc0\x00\x11"])
def test_what_is_no_image_is_bad_for_the_same_reason(data, package):
    for kind in (bytes, Upright):
        reason = outcome(lambda k=kind: decode_rgb(k(data)))
        assert isinstance(reason, str)
        assert outcome(lambda k=kind: fast_crop(k(data), FULL[0], 1)) == reason


def test_too_many_pixels_are_refused_before_they_are_decoded(package):
    data = bytearray(encoded(ramp()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\x2e\xe0\x2e\xe0"
    with pytest.raises(BadImageError, match=f"exceed the {MAX_PIXELS:,} allowed"):
        fast_crop(bytes(data), FULL[0], 1)


def test_pillow_looks_at_every_header_that_is_not_a_usual_one():
    usual = encoded(ramp())
    assert plain_size(usual) == plain_size(Upright(usual)) == (260, 194)
    turned = encoded(ramp(), orientation=3)
    assert plain_size(turned) == (260, 194)
    unusual = [Upright(turned), encoded(ramp(), mode="CMYK"), encoded(ramp(), "PNG"), usual[:100], b"\xff\xd8" + usual]
    at = usual.index(b"\xff\xc0")
    # 12 bits per value, arithmetic coding, no height.
    unusual += [usual[: at + 4] + b"\x0c" + usual[at + 5 :], usual.replace(b"\xff\xc0", b"\xff\xc9")]
    unusual += [usual[: at + 5] + b"\x00\x00" + usual[at + 7 :]]
    assert [plain_size(data) for data in unusual] == [None] * len(unusual)


class Pictures:
    """Samples cycle through a JPEG, a PNG, a grey JPEG and a torn one."""

    name, classes = "pictures", ("a", "b")
    group_sizes = (40,)

    def __len__(self):
        return 40

    def read(self, index):
        picture = photograph(index, 70 + index, 60)
        kind = index % 4
        data = encoded(picture, "PNG" if kind == 1 else "JPEG", "L" if kind == 2 else "RGB")
        return data[:-300] if kind == 3 else data, index % 2

    def where(self, index):
        return f"sample {index}"


@pytest.fixture(scope="module")
def epochs():
    """Batches and bad images: exact; fast, in this process; fast with two workers; fast, from the third step on."""
    found = {}
    for name, fast, workers, start in [("exact", 0, 0, 0), ("fast", 1, 0, 0), ("workers", 1, 2, 0), ("rest", 1, 0, 2)]:
        loader = StreamSet(Pictures(), RandomCrop(20, SCALE, RATIO), CPU, workers=workers, fast=bool(fast)).loader(
            Cut(batch_size=8, seed=3, block=4)
        )
        batches = [batch for parts in loader.epoch(1, start) for batch in parts]
        found[name] = batches, loader.take_bad()
        loader.close()
    return found


def same(one, other, *names):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_set_has_the_exact_ways_order_labels_weights_and_bad_images(epochs):
    (exact, exact_bad), (fast, fast_bad) = epochs["exact"], epochs["fast"]
    assert fast_bad == exact_bad
    assert len(fast_bad) == 10
    for ours, theirs in zip(fast, exact, strict=True):
        assert same(ours, theirs, "indices", "keys", "labels", "weights")
        assert (ours.images.short() - theirs.images.short()).abs().float().mean() < 3


def test_workers_and_a_resumed_epoch_give_the_same_pixels(epochs):
    whole, bad = epochs["fast"]
    assert epochs["workers"][1] == bad
    for name, from_step in (("workers", 0), ("rest", 2)):
        for ours, theirs in zip(epochs[name][0], whole[from_step:], strict=True):
            assert same(ours, theirs, "images", "indices", "keys", "labels", "weights")


def test_evaluation_is_decoded_likewise():
    exact, fast = (
        next(StreamSet(Pictures(), CentralCrop(58, 60), CPU, workers=0, fast=one).eval_batches(0, 40, 40))
        for one in (False, True)
    )
    assert torch.equal(exact.good, fast.good)
    assert (exact.images.short() - fast.images.short()).abs().max() <= 2


def test_exact_is_the_default_and_cpu_another_word_for_it():
    assert DataConfig(name="imagefolder").decode == "exact"
    assert DataConfig(name="imagefolder", decode="cpu").decode == "exact"
    old = recipe_dict(Recipe(data=DataConfig(name="imagefolder")))
    old["data"]["decode"] = "cpu"
    assert conflicts(recipe_dict(Recipe(data=DataConfig(name="imagefolder"))), old) == []
    (line,) = conflicts(recipe_dict(Recipe(data=DataConfig(name="imagefolder", decode="fast"))), old)
    assert line == "data.decode: 'fast' here, 'exact' in the folder"


@pytest.mark.parametrize(("noted", "expected"), [(None, "fast"), ("fast", "fast"), ("exact", "exact"), ("", "exact")])
def test_auto_is_what_the_folder_notes_and_fast_in_a_new_one(noted, expected):
    assert with_decoder(DataConfig(name="imagefolder", decode="auto"), CPU, noted).decode == expected
    assert with_decoder(DataConfig(name="imagefolder"), CPU, noted).decode == "exact"


def test_auto_without_the_runs_gpu_warns_and_goes_on(capsys):
    assert with_decoder(DataConfig(name="imagefolder", decode="auto"), CPU, "cuda").decode == "fast"
    assert (
        "decoded by the GPU so far, which is not possible here (the images' device is cpu)" in capsys.readouterr().out
    )


def test_a_folder_tells_what_decoded_as_soon_as_something_was_trained(tmp_path):
    folder = RunFolder(tmp_path)
    folder.data_path.write_text(json.dumps({"decode": "fast"}))
    assert folder.decoder() is None
    (folder.checkpoints / "step-00000010").mkdir(parents=True)
    assert folder.decoder() == "fast"
    for text in ("{}", "no JSON", "[]", '{"decode": 3}'):
        folder.data_path.write_text(text)
        assert folder.decoder() == ""
