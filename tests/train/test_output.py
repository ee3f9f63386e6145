"""Output that fails before the run ends."""

import contextlib
import os
import sys

import pytest
from tqdm import tqdm

from robust_dist.train.failures import Rank
from robust_dist.train.output import LOG, LastingOutput
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
def test_output_that_fails_ends_alone_and_is_noted_once(made, reason, name, tmp_path):
    redirected = contextlib.redirect_stdout if name == "stdout" else contextlib.redirect_stderr
    with made() as stream, redirected(stream):
        with LastingOutput(Rank(0, 1, "host")) as output:
            print("before the folder is there", file=getattr(sys, name), flush=True)
            output.claimed(tmp_path)
            print("afterwards", file=getattr(sys, name), flush=True)
        assert getattr(sys, name) is stream
    _, *lines = (tmp_path / LOG).read_text().splitlines()
    (note,) = [line for line in lines if "cannot be written any more" in line]
    assert f"rank 0 on host: {name} cannot be written any more" in note
    assert reason in note
    assert [line for line in lines if line != note] == ["before the folder is there", "afterwards"]


@pytest.mark.parametrize("rank", [0, 1])
def test_output_that_holds_is_unchanged_and_the_first_rank_alone_keeps_it(rank, tmp_path, capsys):
    with LastingOutput(Rank(rank, 2, "host")) as output:
        output.claimed(tmp_path)
        print("a line")
        print("an error", file=sys.stderr)
    assert capsys.readouterr() == ("a line\n", "an error\n")
    assert [path.name for path in tmp_path.iterdir()] == ([] if rank else [LOG])


def test_the_log_holds_each_start_s_command_and_whole_lines_without_secrets_or_a_bar_s_states(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HUB_TOKEN", "geheimgeheim")
    monkeypatch.setattr(sys, "argv", ["train.py", "--tracking.options", "{wandb: {api_key: abcdefghijk}}"])
    for start in (1, 2):
        with LastingOutput(Rank(0, 1, "host")) as output:
            print(f"start {start} as geheimgeheim")
            bar = tqdm(total=2, file=sys.stderr, mininterval=0, ascii=True)
            output.claimed(tmp_path)
            for epoch in (1, 2):
                bar.update()
                tqdm.write(f"epoch {epoch}", file=sys.stdout)
            bar.close()
            print("\x1b[31mred\x1b[0m, and no line's end", end="")
    text = (tmp_path / LOG).read_text()
    first, second = text.split("--- ")[1:]
    assert "geheimgeheim" in capsys.readouterr().out
    assert "geheimgeheim" not in text
    assert "abcdefghijk" not in text
    head, said, one, two, bar, last = second.splitlines()
    assert head.endswith('train.py --tracking.options \'{"wandb": {"api_key": "(hidden)"}}\'')
    assert (said, one, two) == ("start 2 as (hidden)", "epoch 1", "epoch 2")
    assert bar.startswith("100%")
    assert last == "red, and no line's end"
    assert first.splitlines()[1] == "start 1 as (hidden)"


def test_a_run_that_has_no_folder_keeps_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with LastingOutput(Rank(0, 1, "host")):
        print("refused")
    assert not list(tmp_path.iterdir())


def test_a_log_that_a_full_disk_takes_no_more_of_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / LOG).symlink_to("/dev/full")
    with LastingOutput(Rank(0, 1, "host")) as output:
        output.claimed(tmp_path)
        for number in range(3):
            print(number)
    out, err = capsys.readouterr()
    assert out == "0\n1\n2\n"
    said = "cannot be written any more (No space left on device); the run continues without it"
    assert err == f"warning: {tmp_path / LOG} {said}\n"


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
    log = (run / LOG).read_text()
    assert log.count("No space left on device") == 1
    assert "\nepoch   1/1  train loss " in log
    assert log.splitlines()[-1].startswith("use it: robust-dist evaluate ")
