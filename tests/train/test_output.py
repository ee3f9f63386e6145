"""Output that ends before the run does."""

import os
import sys

import pytest

from robust_dist.train.output import LOG, LastingOutput
from robust_dist.train.rank_info import Rank
from tests.forked import CONTEXT, ensure_server
from tests.train.launching import SCRIPT, TINY


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


def gone_reader():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


@pytest.mark.parametrize(("made", "reason"), [(full_disk, "No space left"), (gone_reader, "Broken pipe")])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_fails_ends_alone_and_is_noted_once(made, reason, name, tmp_path, monkeypatch):
    with made() as stream:
        monkeypatch.setattr(sys, name, stream)
        with LastingOutput(Rank(0, 1, "host")) as output:
            print("before the folder is there", file=getattr(sys, name), flush=True)
            output.claimed(tmp_path)
            print("afterwards", file=getattr(sys, name), flush=True)
        assert getattr(sys, name) is stream
    (line,) = (tmp_path / LOG).read_text().splitlines()
    assert f"rank 0 on host: {name} takes no more output" in line
    assert reason in line


def test_output_that_holds_is_unchanged_and_leaves_no_note(tmp_path, capsys):
    with LastingOutput(Rank(0, 1, "host")) as output:
        output.claimed(tmp_path)
        print("a line")
        print("an error", file=sys.stderr)
    assert capsys.readouterr() == ("a line\n", "an error\n")
    assert not list(tmp_path.iterdir())


def _train_into_a_full_disk(words):
    import runpy

    full = os.open("/dev/full", os.O_WRONLY)
    for number in (1, 2):
        os.dup2(full, number)
    sys.argv = [SCRIPT, *words]
    runpy.run_path(SCRIPT, run_name="__main__")


def test_a_run_whose_output_nobody_takes_trains_to_its_end(tmp_path):
    ensure_server()
    run = tmp_path / "run"
    process = CONTEXT.Process(target=_train_into_a_full_disk, args=([*TINY, "--epochs", "1", "--run_dir", str(run)],))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert (run / LOG).read_text().count("No space left on device") == 1
