"""`data.cache: disk`: the same samples with and without cached images, with any number of writers, on any disk."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from robust_dist.data.batches import Cut
from robust_dist.data.decode import CentralCrop, RandomCrop, decode_rgb
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.folder import open_image_folder
from robust_dist.data.image_cache import CachedImages, ImageCache, Stored, cache_for
from robust_dist.data.stream_set import StreamSet
from robust_dist.train.data_config import DataConfig
from tests.data.test_fast_decode import encoded, photograph
from tests.forked import CONTEXT
from tests.small_disk import can_mount, small_disk

CPU = torch.device("cpu")
CROP, CENTRAL = RandomCrop(20, (0.25, 1.0), (3 / 4, 4 / 3)), CentralCrop(20, 24)
# Pixels that CROP needs, from images far larger and from smaller ones.
LARGE, SMALL = (160, 120), (50, 40)


@pytest.fixture
def images(tmp_path):
    """A folder of 4 large JPEGs, 3 small ones, a PNG and a torn JPEG."""
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
    for index in range(4):
        (tmp_path / "images/a" / f"{index}.jpg").write_bytes(encoded(photograph(index, *LARGE)))
    for index in range(3):
        (tmp_path / "images/b" / f"{index}.jpg").write_bytes(encoded(photograph(index, *SMALL)))
    (tmp_path / "images/b/3.png").write_bytes(encoded(photograph(9, *SMALL), "PNG"))
    (tmp_path / "images/b/4.jpg").write_bytes(encoded(photograph(8, *SMALL))[:-200])
    return open_image_folder(tmp_path / "images")


class Counted:
    """A source that counts reads."""

    def __init__(self, source):
        self.source, self.reads = source, 0

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def read(self, index):
        self.reads += 1
        return self.source.read(index)


def cached(source, folder, crop=CROP, *, fast=False, most_bytes=10**9):
    cache = cache_for(source, "f", crop, fast=fast, folder=folder, most_bytes=most_bytes)
    cache.begin()
    return CachedImages(source, crop, fast, cache)


def read(samples, key=7, count=8):
    return [samples.read(index, key + index) for index in range(count)]


def equal(one, other):
    return all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(one, other, strict=True))


def kept(folder):
    return sorted(path for path in folder.glob("images-*/??/*") if path.is_file())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("crop", [CROP, CENTRAL])
def test_a_sample_is_the_same_whatever_is_kept_and_is_read_once(images, tmp_path, fast, crop):
    source, folder = Counted(images), tmp_path / "cache"
    first = read(cached(source, folder, crop, fast=fast))
    assert source.reads == len(kept(folder)) == 8
    other_key = read(cached(source, folder, crop, fast=fast), key=99)
    assert equal(read(cached(source, folder, crop, fast=fast)), first)
    assert source.reads == 8
    for path in kept(folder)[::2]:
        path.unlink()
    assert equal(read(cached(source, folder, crop, fast=fast), key=99), other_key)
    assert source.reads == 12


def test_small_images_have_the_exact_pixels_and_large_ones_are_shrunk_to_what_the_smallest_crop_needs(images, tmp_path):
    samples = cached(images, tmp_path / "cache")
    for index, (image, label) in enumerate(read(samples)):
        data, expected = images.read(index)
        assert label == expected
        distance = (image.short() - CROP(decode_rgb(data), 7 + index).short()).abs().float()
        if index < 4:
            assert 0 < distance.max() <= 24
            assert distance.mean() <= 4
        else:
            assert distance.max() == 0
    sizes = sorted(path.stat().st_size for path in kept(tmp_path / "cache"))
    needed = CROP.pixels_needed(*LARGE)
    assert needed < 160 * 120 * 0.64
    assert abs(sizes[-1] / 3 - needed) < 200
    assert sizes[0] == 24 + 3 * 50 * 40


def test_a_source_that_cannot_tell_a_change_is_read_but_not_decoded_again(images, tmp_path):
    source = Counted(images)
    source.glance = None
    first = read(cached(source, tmp_path / "cache"))
    assert equal(read(cached(source, tmp_path / "cache")), first)
    assert source.reads == 16
    assert equal(read(cached(images, tmp_path / "other")), first)


def test_a_file_that_changed_is_decoded_anew(images, tmp_path):
    first = read(cached(images, tmp_path / "cache"))
    path = images.where(0)
    before = os.stat(path)
    data = encoded(photograph(31, *LARGE))
    with open(path, "r+b") as file:
        file.write(data.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = read(cached(images, tmp_path / "cache"))
    assert not torch.equal(again[0][0], first[0][0])
    assert equal(again[1:], first[1:])


def test_a_bad_image_is_bad_each_time_and_kept_never(images, tmp_path):
    samples = cached(images, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(BadImageError, match="truncated"):
            samples.read(8, 1)
    assert kept(tmp_path / "cache") == []
    os.unlink(images.where(8))
    with pytest.raises(BadImageError, match="No such file"):
        samples.read(8, 1)


def test_damaged_files_of_the_cache_are_as_good_as_none(images, tmp_path):
    folder = tmp_path / "cache"
    first = read(cached(images, folder))
    damage = [lambda d: b"", lambda d: d[:10], lambda d: d[:-1], lambda d: b"x" + d[1:], lambda d: d + b"x"]
    for path, change in zip(kept(folder), damage, strict=False):
        path.write_bytes(change(path.read_bytes()))
    assert equal(read(cached(images, folder)), first)
    assert equal(read(cached(images, folder)), first)
    assert all(path.stat().st_size > 1000 for path in kept(folder))


def test_the_bound_holds_and_the_samples_stay_the_same(images, tmp_path):
    first = read(cached(images, tmp_path / "all"))
    samples = cached(images, tmp_path / "some", most_bytes=20_000)
    assert equal(read(samples), first)
    assert equal(read(samples), first)
    sizes = [path.stat().st_size for path in kept(tmp_path / "some")]
    assert 0 < sum(sizes) == samples.cache.used() <= 20_000
    assert len(sizes) < 8


def test_other_sets_go_at_a_start_where_half_of_the_room_is_taken(images, tmp_path):
    read(cached(images, tmp_path, CROP))
    old = kept(tmp_path)
    cached(images, tmp_path, CENTRAL)
    assert kept(tmp_path) == old
    cached(images, tmp_path, CENTRAL, most_bytes=10_000)
    assert kept(tmp_path) == []


def _put_forever(folder):
    cache = ImageCache(folder, "images-x", 10**10)
    cache.begin()
    rows = np.full((700, 700, 3), 9, np.uint8)
    number = 0
    while True:
        cache.put(f"{number % 50:032x}", Stored((700, 700), 700, rows))
        number += 1


def test_a_writer_that_is_killed_leaves_no_half_image_and_no_lock(tmp_path):
    writers = [CONTEXT.Process(target=_put_forever, args=(tmp_path,), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    until = time.monotonic() + 60
    while len(kept(tmp_path)) < 20 and time.monotonic() < until:
        time.sleep(0.01)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    cache = ImageCache(tmp_path, "images-x", 10**10)
    found = [cache.get(f"{number:032x}", lambda size, shape: (0, shape[1])) for number in range(50)]
    whole = [one for one in found if one is not None]
    assert len(whole) >= 20
    assert all(one.rows.shape == (700, 700, 3) and (one.rows == 9).all() for one in whole)
    cache.put("f" * 32, whole[0])
    assert cache.get("f" * 32, lambda size, shape: (10, 20)).rows.shape == (10, 700, 3)


@pytest.mark.skipif(not can_mount(), reason="may not mount a file system")
def test_a_full_disk_costs_speed_alone(images, tmp_path):
    first = read(cached(images, tmp_path / "all"))
    with small_disk(tmp_path / "disk", "40k"):
        samples = cached(images, tmp_path / "disk" / "cache")
        assert equal(read(samples), first)
        assert equal(read(samples), first)
        assert len(kept(tmp_path / "disk" / "cache")) < 8


def test_a_folder_that_cannot_be_used_is_one_clear_error(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.* set "):
        cached(images, tmp_path / "file")


def test_batches_bad_images_and_a_resumed_epoch_are_the_same_with_a_cache_that_ranks_share(images, tmp_path):
    def epoch(cache, workers=0, start=0, rank=0, world_size=1):
        dataset = StreamSet(images, CROP, CPU, workers=workers, cache=cache)
        loader = dataset.loader(Cut(6, 3, rank, world_size, block=1))
        found = [batch for parts in loader.epoch(2, start) for batch in parts]
        bad = loader.take_bad()
        loader.close()
        return found, bad

    plain, bad = epoch(None)
    cache = cached(images, tmp_path / "cache").cache
    ranks = [epoch(cache, workers=1, rank=rank, world_size=2)[0] for rank in range(2)]
    warm, warm_bad = epoch(cache)
    rest, _ = epoch(cache, start=1)
    cold, _ = epoch(replace(cache, folder=tmp_path / "none"))
    assert bad == warm_bad
    assert len(bad) == 1
    for theirs, ours, new, parts in zip(plain, warm, cold, zip(*ranks, strict=False), strict=False):
        for name in ("indices", "keys", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(theirs, name))
        assert torch.equal(ours.images, new.images)
        if ours.weights is None:
            assert torch.equal(torch.cat([part.images for part in parts]), ours.images)
    for ours, theirs in zip(rest, warm[1:], strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_a_recipe_says_off_or_disk_and_what_does_not_go_with_it():
    assert DataConfig(name="imagefolder", cache=False).cache == "off"
    assert DataConfig(name="imagefolder", cache="disk").cache == "disk"
    for wrong, message in [
        ({"decode": "cuda"}, r"data\.decode='cuda'.*exact, fast or auto"),
        ({"crop_scale": None}, r"data\.cache='disk'.*off"),
        ({"cache_gib": 0}, r"data\.cache_gib=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataConfig(name="imagefolder", cache="disk", **wrong)
    with pytest.raises(ValueError, match=r"data\.cache"):
        DataConfig(name="digits", cache="disk")
