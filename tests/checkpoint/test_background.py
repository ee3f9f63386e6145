"""Checkpoints written by threads: complete or absent, whatever happens to the disk and to other ranks."""

import json
import os
import time

import pytest

from robust_dist.checkpoint import CheckpointError, CheckpointStore, verify
from robust_dist.checkpoint.background import Pending, Staging, copy_tree, sweep
from robust_dist.checkpoint.store import part_path
from tests.forked import CONTEXT, ensure_server
from tests.small_disk import can_mount, small_disk


def staged_files(staging, step, rank):
    folder = staging.folder(step)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / f"rank{rank}.bin").write_bytes(bytes([rank]) * 1000)
    (folder / "deep" / "er" / f"shard{rank}.bin").write_bytes(os.urandom(10_000))
    return folder


@pytest.fixture
def staging(tmp_path):
    (tmp_path / "memory").mkdir()
    made = Staging(tmp_path / "memory")
    yield made
    made.close()


def begin(store, staging, step, ranks, patience=30.0, world_size=None):
    partial = store.begin(step)
    world_size = world_size or len(ranks)
    return [
        Pending(
            store,
            staged_files(staging, step, rank) if rank == 0 else staged_files_of(staging, step, rank),
            partial,
            step,
            {"loss": 0.5},
            rank=rank,
            world_size=world_size,
            patience=patience,
        )
        for rank in ranks
    ]


def staged_files_of(staging, step, rank):
    """Another rank's own folder on the same host."""
    return staged_files(staging, step * 1000 + rank, rank)


def test_the_parts_of_all_ranks_become_one_checkpoint(tmp_path, staging):
    store = CheckpointStore(tmp_path / "run", token="abc")
    pending = begin(store, staging, 7, [0, 1, 2])
    done = pending[0].result()
    assert done == verify(tmp_path / "run" / "step-00000007")
    names = set(json.loads((done.path / "manifest.json").read_text())["files"])
    assert names == {f"rank{r}.bin" for r in range(3)} | {f"deep/er/shard{r}.bin" for r in range(3)}
    assert not list(done.path.glob(".part-*"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000007"]
    assert sorted(path.name for path in staging.path.iterdir()) == [".lock"]


def test_a_rank_that_never_writes_keeps_the_checkpoint_from_being_there(tmp_path, staging):
    store = CheckpointStore(tmp_path / "run")
    begin(store, staging, 1, [0])[0].result()
    late = begin(store, staging, 2, [0], patience=0.3, world_size=2)[0]
    with pytest.raises(CheckpointError, match="rank 1 wrote nothing"):
        late.result()
    assert store.newest()[0].step == 1
    late.abandon()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000001"]


def test_a_rank_of_a_dead_start_that_still_writes_is_neither_mixed_in_nor_left(tmp_path, staging):
    theirs = CheckpointStore(tmp_path / "run", token="dead").begin(4)
    store = CheckpointStore(tmp_path / "run", token="alive")
    partial = store.begin(4)

    def start(rank, folder):
        return Pending(store, folder, partial, 4, {}, rank=rank, world_size=2, patience=30.0)

    first = start(0, staged_files(staging, 4, 0))
    (theirs / "rank1.bin").write_text("of the dead")
    part_path(theirs, 1).write_text(json.dumps({"rank1.bin": [11, 0]}))
    time.sleep(0.3)
    second = start(1, staged_files_of(staging, 4, 1))
    assert second.wait_for_copy() is None
    assert (first.result().path / "rank1.bin").read_bytes() == bytes([1]) * 1000
    assert verify(tmp_path / "run" / "step-00000004")
    store.clean()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000004"]


def test_a_process_that_lost_its_folder_does_not_bring_it_back(tmp_path, staging):
    store = CheckpointStore(tmp_path / "run", token="old")
    partial = store.begin(4)
    store.clean()
    with pytest.raises(CheckpointError, match="No such file"):
        copy_tree(staged_files(staging, 4, 0), partial)
    assert not partial.exists()


def test_a_run_that_lost_its_folder_completes_nothing(tmp_path, staging):
    def lost():
        raise RuntimeError("taken over")

    store = CheckpointStore(tmp_path / "run", guard=lost)
    with pytest.raises(RuntimeError, match="taken over"):
        begin(store, staging, 4, [0])[0].result()
    assert store.newest() == (None, [])


def stage_and_wait(root, ready):
    staging = Staging(root)
    (staging.folder(3) / "model.bin").write_bytes(b"x" * 100_000)
    ready.send(staging.path.name)
    time.sleep(120)


def test_what_a_killed_process_staged_is_removed_by_the_next_and_a_live_one_s_is_not(tmp_path, staging):
    memory = tmp_path / "memory"
    ensure_server()
    answer, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=stage_and_wait, args=(memory, theirs))
    process.start()
    name = answer.recv()
    assert sweep(memory) == []
    process.kill()
    process.join()
    assert (memory / name / "00000003" / "model.bin").exists()
    assert sweep(memory) == [memory / name]
    assert [path.name for path in memory.iterdir()] == [staging.path.name]


def old(path):
    os.utime(path, (time.time() - 3600,) * 2)


def test_what_was_killed_while_it_was_made_or_removed_is_swept_and_what_is_no_folder_of_ours_is_kept(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / ".lock").write_text("kept")
    root = tmp_path / "memory"
    root.mkdir()
    half_made, unlocked, being_made = (
        root / f"{name}1" for name in (".robust_dist-staged-", "robust_dist-staged-", ".robust_dist-staged-x")
    )
    for path in (half_made, unlocked, being_made):
        path.mkdir()
    (unlocked / "model.bin").write_bytes(b"x")
    old(half_made)
    (root / "robust_dist-staged-link").symlink_to(precious)
    (root / "robust_dist-staged-file").write_text("kept")
    assert set(sweep(root)) == {half_made, unlocked}
    assert sorted(path.name for path in root.iterdir()) == [
        being_made.name,
        "robust_dist-staged-file",
        "robust_dist-staged-link",
    ]
    assert (precious / ".lock").read_text() == "kept"


@pytest.mark.skipif(not can_mount(), reason="mounting needs root, and a container that allows it")
def test_a_full_disk_is_named_and_its_space_given_back(tmp_path, staging):
    with small_disk(tmp_path / "disk", "64k"):
        store = CheckpointStore(tmp_path / "disk" / "checkpoints")
        begin(store, staging, 1, [0])[0].result()
        staged = staged_files(staging, 2, 0)
        (staged / "large.bin").write_bytes(b"x" * 100_000)
        pending = Pending(store, staged, store.begin(2), 2, {}, rank=0, world_size=1, patience=5.0)
        error = pending.wait_for_copy()
        assert isinstance(error, CheckpointError)
        assert "large.bin could not be written: No space left on device; " in str(error)
        assert "bytes) are free there" in str(error)
        pending.abandon()
        assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
        assert verify(store.folder / "step-00000001")
        begin(store, staging, 3, [0])[0].result()
