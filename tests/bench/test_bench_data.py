"""The benchmark of readers walks whole epochs of every contender and finds out by itself what each one gives."""

import time

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("datasets")
pytest.importorskip("webdataset")

from robust_dist.bench import data
from robust_dist.bench.data import bench_data, consume, wait_share
from robust_dist.bench.data_files import write_files
from robust_dist.data.decode import decode_rgb
from robust_dist.data.folder import open_image_folder
from robust_dist.data.hub import open_hub
from robust_dist.data.shards import open_webdataset

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), 12, shards=3)


def test_the_formats_hold_the_same_images_with_the_same_labels(files, tmp_path):
    sources = [
        open_image_folder(files.folder),
        open_hub(str(files.parquet), "train", streaming=True, spool_dir=tmp_path),
        open_webdataset(files.shards),
    ]
    found = [sorted(source.read(index) for index in range(len(source))) for source in sources]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == files.images == 12
    assert len({image for image, _ in found[0]}) == 12
    assert {decode_rgb(image).size for image, _ in found[0]} == {(500, 375)}
    assert 80_000 < files.mean_bytes < 150_000


def test_every_contender_gives_every_image_once_an_epoch_and_epochs_that_differ(files, tmp_path):
    contenders = data.ours(files, tmp_path, workers=0) | data.peers(files, tmp_path, workers=0)
    assert len(contenders) == 10
    assert {name: data._look(epoch) for name, epoch in contenders.items()} == dict.fromkeys(contenders, (12, True))


def test_equal_epochs_are_found_out():
    assert data._look(lambda: iter([BATCH, BATCH])) == (8, False)


@pytest.mark.parametrize("wrong", [BATCH.float(), BATCH[:, :1], BATCH[..., 1:]])
def test_a_batch_of_another_kind_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be uint8 \[B, 3, 224, 224\]"):
        consume(lambda: iter([BATCH, wrong]))


def test_a_slow_reader_makes_its_consumer_wait_for_a_larger_share():
    def reader(seconds):
        for _ in range(6):
            time.sleep(seconds)
            yield BATCH

    at_once, slow = (wait_share(lambda s=seconds: reader(s), 0.01) for seconds in (0, 0.05))
    assert 0 <= at_once < slow < 1


def test_the_table_names_every_contender_and_the_limit_and_gives_the_yardsticks_ratio_as_one(monkeypatch):
    monkeypatch.setattr(data, "peers", lambda *_: {data.YARDSTICK: lambda: iter([BATCH, BATCH])})
    text = bench_data(images=10, workers=0, rounds=1, step_ms=1)
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    rows = {line[1]: line for line in lines[2:]}
    assert len(rows) == 6 + 1 + 3
    assert rows[data.YARDSTICK][4] == "1.00"
    assert rows["Loader (ours), image folder"][7] == "10"
    assert rows[data.YARDSTICK][8] == "no"
    assert rows[data.EXACT][9] == "0.00, 0"
    assert float(rows[data.FAST][9].split(",")[1]) <= 2
    assert all(float(row[10]) >= 0 for row in rows.values())
    assert "data wait at 1 ms a batch" in lines[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"images": 0}, "images"),
        ({"images": 3, "workers": 4}, "images"),
        ({"workers": -1}, "workers"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_wrong_numbers_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=f"{name}=.* is below"):
        bench_data(**settings)
