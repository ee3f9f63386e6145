"""A checkpoint is whole or not there."""

import json

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
