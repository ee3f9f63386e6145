"""Problems of the environment that would make a run fail are found, and nothing else is reported."""

import os
import socket
from math import inf

import pytest

from robust_dist import surroundings


def test_a_lock_that_no_build_holds_is_stale(tmp_path):
    build = tmp_path / "py311_cpu" / "deepspeed shm"
    build.mkdir(parents=True)
    (build / "lock").touch()
    (problem,) = surroundings.stale_locks(tmp_path)
    assert problem.remedy == f"rm '{build}/lock'"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_lock_that_a_build_holds_open_is_no_problem(tmp_path):
    with open(tmp_path / "lock", "w"):
        assert list(surroundings.stale_locks(tmp_path)) == []
    assert len(list(surroundings.stale_locks(tmp_path))) == 1


@pytest.mark.parametrize(("minutes", "count"), [(1, 0), (60, 1)])
def test_without_proc_a_locks_age_tells(tmp_path, minutes, count):
    lock = tmp_path / "lock"
    lock.touch()
    then = lock.stat().st_mtime - 60 * minutes
    os.utime(lock, (then, then))
    assert len(list(surroundings.stale_locks(tmp_path, processes=tmp_path / "none"))) == count


@pytest.mark.parametrize(("source", "outlives"), [("baton = FileBaton(path)", True), ("with FileLock(path):", False)])
def test_a_lock_is_looked_for_only_where_torch_leaves_it_behind(source, outlives):
    assert surroundings.locks_outlive_builds(source) is outlives


def test_the_source_of_torch_s_builder_is_found():
    assert "def load(" in surroundings.extension_source()


def test_no_folder_has_no_lock(tmp_path):
    assert surroundings.is_open(tmp_path, processes=tmp_path) is None
    assert list(surroundings.stale_locks(tmp_path / "absent")) == []


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"TORCH_EXTENSIONS_DIR": "/x", "XDG_CACHE_HOME": "/y"}, "/x"),
        ({"XDG_CACHE_HOME": "/y"}, "/y/torch_extensions"),
        ({}, os.path.expanduser("~/.cache/torch_extensions")),
    ],
)
def test_extensions_are_built_where_torch_builds_them(environ, folder, monkeypatch):
    assert str(surroundings.extension_folder(environ)) == folder


def test_a_port_in_use_is_a_problem():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        number = sock.getsockname()[1]
        assert f"port {number}" in surroundings.port(number).detail
    assert surroundings.port(number) is None


@pytest.mark.parametrize(
    ("word", "has_gpu", "has_deepspeed", "effects"),
    [
        ("true", True, True, ["GPUs unused", "without DeepSpeed"]),
        ("1", False, True, ["without DeepSpeed"]),
        ("YES", True, False, ["GPUs unused"]),
        ("true", False, False, None),
        ("false", True, True, None),
        (None, True, True, None),
    ],
)
def test_a_forced_cpu_is_a_problem_where_it_takes_something_away(word, has_gpu, has_deepspeed, effects):
    environ = {} if word is None else {"ACCELERATE_USE_CPU": word}
    problem = surroundings.forced_cpu(environ, has_gpu=has_gpu, has_deepspeed=has_deepspeed)
    if effects is None:
        assert problem is None
    else:
        assert problem.remedy == "unset ACCELERATE_USE_CPU"
        assert [effect in problem.detail for effect in ("GPUs unused", "without DeepSpeed")] == [has_gpu, has_deepspeed]
        assert all(effect in problem.detail for effect in effects)


def test_left_over_rank_variables_are_named():
    problem = surroundings.rank_variables({"RANK": "0", "WORLD_SIZE": "2", "HOME": "/"})
    assert "RANK=0, WORLD_SIZE=2" in problem.detail
    assert problem.remedy == "unset RANK WORLD_SIZE"
    assert surroundings.rank_variables({"HOME": "/"}) is None


@pytest.mark.parametrize("check", [surroundings.shared_memory, surroundings.temporary_folder])
def test_a_folder_with_too_little_room_is_a_problem(check, tmp_path):
    assert f"{tmp_path}" in check(tmp_path, at_least=2**80).detail
    assert check(tmp_path, at_least=0) is None


def test_a_low_limit_of_open_files_is_a_problem():
    resource, lowest = pytest.importorskip("resource"), surroundings.MIN_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < lowest:
        pytest.skip(f"this user may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest - 1, hard))
    problem = surroundings.open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    enough = surroundings.open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert f"at most {lowest - 1} open files" in problem.detail
    assert problem.remedy.startswith("ulimit -n ")
    assert enough is None


def test_a_missing_compiler_matters_to_deepspeed_alone():
    problem = surroundings.compiler(has_deepspeed=True, which=lambda name: None)
    assert "a C++ compiler" in problem.detail
    assert surroundings.compiler(has_deepspeed=False, which=lambda name: None) is None
    assert surroundings.compiler(has_deepspeed=True, which=lambda name: f"/bin/{name}") is None


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", inf), ("", inf), ("nonsense", inf)]
)
def test_the_control_groups_quota_is_read(tmp_path, text, cores):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert surroundings.quota(path) == cores


def test_a_missing_quota_is_no_limit(tmp_path):
    assert surroundings.quota(tmp_path / "cpu.max") == inf
    assert 0 < surroundings.usable_cores() <= os.cpu_count()
