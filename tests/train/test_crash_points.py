"""A run killed before any single change to its files, then restarted, ends like an undisturbed run."""

import os
import random
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.engines.deepspeed_on_cpu import get_ready
from tests.forked import CONTEXT, begin, ensure_server
from tests.ranks import rank_environment
from tests.train.launching import SCRIPT, metrics
from tests.train.under_engines import environment
from tests.versions import TORCH_2_7

WORDS = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
WORDS += ["--batch_size", "256", "--epochs", "2", "--checkpoint.every_steps", "4"]
WORDS += ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _watch(run, number, log):
    """Before each change of a file below `run`: count it, and kill the whole process group at the `number`-th."""
    counted, file = 0, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event, args):
        nonlocal counted
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
            if path.startswith(run):
                counted += 1
                os.write(file, f"{event} {path}\n".encode())
                if counted == number:
                    os.killpg(0, signal.SIGKILL)

    sys.addaudithook(note)


def _rank(rank, engine, words, env, run, number, log):
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in env else {}
    begin(env | ranks)
    if engine.startswith("fsdp"):
        from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

        pretend_fsdp_runs_on_cpus()
    if engine.startswith("zero"):
        get_ready()
    if rank == 0:
        _watch(run, number, log)
    sys.argv = [SCRIPT, *words]
    runpy.run_path(SCRIPT, run_name="__main__")


def _lead(engine, world_size, words, env, run, number, log, output):
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if world_size == 1:
        return _rank(0, engine, words, env, run, number, log)
    given = (engine, words, env, run, number, log)
    mp.start_processes(_rank, given, world_size, join=True, start_method="fork")


def start(folder: Path, engine: str, world_size: int, number: int = 0) -> int | None:
    """Train in `folder`/run; rank 0 is killed before its `number`-th change of a file there, with all ranks."""
    ensure_server()
    run = str(folder / "run")
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        env |= environment(engine) | rank_environment(world_size)
    words = [*WORDS, "--run_dir", run]
    args = (engine, world_size, words, env, run, number, str(folder / "changes"), str(folder / "output"))
    process = CONTEXT.Process(target=_lead, args=args)
    process.start()
    process.join(240)
    return process.exitcode


def ended(folder: Path) -> tuple[list[dict], bytes]:
    """What a run recorded, and the bytes of its last weights if they are in one file."""
    last = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
    weights = last / "model.safetensors"
    return metrics(folder / "run"), weights.read_bytes() if weights.exists() else b""


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("engine", "world_size", "most"), [("cpu", 1, 1000), ("cpu", 2, 1000), ("fsdp2", 2, 20), ("zero3", 2, 20)]
)
def test_a_run_killed_before_any_change_of_its_files_ends_as_an_undisturbed_one(engine, world_size, most, tmp_path):
    if engine == "fsdp2" and not TORCH_2_7:
        pytest.skip("torch 2.6 runs FSDP2 on GPUs alone")
    (tmp_path / "whole").mkdir()
    assert start(tmp_path / "whole", engine, world_size) == 0, (tmp_path / "whole" / "output").read_text()
    wanted = ended(tmp_path / "whole")
    points = len((tmp_path / "whole" / "changes").read_text().splitlines())
    chosen = sorted(random.Random(0).sample(range(1, points + 1), min(most, points)))
    wrong = {}
    for number in chosen:
        folder = tmp_path / f"at-{number}"
        folder.mkdir()
        start(folder, engine, world_size, number)
        code = start(folder, engine, world_size)
        if code != 0 or ended(folder) != wanted:
            changes = (folder / "changes").read_text().splitlines()
            wrong[number] = code, changes[number - 1 : number], (folder / "output").read_text()[-500:]
    print(f"{engine} on {world_size}: {len(chosen)} of {points} crash points, {len(wrong)} wrong")
    assert not wrong
