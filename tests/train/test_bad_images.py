"""Bad images cost no epoch: evaluation's are checked before the first step, and a failing run saves before it ends."""

import json

import pytest
from accelerate.state import AcceleratorState

from robust_dist.train.bad_images import TooManyBadImagesError, unreadable
from robust_dist.train.main import train
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrackingConfig,
)
from tests.data.coloured import Coloured
from tests.data.tiny_sets import encoded, write_image_folder
from tests.train.launching import newest_step

# Two steps per epoch.
LABELS = [0, 1] * 8
GOOD = encoded(0, 0)
# Intact only in its header.
CUT_OFF = GOOD[:-100]


@pytest.fixture
def images(tmp_path):
    for part in ("train", "val"):
        write_image_folder(tmp_path / part, LABELS)
    return tmp_path


def run(images, folder, **changes):
    """The rows of three epochs, of which the second and third are saved, in this process."""
    AcceleratorState._reset_state(True)
    data = DataConfig("imagefolder", str(images), size=16, eval_batch_size=8, workers=0, block=2, max_bad_share=0.05)
    settings = {
        "data": data,
        "model": ModelConfig("resnet8", {"stem_stride": 2}),
        "optimizer": OptimizerConfig(lr=0.05),
        "checkpoint": CheckpointConfig(every_epochs=2),
        "tracking": TrackingConfig(trackers=[], progress=False),
        "epochs": 3,
        "batch_size": 8,
        "run_dir": str(folder),
    }
    return list(map(without_measured, train(Recipe(**settings | changes))))


def spoil(images, part, *, header):
    """One image of sixteen, whose fault does not show in its header."""
    path = images / part / "ant" / "00000.jpg"
    path.write_bytes(b"" if header else CUT_OFF)
    return path


def named(folder):
    return [line.partition("\t")[0] for line in (folder / "bad_images.txt").read_text().splitlines()]


def test_what_the_headers_tell_is_an_error_before_the_first_step_and_the_folder_is_taken_up(images, tmp_path, capsys):
    path, folder = spoil(images, "val", header=True), tmp_path / "run"
    with pytest.raises(
        TooManyBadImagesError, match=r"1 of 16 images could not be read, .*Replace them, or raise data.max_bad_share"
    ):
        run(images, folder)
    assert newest_step(folder) == 0
    assert named(folder) == [str(path)]
    path.write_bytes(GOOD)
    assert [row["eval_bad_images"] for row in run(images, folder)] == [0, 0, 0]
    assert "at step 0 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["val", "train"])
def test_a_refusal_after_an_epoch_saves_it_and_the_mended_run_is_an_undisturbed_one(images, tmp_path, part):
    path, folder = spoil(images, part, header=False), tmp_path / "run"
    with pytest.raises(TooManyBadImagesError, match=r"more than data\.max_bad_share=0\.05"):
        run(images, folder, **({"batch_size": 16} if part == "train" else {}))
    assert newest_step(folder) == (2 if part == "val" else 1)
    assert (folder / "metrics.jsonl").read_text() == ""
    assert named(folder) == [str(path)]
    if part == "val":
        # Nothing was replaced: the same error, and no further epoch is trained.
        with pytest.raises(TooManyBadImagesError):
            run(images, folder)
        assert newest_step(folder) == 2
    path.write_bytes(GOOD)
    rows = run(images, folder, **({"batch_size": 16} if part == "train" else {}))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["bad_images"] for row in rows] == [0 if part == "val" else 1, 0, 0]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    if part == "val":
        whole = run(images, tmp_path / "whole")
        assert rows == whole
        assert list(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])) == list(
            json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
        )


def test_a_refusal_in_mid_epoch_saves_the_step_and_is_not_repeated_over_the_same_images(images, tmp_path):
    for path in (images / "train").rglob("*.jpg"):
        path.write_bytes(CUT_OFF if path.stem in ("00000", "00001", "00004", "00005") else GOOD)
    folder = tmp_path / "run"
    with pytest.raises(TooManyBadImagesError):
        run(images, folder, batch_size=4)
    stopped = newest_step(folder)
    assert 0 < stopped < 4
    for path in (images / "train").rglob("*.jpg"):
        path.write_bytes(GOOD)
    rows = run(images, folder, batch_size=4)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert 1 <= rows[0]["bad_images"] <= 4
    assert rows[1]["bad_images"] == 0


def test_the_look_takes_the_images_it_is_given_and_ends_in_time():
    source = Coloured(40, bad=[3, 30], gone=[5])
    assert sorted(bad.where for bad in unreadable(source, 0, 40)) == ["sample 3", "sample 30", "sample 5"]
    assert [bad.where for bad in unreadable(source, 6, 40)] == ["sample 30"]
    assert unreadable(source, 0, 40, seconds=-1) == []
