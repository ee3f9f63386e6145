"""A checkpoint is either complete or absent."""

import json
import os

import pytest

from robust_dist.checkpoint import CheckpointError, CheckpointStore, verify, write_atomically


def save(store, step, text="weights"):
    folder = store.begin(step)
    (folder / "sub").mkdir()
    (folder / "model.bin").write_text(text + str(step))
    (folder / "sub" / "shard.bin").write_text("s" * step)
    return store.commit(step, {"loss": 0.1})


def test_newest_is_none_in_an_empty_folder(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").newest() == (None, [])


def test_the_newest_whole_checkpoint_is_found_with_its_metadata(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (5, 12, 100):
        save(store, step)
    found, rejected = store.newest()
    assert (found.step, found.metadata, rejected) == (100, {"loss": 0.1}, [])


def test_only_the_newest_keep_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "no manifest", "format"])
def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    torn = save(store, 2).path
    file, manifest = torn / "model.bin", torn / "manifest.json"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flip":
        file.write_bytes(b"W" + file.read_bytes()[1:])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({"format": 99}))
    found, rejected = store.newest()
    assert found.step == 1
    assert len(rejected) == 1
    assert "step-00000002" in rejected[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        verify(torn)


def test_a_write_that_was_cut_off_leaves_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (store.begin(2) / "model.bin").write_text("half")
    assert store.newest()[0].step == 1
    assert save(store, 2).step == 2
    assert (store.newest()[0].path / "model.bin").read_text() == "weights2"


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, "old")
    save(store, 1, "new")
    assert (store.newest()[0].path / "model.bin").read_text() == "new1"


def test_write_atomically_replaces_the_whole_text(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("a" * 100, "b"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_later_checkpoint_does_not_push_out_the_one_just_written(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    (save(store, 9).path / "model.bin").unlink()
    save(store, 4)
    assert store.newest()[0].step == 4


def test_a_commit_cut_off_before_its_rename_is_finished_by_the_reader(tmp_path):
    store = CheckpointStore(tmp_path)
    whole = save(store, 3).path
    whole.rename(tmp_path / ".step-00000003.partial")
    assert store.newest()[0].step == 3


def test_a_refused_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    found, rejected = store.newest(lambda checkpoint: "of another run" if checkpoint.step == 2 else None)
    assert found.step == 1
    assert rejected == [f"{tmp_path / 'step-00000002'}: of another run"]


def scored(store, step, accuracy):
    store.begin(step)
    return store.commit(step, {"eval_accuracy": accuracy})


def names(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.iterdir())]


def test_the_best_stay_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=2)
    for step, accuracy in enumerate([0.5, 0.9, None, 0.7, 0.6, None, 0.9, 0.1], start=1):
        scored(store, step, accuracy)
    # The first two of those with 0.9 and 0.7, and the newest.
    assert names(tmp_path) == [2, 7, 8]
    assert store.newest()[0].step == 8


def test_the_newest_is_never_let_go_of_for_a_better_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=1)
    for step, accuracy in [(1, 0.9), (2, 0.1), (3, 0.05)]:
        assert scored(store, step, accuracy).path.exists()
        assert step in names(tmp_path)
    assert names(tmp_path) == [1, 3]


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_newest_is_the_furthest_whatever_clocks_say(tmp_path, hours):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        path = save(store, step).path
        when = path.stat().st_mtime - hours * 3600 * step
        for file in [path, *path.iterdir()]:
            os.utime(file, (when, when))
    assert store.newest()[0].step == 2
    save(store, 3)
    assert names(tmp_path) == [2, 3]


def test_a_file_that_shrank_before_the_commit_is_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.begin(1) / "model.bin").write_text("ab")
    with pytest.raises(CheckpointError, match=r"model\.bin: missing or short"):
        store.commit(1, {}, files={"model.bin": [3, 0]})
    assert store.newest() == (None, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step": 8', '"step": 9'),
        ('"files"', '"fides"'),
        ('"metadata"', '"metadatc"'),
        ('"loss": 0.1', '"loss": 0.3'),
        ('"crc32": ', '"crc32": 1'),
        ('"format": 1', '"format": "1"'),
        ("model.bin", "../model.bin"),
        ('"step": 8', '"step": 8, "step": 8'),
        ('"step": 8', '"step": true'),
        ("{", "["),
        ("{", "{" * 100_000),
    ],
)
def test_a_manifest_that_says_another_thing_than_was_written_is_passed_over(tmp_path, old, new):
    store = CheckpointStore(tmp_path, keep=5)
    save(store, 4)
    path = save(store, 8).path / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    found, rejected = store.newest()
    assert found.step == 4
    assert len(rejected) == 1
    assert "step-00000008" in rejected[0]


def test_a_manifest_that_has_lost_its_checksum_is_damaged(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    paths = [save(store, step).path / "manifest.json" for step in (4, 8)]
    paths[1].write_text("".join(line for line in paths[1].read_text().splitlines(True) if '"crc32"' not in line))
    assert store.newest()[0].step == 4


def test_a_manifest_of_an_earlier_version_vouches_for_its_files_and_not_for_itself(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    for step in (4, 8):
        path = save(store, step).path / "manifest.json"
        noted = json.loads(path.read_text())
        del noted["crc32"], noted["signed"]
        path.write_text(json.dumps(noted, indent=1))
    assert store.newest()[0].step == 8
    path.write_text(path.read_text().replace('"step": 8', '"step": 9'))
    assert store.newest()[0].step == 4


def test_metadata_of_any_json_values_is_vouched_for(tmp_path):
    store = CheckpointStore(tmp_path)
    store.begin(1)
    store.commit(1, {"by": {10: 1, 9: (1, 2)}, "loss": float("nan"), "text": "é"})
    assert store.newest()[0].metadata["by"] == {"10": 1, "9": [1, 2]}


def test_steps_are_told_by_their_number_and_not_by_their_digits(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (99_999_999, 100_000_000, 100_000_001):
        scored(store, step, None)
    assert names(tmp_path) == [100_000_000, 100_000_001]
    assert store.newest()[0].step == 100_000_001
