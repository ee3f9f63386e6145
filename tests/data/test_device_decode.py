"""JPEGs decoded on the device: the CPU's boxes, order and bad images; torchvision's CPU decoder stands in."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from robust_dist.data import device_decode
from robust_dist.data.batches import Cut
from robust_dist.data.decode import CentralCrop, RandomCrop, decode_rgb
from robust_dist.data.device_decode import cropped, decoder, is_for_devices
from robust_dist.data.source import Upright
from robust_dist.data.stream_set import StreamSet
from robust_dist.train.data_config import DataConfig

CPU = torch.device("cpu")
TRAIN, EVAL = RandomCrop(24, (0.08, 1.0), (3 / 4, 4 / 3)), CentralCrop(24, 28)
# Formats and modes that samples cycle through, and those that a device decodes.
KINDS = [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "RGB"), ("WEBP", "RGB")]


def picture(index, format="JPEG", mode="RGB", **options):
    """A smooth, encoded picture with its own size."""
    height, width = 40 + index % 7, 50 - index % 5
    y, x = np.mgrid[:height, :width]
    levels = np.stack([(3 * x + index * 11) % 256, 4 * y + x, 255 - 2 * x - y + index % 13], 2) % 256
    blurred = Image.fromarray(levels.astype(np.uint8)).resize((width, height)).convert(mode)
    file = io.BytesIO()
    blurred.save(file, format, **options)
    return file.getvalue()


class Pictures:
    """Sample i is of KINDS[i % 6]; those in `torn` are truncated, those in `spoiled` have only a header and an end."""

    def __init__(self, count, torn=(), spoiled=()):
        self.name, self.classes, self.group_sizes = "pictures", ("a", "b", "c"), (count,)
        self.torn, self.spoiled = torn, spoiled

    def __len__(self):
        return sum(self.group_sizes)

    def read(self, index):
        data = picture(index, *KINDS[index % 6])
        if index in self.torn:
            data = data[:-200]
        if index in self.spoiled:
            data = data[: data.index(b"\xff\xda")] + b"\xff\xd9"
        return data, index % 3

    def where(self, index):
        return f"sample {index}"


class Decoder:
    """torchvision's CPU decoder in place of the device's; counts its calls and files."""

    def __init__(self, refused=0):
        self.calls, self.files, self.refused = 0, 0, refused

    def __call__(self, files):
        self.calls += 1
        if len(files) > 1 and self.refused:
            raise RuntimeError("nvJPEG: one of them")
        if self.refused and len(files[0]) % self.refused == 0:
            raise RuntimeError("nvJPEG: this one")
        images = device_decode._on(CPU)(files)
        self.files += len(files)
        return images


@pytest.fixture(autouse=True)
def _torchvision():
    pytest.importorskip("torchvision", minversion="0.20")


def batches(source, decode, *, crop=TRAIN, workers=0, start=0, **cut):
    image_set = StreamSet(source, crop, CPU, workers=workers, decode=decode)
    loader = image_set.loader(Cut(batch_size=16, seed=3, block=4, **cut))
    try:
        found = [one for parts in loader.epoch(1, start) for one in parts]
        return found, loader.take_bad()
    finally:
        loader.close()


def apart(one, other):
    """The largest and the mean difference of levels."""
    distance = (one.short() - other.short()).abs().float()
    return distance.max().item(), distance.mean().item()


def assert_alike(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("indices", "keys", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert (ours.weights is None) == (theirs.weights is None)
        assert ours.weights is None or torch.equal(ours.weights, theirs.weights)
        most, mean = apart(ours.images, theirs.images)
        assert most <= 4, most
        assert mean <= 0.3, mean


@pytest.mark.parametrize("crop", [TRAIN, EVAL])
def test_a_crop_on_the_device_has_the_cpus_box_and_its_levels_but_for_two(crop):
    for index in range(20):
        image = decode_rgb(picture(index, "PNG"))
        ours = cropped(torch.from_numpy(np.array(image)).permute(2, 0, 1), crop, index * 7919)
        most, mean = apart(ours, crop(image, index * 7919))
        assert most <= 2
        assert mean < 0.3


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_batches_have_the_cpus_order_labels_and_pixels_within_four_levels(workers, accumulation):
    decode, source = Decoder(), Pictures(56)
    found, _ = batches(source, decode, workers=workers, accumulation=accumulation)
    expected, _ = batches(source, None, accumulation=accumulation)
    assert_alike(found, expected)
    assert decode.files == sum(index % 6 in (0, 1, 4) for index in range(56))
    assert decode.calls == len(found)  # one call a micro-batch


def test_what_is_no_jpeg_has_the_cpus_pixels_to_the_bit():
    found, _ = batches(Pictures(48), Decoder())
    expected, _ = batches(Pictures(48), None)
    for ours, theirs in zip(found, expected, strict=True):
        others = [slot for slot, index in enumerate(ours.indices.tolist()) if index % 6 in (2, 3, 5)]
        assert torch.equal(ours.images[others], theirs.images[others])


def test_a_resumed_epoch_goes_on_with_the_same_pixels():
    whole, _ = batches(Pictures(50), Decoder())
    rest, _ = batches(Pictures(50), Decoder(), start=2)
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.indices, theirs.indices)


@pytest.mark.parametrize("refused", [1, 2])
def test_what_the_device_refuses_is_decoded_by_the_cpu_in_its_place(refused):
    found, bad = batches(Pictures(50), Decoder(refused))
    expected, _ = batches(Pictures(50), None)
    assert_alike(found, expected)
    assert bad == []
    if refused == 1:
        assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(found, expected, strict=True))


def test_bad_images_are_the_cpus_and_their_places_are_filled_alike():
    source = Pictures(50, torn=(0, 6, 7, 8), spoiled=(12, 18))
    # 12 and 18 look complete to a worker; the device rejects all, and the CPU finds what is wrong.
    found, bad = batches(source, Decoder(refused=1))
    expected, theirs = batches(source, None)
    assert_alike(found, expected)
    assert bad == theirs
    assert len(bad) == 6


def test_evaluation_counts_and_orders_as_the_cpu_does():
    source = Pictures(30, torn=(4,))
    found, expected = (
        list(StreamSet(source, EVAL, CPU, workers=0, decode=decode).eval_batches(3, 29, 8))
        for decode in (Decoder(), None)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert (ours.good is None) == (theirs.good is None)
        assert apart(ours.images, theirs.images)[0] <= 4


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(0, exif=exif)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda: picture(0), True),
        (lambda: picture(1, mode="L"), True),
        (lambda: picture(2, progressive=True), True),
        (lambda: picture(0) + b"\0" * 20, True),
        (lambda: picture(0)[:-2], False),
        (lambda: picture(0, mode="CMYK"), False),
        (lambda: picture(0, "PNG"), False),
        (lambda: b"", False),
        (lambda: b"\xff\xd8nothing\xff\xd9", False),
        (turned, True),  # as it is stored
        (lambda: Upright(turned()), False),
        (lambda: Upright(picture(0)), True),
    ],
)
def test_whole_upright_jpegs_alone_are_for_devices(data, expected):
    assert is_for_devices(data()) == expected


def test_a_device_that_cannot_decode_is_an_error_where_it_is_demanded_and_the_cpus_turn_where_it_is_not():
    assert decoder("cpu", CPU) is None
    assert decoder("auto", CPU) is None
    with pytest.raises(ValueError, match=r"data\.decode='cuda' is not available: .* device is cpu; set data\.decode"):
        decoder("cuda", CPU)


def test_images_that_are_decoded_once_are_decoded_by_the_cpu():
    with pytest.raises(ValueError, match=r"data\.decode.*exact"):
        DataConfig(name="imagefolder", crop_scale=None, decode="cuda")
    assert DataConfig(name="imagefolder", decode="auto").decode == "auto"


@pytest.mark.gpu
def test_a_gpu_decodes_within_a_few_levels_of_the_cpu():
    device = torch.device("cuda")
    decode = device_decode.decoder("auto", device)
    if decode is None:
        pytest.skip("this torchvision has no nvJPEG")
    found, expected = (
        list(StreamSet(Pictures(48), EVAL, device, workers=0, decode=one).eval_batches(0, 48, 16))
        for one in (decode, None)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        # nvJPEG rounds its cosine transform and interpolates colour in its own way.
        most, mean = apart(ours.images.cpu(), theirs.images.cpu())
        assert most <= 32
        assert mean <= 2
