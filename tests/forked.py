"""Processes forked from a server that has done the imports, so that a start takes milliseconds, not seconds.

The server is `multiprocessing`'s. It is started by the first request, imports `tests.preload`, and ends when nothing
holds it any more. Each process gets its caller's environment and working directory. `python` stands for the command
of that name, for tests that do not depend on which modules are imported; Python processes that it starts in turn, as
Accelerate's launcher and torchrun do, are forked too.
"""

import atexit
import contextlib
import functools
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# No thread may exist when a process is forked, so no pools of OpenMP, OpenBLAS or, in torch 2.6, Inductor, and no
# helper thread of pyarrow's jemalloc.
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TORCH_WARM_POOL": "0",
}
_lock = threading.Lock()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        set_environment(before)


def set_environment(env: Mapping[str, str]) -> None:
    """Replace the whole environment of this process."""
    os.environ.clear()
    os.environ.update(env)


def begin(env: Mapping[str, str]) -> None:
    """Make a forked process what a fresh one with this environment would be."""
    set_environment(env)
    # Python seeds its own generator anew in a fork, NumPy does not.
    np.random.seed()  # noqa: NPY002


def ensure_server() -> None:
    """Start the server if necessary; the code it imports is this repository's, whatever is installed."""
    with _lock:
        CONTEXT.set_forkserver_preload(["tests.preload"])
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with _environment(PYTHONPATH=path, **SERVER_ENV):
            forkserver.ensure_running()


def _lead(output: Connection, function: Callable[..., None], args: tuple) -> None:
    """Become the leader of a new process group that prints into the pipe."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    # As in a terminal, however the tests run: nohup and background jobs ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    function(*args)


class Forked:
    """A call in a forked process, with the methods of `subprocess.Popen`."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        ensure_server()
        output, theirs = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_lead, args=(theirs, function, args))
        self._process.start()
        theirs.close()
        # Otherwise `multiprocessing` would wait for it at exit.
        atexit.register(self._end)
        self.args, self.pid = args, self._process.pid
        self.stdout = open(os.dup(output.fileno()), encoding="utf-8")  # noqa: SIM115
        output.close()
        self._text: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def _end(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> None:
        self._text.append(self.stdout.read())
        self.stdout.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until no process of the group can print any more; returns what they printed."""
        if not self._reader.ident:
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait()
        return self._text[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def finish(process: "Forked | subprocess.Popen", timeout: float = 240) -> tuple[int, str]:
    """Its exit status and output; a process that takes longer is killed with its group."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


# `subprocess.Popen`'s names for the ends of its pipes.
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _fork_pythons() -> None:
    """Make this process fork what it would start as `python WORDS`, and start everything else as before."""
    start = inspect.unwrap(subprocess.Popen._execute_child)
    names = inspect.signature(start).parameters

    @functools.wraps(start)
    def execute_child(self: subprocess.Popen, *args: Any) -> None:
        given = dict(zip(names, (self, *args), strict=True))
        words = [given["args"]] if isinstance(given["args"], str) else list(map(os.fspath, given["args"]))
        if words[0] != sys.executable or given["preexec_fn"] is not None:
            return start(self, *args)
        ends = [given[end] for end in (PIPES[0], *PIPES[3::2])]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(words[1:], ends, given)
        self._child_created = True
        self._close_pipe_fds(*(given[end] for end in PIPES))

    subprocess.Popen._execute_child = execute_child


def _be_child(words: list[str], ends: list[int], given: dict[str, Any]) -> None:
    """Never returns; the parent's exit handlers, such as removing temporary folders, do not run here."""
    if given["start_new_session"]:
        os.setsid()
    for stream, end in enumerate(ends):
        if end != -1:
            os.dup2(end, stream)
    args = words, given["env"] or dict(os.environ), given["cwd"]
    os._exit(multiprocessing.get_context("fork").Process(target=run_words, args=args)._bootstrap())


def run_words(words: list[str], env: Mapping[str, str], cwd: str | Path | None = None) -> None:
    """Become `python WORDS` with this environment: `[-u] [-c CODE | -m MODULE | SCRIPT] ...`."""
    begin(env)
    os.chdir(cwd or ".")
    _fork_pythons()
    added = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = added
    sys.orig_argv = [sys.executable, *map(str, words)]
    for start in (Path(path, "sitecustomize.py") for path in added):
        if start.exists():
            runpy.run_path(str(start))
    sys.argv = words = [*map(str, words)][words[0] == "-u" :]
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def start_python(*words: str | Path, cwd: str | Path | None = None, **env: str) -> Forked:
    """`python WORDS` with this process's environment and these changes to it."""
    return Forked(run_words, list(words), dict(os.environ) | env, cwd)


def python(*words: str | Path, cwd: str | Path | None = None, timeout: float = 240, **env: str) -> tuple[int, str]:
    """Exit status and output of `python WORDS`."""
    return finish(start_python(*words, cwd=cwd, **env), timeout)


# Requests a process, waits for it, and passes on its output and status.
PROGRAM = """#!/bin/sh
call=$(mktemp -d {folder}/XXXXXX)
env -0 > "$call/env"
printf '%s\\0' "$@" > "$call/words"
mkfifo "$call.end"
mv "$call" "$call.asked"
read -r status < "$call.end"
cat "$call.output"
exit "$status"
"""


@contextlib.contextmanager
def python_program(path: Path) -> Iterator[None]:
    """Make `path` a program that scripts run as `python`, and whose processes are forked."""
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:

        def serve() -> None:
            while not over.wait(0.01):
                for call in Path(folder).glob("*.asked"):
                    words, env = ((call / name).read_text().split("\0")[:-1] for name in ("words", "env"))
                    there = dict(line.split("=", 1) for line in env)
                    status, output = finish(Forked(run_words, words, there, there["PWD"]))
                    call = call.rename(call.with_suffix(".done"))
                    call.with_suffix(".output").write_text(output)
                    call.with_suffix(".end").write_text(f"{status}\n")

        path.write_text(PROGRAM.format(folder=folder))
        path.chmod(0o755)
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield
        finally:
            over.set()
            server.join()
