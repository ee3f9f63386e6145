"""The table of what a checkpoint costs has a row for every way, and leaves nothing behind."""

from pathlib import Path

from tests.ranks import run_ranks


def table(folder):
    from robust_dist.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(rounds=1, model="resnet8", folder=folder)


def test_every_way_has_its_times(tmp_path):
    (text,) = run_ranks(table, 1, str(tmp_path))
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == [
        "Accelerate's save_state, no checksums, no sync",
        "at once (checkpoint.background=false)",
        "in the background",
    ]
    for row in rows:
        waits, whole = (float(cell.split()[0]) for cell in row[1:])
        assert 0 < waits <= whole
    assert list(Path(tmp_path).iterdir()) == []
