"""A spool returns what was fetched, fetches it once for all processes, and stays within its limit."""

import multiprocessing
import os
import time

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa

from robust_dist.data import spool as spool_module
from robust_dist.data.errors import DataError
from robust_dist.data.spool import Spool
from tests.small_disk import no_file_above


def table(number, size=1_000):
    return pa.table({"image": [bytes([number]) * size], "label": [number]})


def refuse():
    raise AssertionError("fetched again")


def test_a_table_is_fetched_once_and_known_to_a_later_spool_of_the_folder(tmp_path):
    assert Spool(tmp_path).table("a", lambda: table(1)).equals(table(1))
    assert Spool(tmp_path).table("a", refuse).equals(table(1))
    assert Spool(tmp_path).table("b", lambda: table(2)).equals(table(2))


def _want(folder, log, start, results):
    start.wait(60)

    def fetch(number):
        with open(log, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.02)
        return table(number)

    spool = Spool(folder)
    results.put(all(spool.table(str(n), lambda n=n: fetch(n)).equals(table(n)) for n in range(5)))


def test_processes_that_want_a_table_at_once_fetch_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.SimpleQueue()
    log = tmp_path / "log"
    workers = [context.Process(target=_want, args=(tmp_path / "spool", log, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    assert [results.get() for _ in workers] == [True] * 4
    for worker in workers:
        worker.join(60)
    assert sorted(log.read_text().split()) == list("01234")


def test_the_oldest_tables_go_and_one_that_is_mapped_stays_readable(tmp_path):
    spool = Spool(tmp_path, most_bytes=10_000)
    mapped = spool.table("0", lambda: table(0, 3_000))
    os.utime(tmp_path / "0.arrow", ns=(0, 0))
    for number in range(1, 6):
        spool.table(str(number), lambda number=number: table(number, 3_000))
        os.utime(tmp_path / f"{number}.arrow", ns=(number, number))
    left = sorted(path.stem for path in tmp_path.glob("*.arrow"))
    assert left == ["4", "5"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) <= 10_000
    assert mapped.equals(table(0, 3_000))
    assert spool.table("0", lambda: table(7)).equals(table(7))


def test_a_failed_fetch_leaves_nothing_and_is_tried_again(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(AssertionError, match="fetched again"):
        spool.table("a", refuse)
    assert spool.table("a", lambda: table(1)).equals(table(1))


def test_a_torn_file_is_fetched_again(tmp_path):
    spool = Spool(tmp_path)
    spool.table("a", lambda: table(1))
    file = tmp_path / "a.arrow"
    file.write_bytes(file.read_bytes()[:500])
    assert spool.table("a", lambda: table(2)).equals(table(2))
    assert spool.table("a", refuse).equals(table(2))


def test_a_disk_without_room_costs_the_file_and_not_the_table(tmp_path):
    with no_file_above(500):
        found = Spool(tmp_path).table("a", lambda: table(1))
    assert found.equals(table(1))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("lock")] == []


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(DataError, match="belongs to another user; set spool_dir"):
        Spool(tmp_path).table("a", lambda: table(1))


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """The name in the temporary folder that anybody could have created first."""
    monkeypatch.setattr(spool_module.tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"robust_dist-{os.getuid()}"


def test_a_link_at_the_shared_name_is_not_followed_and_a_private_folder_serves(shared, tmp_path, capsys):
    mine = tmp_path / "dataset"
    mine.mkdir()
    kept = {mine / "data.arrow": "rows", **{mine / f"lock-{n}": "precious" for n in range(spool_module.LOCKS)}}
    for path, text in kept.items():
        path.write_text(text)
    shared.symlink_to(mine)
    spool = Spool(most_bytes=100)
    assert spool.table("n", lambda: table(1)).equals(table(1))
    assert {path: path.read_text() for path in mine.iterdir()} == kept
    assert f"{shared} is not used: it is a link" in capsys.readouterr().out
    private = spool.folder
    assert private.stat().st_mode & 0o077 == 0
    del spool
    assert not private.exists()


@pytest.mark.parametrize("spoil", ["file", "writable"])
def test_a_shared_name_that_is_no_private_folder_is_left_alone(shared, spoil, capsys):
    if spoil == "file":
        shared.write_text("kept")
    else:
        shared.mkdir()
        shared.chmod(0o777)
    assert Spool().table("n", lambda: table(1)).equals(table(1))
    assert "is not used" in capsys.readouterr().out
    assert shared.read_text() == "kept" if spoil == "file" else not list(shared.iterdir())


def test_a_link_at_a_lock_s_name_is_refused_and_its_target_kept(tmp_path):
    target, folder = tmp_path / "target", tmp_path / "spool"
    target.write_text("kept")
    folder.mkdir()
    for number in range(spool_module.LOCKS):
        (folder / f"lock-{number}").symlink_to(target)
    with pytest.raises(OSError, match="lock-"):
        Spool(folder).table("n", lambda: table(1))
    assert target.read_text() == "kept"
