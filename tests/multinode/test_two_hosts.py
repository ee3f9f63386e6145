"""Training over two hosts: the same as on one, under every engine, and taken up by one host."""

import pytest

from tests.multinode.jobs import EPOCHS, STEPS, same_run
from tests.train.launching import metrics

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(1200)]
# One epoch of 12 steps, the switch at 9.
SHORT = ["--epochs", "1"]


@pytest.fixture(scope="module")
def short(machines):
    job = machines.finish("short", *SHORT)
    machines.clear()
    return metrics(job.run_dir)


def test_two_hosts_give_the_run_of_one_host_with_as_many_ranks(cluster, reference):
    job = cluster.finish("one-host", places=[0], machines=1, ranks=2, options=())
    assert same_run(job.run_dir, reference), job.output()


def test_the_switch_falls_on_the_same_step_on_both_hosts(cluster, reference):
    rows = metrics(reference)
    assert [row["weight_decay"] for row in rows] == [0.01] * (EPOCHS * 3 // 4) + [0.0] * (EPOCHS // 4)
    assert rows[-1]["step"] == STEPS


def test_a_run_of_two_hosts_goes_on_bit_for_bit_on_one_of_them(cluster, reference):
    job = cluster.launch("moved")
    job.wait_for_checkpoint(8)
    job.end()
    again = cluster.finish("moved", places=[1], machines=1, ranks=2, options=())
    assert again.resumed_at() >= 8
    assert same_run(again.run_dir, reference), again.output()


def test_a_host_that_comes_later_is_waited_for(cluster, reference):
    late = {1: ["sh", "-c", 'sleep 8; exec "$@"', "sh"]}
    job = cluster.finish("late", before=late)
    assert same_run(job.run_dir, reference), job.output()


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_engines_train_over_two_hosts_as_ddp_does(cluster, short, name):
    env = {"DS_ACCELERATOR": "cpu"} if name.startswith("zero") else {"PRETEND_FSDP": "1"}
    job = cluster.finish(name, *SHORT, config=f"multinode_{name}.yaml", env=env)
    rows = metrics(job.run_dir)
    assert len(rows) == len(short) == 1
    assert rows[0] == pytest.approx(short[0], rel=2e-4), job.output()


def test_hsdp_shards_inside_a_host_and_replicates_between_hosts(cluster, short):
    sizes = ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]
    options = ["--same_network", *sizes]
    job = cluster.finish(
        "hsdp", *SHORT, config="multinode_hsdp.yaml", options=options, ranks=2, env={"PRETEND_FSDP": "1"}
    )
    rows = metrics(job.run_dir)
    # Batch normalisation's statistics are each rank's own, and here are four.
    assert rows[0]["train_loss"] == pytest.approx(short[0]["train_loss"], rel=0.05), job.output()
    assert rows[0]["weight_decay"] == 0.0
