"""launch/hosts.sh against a stand-in for ssh; tests/multinode runs it over two real hosts."""

import signal
import time

import pytest

from tests.launch.fakes import Stage

# A part that lives as long as its connection.
WAITS = 'touch "$STATE/waits.$HOST"; cat >/dev/null; echo "ended with its input"; touch "$STATE/ended.$HOST"\n'


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def appears(stage, *names, patience=60):
    deadline = time.monotonic() + patience
    while not all((stage.state / name).exists() for name in names):
        assert time.monotonic() < deadline, [path.name for path in stage.state.iterdir()]
        time.sleep(0.02)


def test_every_host_gets_its_place_and_the_words_as_they_are(stage):
    stage.host("me@a", "echo one; echo two >&2\n")
    stage.host("b")
    words = ["--run_dir", "/shared/two words", "--model.options", "{'a': \"$HOME\"}", "--x", "*"]
    env = {"NCCL_DEBUG": "INFO,x y", "PASS": "NCCL_DEBUG UNSET", "ENGINE": "zero2"}
    status, output = stage.run("hosts.sh", "me@a,b", *words, **env)
    assert status == 0, output
    for place, name in enumerate(("me@a", "b")):
        assert stage.read(f"words.{name}") == ["launch/node.py", *words]
        settings = stage.settings(name)
        assert (settings["NODES"], settings["NODE_RANK"]) == ("2", str(place))
        assert (settings["MASTER_ADDR"], settings["MASTER_PORT"]) == ("a", "40001")
        assert (settings["NCCL_DEBUG"], settings["ENGINE"]) == ("INFO,x y", "zero2")
        assert "UNSET" not in settings
    assert "[me@a] one\n" in output
    assert "[me@a] two\n" in output


def test_hosts_that_differ_are_shown_and_not_started(stage):
    stage.host("a")
    stage.host("b", probe='probe {"alike": {"commit": "c2"}, "port": 40001, "resolves": true}\n')
    status, output = stage.run("hosts.sh", "a,b", "--epochs", "1")
    assert status == 2
    assert 'a: {"commit": "c1"}' in output
    assert 'b: {"commit": "c2"}' in output
    assert not stage.read("words.a")


def test_a_host_that_ssh_does_not_reach_is_named(stage):
    stage.host("a")
    (stage.state / "unreachable.b").touch()
    status, output = stage.run("hosts.sh", "a,b", "--epochs", "1")
    assert status == 2
    assert "b cannot take part: ssh: connect to host b: No route to host" in output
    assert not stage.read("words.a")


def test_a_name_that_another_host_does_not_know_is_named(stage):
    stage.host("a")
    stage.host("b", probe='probe {"alike": {"commit": "c1"}, "port": 40001, "resolves": false}\n')
    status, output = stage.run("hosts.sh", "a,b", "--epochs", "1")
    assert status == 2
    assert "b does not know the name a: set MASTER_ADDR" in output


def test_the_first_bad_status_ends_all_hosts_and_is_the_scripts(stage):
    stage.host("a", WAITS)
    stage.host("b", 'until [ -e "$STATE/waits.a" ]; do sleep 0.02; done; exit 7\n')
    status, output = stage.run("hosts.sh", "a,b", "--epochs", "1")
    assert status == 7, output
    assert "b ended with status 7" in output
    assert "[a] ended with its input" in output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_no_part_outlives_the_script(stage, number, status):
    for name in ("a", "b"):
        stage.host(name, WAITS)
    process = stage.start("hosts.sh", "a,b", "--epochs", "1")
    appears(stage, "waits.a", "waits.b")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    appears(stage, "ended.a", "ended.b")


@pytest.mark.parametrize(("first", "starts", "status"), [(1, 2, 0), (2, 1, 2), (75, 1, 75)])
def test_a_failure_that_is_no_mistake_is_retried_as_often_as_asked(stage, first, starts, status):
    once = f'[ -e "$STATE/again" ] || {{ touch "$STATE/again"; exit {first}; }}'
    stage.host("a", f'echo start >>"$STATE/starts"; {once}\n')
    assert stage.run("hosts.sh", "a", "--epochs", "1", RETRIES="3")[0] == status
    assert len(stage.read("starts")) == starts


def test_an_empty_name_among_the_hosts_is_refused(stage):
    status, output = stage.run("hosts.sh", "a,,b", "--epochs", "1")
    assert status == 2
    assert "an empty name among the hosts a,,b" in output


@pytest.mark.parametrize("words", [[], ["a,b"], ["--config", "x"]])
def test_without_hosts_or_words_the_use_is_shown(stage, words):
    status, output = stage.run("hosts.sh", *words)
    assert status == 2
    assert "launch/hosts.sh host1,host2" in output
