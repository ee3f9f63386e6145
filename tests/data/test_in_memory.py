"""Files of one size are decoded once and then behave like a set by name: the same batches, bits and places."""

import io
import json

import pytest
import torch
from PIL import Image

from robust_dist.data import HostSet, ImageSet, load_dataset
from robust_dist.data.errors import DataError
from robust_dist.data.folder import open_image_folder
from robust_dist.data.in_memory import AT_ONCE, load_into_memory
from robust_dist.train.data_config import DataConfig
from robust_dist.train.recipe import load_recipe
from robust_dist.train.sources import open_sets
from tests.data.tiny_sets import encode, metadata, picture
from tests.train.launching import kill_after, metrics, start, train
from tests.train.under_engines import ROOT

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 1, 0, 2, 2]


@pytest.fixture
def folder(tmp_path):
    """A class folder of 24x24 PNGs; returns its path."""
    for index, label in enumerate(LABELS):
        path = tmp_path / "set" / "abc"[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(index, label, 24, 24), "PNG"))
    return tmp_path / "set"


def loaded(folder, size=24, **words):
    return load_into_memory(open_image_folder(folder), size, **{"workers": 0, "max_bad_share": 0.0, **words})


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_lies_in_memory_as_it_is_stored_and_in_the_source_s_order(tmp_path, workers):
    count, folder = AT_ONCE + 90, tmp_path / "set"  # more than one request for the workers
    for index in range(count):
        path = folder / "abc"[index % 3] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(index % 100, index % 3, 8, 8), "PNG"))
    source, found = open_image_folder(folder), loaded(folder, 8, workers=workers)
    assert (found.images.shape, found.labels.tolist()) == ((count, 3, 8, 8), [source.read(i)[1] for i in range(count)])
    for index in range(count):
        image = Image.open(io.BytesIO(source.read(index)[0]))
        assert found.images[index].permute(1, 2, 0).flatten().tolist() == list(image.tobytes())
    assert (found.classes, found.fingerprint()) == (source.classes, source.fingerprint())


def test_an_image_of_another_size_is_an_error_that_says_what_would_be_right(folder):
    with pytest.raises(DataError, match=r"24x24 pixels, not 32x32.*set data.size=24.*or have workers crop them"):
        loaded(folder, 32)
    (folder / "c" / "9.png").write_bytes(encode(picture(9, 2, 30, 24), "PNG"))
    with pytest.raises(DataError, match=r"30x24 pixels, not 24x24.*have workers crop them"):
        loaded(folder)


def test_a_set_that_has_no_room_is_refused_before_it_is_decoded(folder):
    needed = 7 * (3 * 24 * 24 + 8)
    assert len(loaded(folder, free=needed)) == len(loaded(folder, free=None)) == 7
    with pytest.raises(DataError, match=rf"{needed:,} bytes are needed.* {needed - 1:,} are free.*data.keep_on=auto"):
        loaded(folder, free=needed - 1)


def test_unreadable_images_are_left_out_and_named_as_far_as_the_share_lets_them_pass(folder):
    (folder / "b" / "1.png").write_bytes(b"no image")
    found = loaded(folder, max_bad_share=0.2)
    assert found.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert [image.where for image in found.unreadable] == [str(folder / "b" / "1.png")]
    with pytest.raises(DataError, match=r"1 of 7 images could not be read, more than data.max_bad_share=0.1.*1.png"):
        loaded(folder, max_bad_share=0.1)


@pytest.mark.parametrize(("words", "kind"), [({"crop_scale": None}, ImageSet), ({"keep_on": "host"}, HostSet)])
def test_data_keep_on_says_where_it_lies_as_for_sets_by_name(folder, words, kind):
    data = DataConfig("imagefolder", str(folder.parent), train="set", eval="set", size=24, **words)
    assert {type(one) for one in open_sets(data, CPU, download=False)} == {kind}
    assert (data.in_memory, data.streamed) == (True, False)


def test_streaming_is_not_taken_up_by_a_run_that_began_in_memory(folder):
    kept = DataConfig("imagefolder", str(folder.parent), size=24, keep_on="host")
    assert kept.crop_scale is None
    assert DataConfig("imagefolder", str(folder.parent), size=24).crop_scale == (0.08, 1.0)


@pytest.fixture(scope="module")
def digits_as_parquet(tmp_path_factory):
    """The digits as train.parquet and test.parquet of PNGs, in the set's own order; returns the folder."""
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        one = load_dataset("digits", "data", train=split == "train")
        images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in one.images]
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(one.classes))})
        stored = [{"bytes": encode(image, "PNG"), "path": None} for image in images]
        table = Dataset.from_dict({"image": stored, "label": one.labels.tolist()}, features=features)
        pq.write_table(table.data.table.replace_schema_metadata(metadata(table)), folder / f"{split}.parquet")
    return folder


def as_hub(folder, run_dir):
    """Settings that make the files equivalent to the set by name."""
    words = ["--data.name", "hub", "--data.path", str(folder), "--data.eval", "test", "--data.size", "32"]
    words += ["--data.crop_scale", "null", "--data.mean", str([0.3051] * 3), "--data.std", str([0.3237] * 3)]
    return [*words, "--augment.flip", "false", "--run_dir", str(run_dir)]


def test_a_killed_run_on_files_in_memory_ends_with_the_bits_of_an_undisturbed_run_on_the_set_by_name(
    digits_as_parquet, tmp_path
):
    code, output = train(1, "--run_dir", str(tmp_path / "named"))
    assert code == 0, output
    words = [*as_hub(digits_as_parquet, tmp_path / "files"), "--checkpoint.every_steps", "2"]
    kill_after(start(1, *words), tmp_path / "files", 2)
    # Where the set lies may change when a run resumes.
    code, output = train(1, *words, "--data.keep_on", "host")
    assert code == 0, output
    assert "decoded 1,797 images" in output
    assert metrics(tmp_path / "files") == metrics(tmp_path / "named")
    record = json.loads((tmp_path / "files" / "data.json").read_text())
    assert (record["preprocessing"]["crop_padding"], record["train"]["images"]) == (4, 1438)


def test_the_recipe_of_cifar10_s_files_trains_as_the_one_by_name():
    ours, named = (load_recipe(f"{ROOT}/configs/recipes/{one}.yaml") for one in ("cifar10_hub", "cifar10_resnet56"))
    assert ours.data.in_memory
    assert all(getattr(ours, one) == getattr(named, one) for one in ("model", "optimizer", "schedule", "augment"))
