"""Unusual images become correct RGB, bad ones an error, and the crops are torchvision's."""

import contextlib
import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from robust_dist.augment import sample_keys
from robust_dist.data import decode
from robust_dist.data.decode import (
    crop_box,
    decode_rgb,
    is_turned,
    random_resized_crop,
    resize_center_crop,
    to_tensor,
)
from robust_dist.data.errors import BadImageError
from robust_dist.data.source import Upright
from tests.data.tiny_sets import bad_images, encode, encoded, odd_images, picture, turned_image

transforms = pytest.importorskip("torchvision.transforms")
functional = transforms.functional
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZES = [(500, 375), (37, 200), (301, 40), (224, 224), (3, 3), (1, 90)]


def drawn(row, low, high):
    return float(low) + next(row) * (float(high) - float(low))


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_become_right_rgb(name):
    data, right, tolerance = odd_images()[name]
    image = decode_rgb(data)
    assert image.mode == "RGB"
    assert image.size == right.size
    assert np.abs(pixels(image) - pixels(right)).max() <= tolerance


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_upright_bytes_as_pillow_does_and_no_others(orientation, format):
    data = turned_image(orientation, format)
    stored = Image.open(io.BytesIO(data))
    assert np.array_equal(decode_rgb(Upright(data)), ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(decode_rgb(data), stored.convert("RGB"))
    assert is_turned(data) == (2 <= orientation <= 8)


def test_an_exif_block_that_is_torn_turns_nothing():
    data = encode(picture(3, 1), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(decode_rgb(Upright(data)), decode_rgb(data))
    assert not is_turned(data)
    assert not is_turned(b"no image")


def test_a_16_bit_png_is_read_as_well_in_32_bits_as_older_pillows_have_it():
    wide = Image.fromarray(np.array([[0, 255, 256, 65_535]], dtype=np.int32))
    wide.format = "PNG"
    assert np.asarray(decode._to_rgb(wide))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_an_error_with_a_reason(name):
    with pytest.raises(BadImageError, match=r"\w+ "):
        decode_rgb(bad_images()[name])


@pytest.mark.parametrize("format", [name for name in decode.FORMATS if name != "AVIF"])
def test_no_cut_off_file_gives_other_pixels_than_the_whole_one(format):
    whole = encoded(5, 2, format)
    right, accepted = decode_rgb(whole), []
    for length in {*range(1, len(whole), 13), *range(len(whole) - 20, len(whole))}:
        try:
            assert decode_rgb(whole[:length]) == right, length
            accepted.append(length)
        except BadImageError:
            pass
    assert len(accepted) <= 4


def test_a_cut_off_progressive_jpeg_is_an_error():
    whole = encode(picture(5, 2), progressive=True)
    for length in range(0, len(whole), 13):
        with pytest.raises(BadImageError):
            decode_rgb(whole[:length])


def test_a_changed_byte_of_png_data_is_found_by_its_checksum():
    data = encoded(1, 1, "PNG")
    for position in range(60, len(data) - 12, 97):
        with pytest.raises(BadImageError):
            decode_rgb(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


def test_leave_to_fill_up_images_is_not_taken_and_is_given_back(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImageError):
        decode_rgb(bad_images()["truncated.jpg"])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_no_warning_leaves_the_decoder_and_none_is_muted_after_it():
    images = [data for data, *_ in odd_images().values()] + [encode(Image.new("1", (9_500, 9_500)), "PNG")]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        threads = [threading.Thread(target=_decode_all, args=(images,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert [str(warning.message) for warning in seen] == []


def _decode_all(images):
    for data in images:
        with contextlib.suppress(BadImageError):
            decode_rgb(data)


def test_a_format_that_would_run_another_program_is_not_opened():
    postscript = encode(picture(0, 0), "EPS")
    with pytest.raises(BadImageError, match="not an image"):
        decode_rgb(postscript)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [RATIO, (2.0, 3.0)])
def test_the_random_crop_is_torchvisions_for_the_same_draws(monkeypatch, size, ratio):
    image = picture(0, 0, *size)
    for key in sample_keys(1, 2, range(60)).tolist():
        rows = decode.uniforms(key, decode.Stream.RESIZED_CROP)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda _, a, b, row=rows: torch.tensor(drawn(row, a, b)))
            patch.setattr(torch, "randint", lambda _, high, size, row=rows: torch.tensor(int(next(row) * high)))
            top, left, height, width = transforms.RandomResizedCrop.get_params(image, SCALE, ratio)
        assert crop_box(*size, key, scale=SCALE, ratio=ratio) == (left, top, left + width, top + height)
        theirs = functional.resized_crop(image, top, left, height, width, [32, 32], antialias=True)
        ours = random_resized_crop(image, 32, key, ratio=ratio)
        assert torch.equal(ours, functional.pil_to_tensor(theirs))


def test_the_crops_of_many_keys_cover_the_allowed_scales_and_ratios_evenly():
    boxes = [crop_box(500, 400, key, scale=SCALE, ratio=RATIO) for key in sample_keys(0, 0, range(4_000)).tolist()]
    left, top, right, bottom = torch.tensor(boxes).double().unbind(1)
    assert ((left >= 0) & (top >= 0) & (right <= 500) & (bottom <= 400)).all()
    small = (right - left) * (bottom - top) / 200_000 < 0.4
    aspect = ((right - left) / (bottom - top)).log()[small]
    assert abs(aspect.mean()) < 0.02
    assert aspect.std() == pytest.approx(2 * np.log(4 / 3) / 12**0.5, rel=0.05)
    assert abs(((left + right) / 2 - 250).mean()) < 6


def test_the_crop_shares_no_draw_with_the_devices_augmentations():
    keys = sample_keys(3, 1, range(3_000))
    boxes = torch.tensor([crop_box(500, 400, key, scale=SCALE, ratio=RATIO) for key in keys.tolist()]).double()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for stream in decode.Stream:
        drawn = torch.from_numpy(np.array([next(decode.uniforms(key, stream)) for key in keys.tolist()]))
        correlation = torch.corrcoef(torch.stack([drawn, areas]))[0, 1].abs()
        assert (correlation < 0.07) == (stream is not decode.Stream.RESIZED_CROP), stream


@pytest.mark.parametrize("size", [(500, 375), (37, 200), (301, 41), (40, 40), (33, 32)])
@pytest.mark.parametrize(("crop", "resize"), [(32, 32), (32, 37), (31, 40)])
def test_the_central_crop_is_torchvisions(size, crop, resize):
    image = picture(1, 1, *size)
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])(image)
    ours = resize_center_crop(image, crop, resize)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert torch.equal(ours, functional.pil_to_tensor(theirs))


def test_an_image_too_long_to_be_resized_is_bad_and_a_resize_below_the_crop_is_refused():
    with pytest.raises(BadImageError, match="too long and thin"):
        resize_center_crop(Image.new("RGB", (60_000, 2)), 224, 256)
    with pytest.raises(ValueError, match="resize must be at least size=32, got 31"):
        resize_center_crop(picture(0, 0), 32, 31)


def test_a_tensor_of_an_image_is_its_pixels_in_memory_of_its_own():
    image = picture(2, 2)
    tensor = to_tensor(image)
    assert torch.equal(tensor, functional.pil_to_tensor(image))
    tensor.zero_()
    assert pixels(image).max() > 0
