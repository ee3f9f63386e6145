"""launch/slurm.sbatch with stand-ins for srun and scontrol; tests/multinode runs it over two real hosts."""

import re
import signal
import time

import pytest

from tests.launch.fakes import ROOT, Stage

JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    (tmp_path / "repository" / "launch").mkdir(parents=True)
    (tmp_path / "repository" / "launch" / "node.py").touch()
    stage.repository, stage.run_dir = tmp_path / "repository", tmp_path / "run"
    return stage


def submit(stage, *does):
    """Run the batch script with a command for each node's task; returns exit status, output and whether it requeued."""
    for node, text in enumerate(does):
        (stage.state / f"does.{node}").write_text(text)
    env = JOB | {"SLURM_SUBMIT_DIR": str(stage.repository)}
    status, output = stage.run("slurm.sbatch", "--config", "a b.yaml", "--run_dir", str(stage.run_dir), **env)
    requeued = stage.read("scontrol").count("requeue 4711")
    return status, output, requeued


def test_every_node_starts_one_launcher_that_knows_the_first_node(stage):
    status, output, requeued = submit(stage, "", "")
    assert (status, requeued) == (0, 0), output
    for node in ("0", "1"):
        assert stage.read(f"words.{node}") == [
            "launch/node.py",
            "--config",
            "a b.yaml",
            "--run_dir",
            str(stage.run_dir),
        ]
        settings = stage.settings(node)
        assert (settings["MASTER_ADDR"], settings["MASTER_PORT"]) == ("node-a", "24711")
    assert "--ntasks-per-node=1" in stage.read("srun")


@pytest.mark.parametrize(("status", "requeued"), [(0, 0), (2, 0), (75, 1), (1, 1), (137, 1)])
def test_what_ended_decides_whether_the_job_is_queued_again(stage, status, requeued):
    assert submit(stage, f"exit {status}", "")[::2] == (status, requeued)


def test_failures_without_a_newer_checkpoint_stop_the_queueing_and_progress_starts_the_count_anew(stage):
    assert [submit(stage, "exit 1", "")[2] for _ in range(2)] == [1, 2]
    progress = f"mkdir -p '{stage.run_dir}/checkpoints/step-00000004'; exit 1"
    assert submit(stage, progress, "")[2] == 3
    assert [submit(stage, "exit 1", "")[2] for _ in range(2)] == [4, 4]
    assert "not queued again" in submit(stage, "exit 1", "")[1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_notice_of_the_time_limit_reaches_the_tasks_and_the_saved_run_is_queued_again(stage, number):
    name = number.name.removeprefix("SIG")
    # A task that takes time to save: a trap in the middle of `wait` must not hide its status.
    task = f"trap 'sleep 0.3; exit 75' {name}; touch \"$STATE/up.$SLURM_NODEID\"; while :; do sleep 0.05; done"
    for node in (0, 1):
        (stage.state / f"does.{node}").write_text(task)
    env = JOB | {"SLURM_SUBMIT_DIR": str(stage.repository)}
    process = stage.start("slurm.sbatch", "--run_dir=x", **env)
    deadline = time.monotonic() + 60
    while not all((stage.state / f"up.{node}").exists() for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "requeue 4711" in stage.read("scontrol")


def test_the_script_asks_for_the_notice_it_traps_and_for_requeueing():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert "requeue" in options
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append"


def test_a_job_without_a_run_folder_is_refused(stage):
    env = JOB | {"SLURM_SUBMIT_DIR": str(stage.repository)}
    status, output = stage.run("slurm.sbatch", "--config", "x.yaml", **env)
    assert status == 2
    assert "--run_dir" in output
