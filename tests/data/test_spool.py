"""A spool gives what was fetched, fetches it once for all processes, and stays within its bounds."""

import multiprocessing
import os
import time

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa

from robust_dist.data import spool as spool_module
from robust_dist.data.errors import DataError
from robust_dist.data.spool import Spool


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


def test_a_full_disk_costs_the_file_and_not_the_table(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module.os, "replace", full)
    assert Spool(tmp_path).table("a", lambda: table(1)).equals(table(1))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("lock")] == []


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(DataError, match="another user's: set spool_dir"):
        Spool(tmp_path).table("a", lambda: table(1))
