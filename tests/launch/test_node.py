"""launch/node.py: from a scheduler's variables to `accelerate launch`; and the manifest that starts it."""

import pytest
import yaml

from robust_dist.train.recipe import parse_recipe
from tests.launch.fakes import ROOT, node_module

node = node_module()
SLURM = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8", "MASTER_ADDR": "n1"}
SLURM |= {"MASTER_PORT": "24711"}
HOSTS = {"NODES": "2", "NODE_RANK": "1", "GPUS_PER_NODE": "4", "MASTER_ADDR": "a"}
POD = {"NODES": "2", "RANK": "1", "GPUS_PER_NODE": "8", "MASTER_ADDR": "j-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (SLURM, node.Place(4, 3, 8, "n1", 24711)),
        (HOSTS, node.Place(2, 1, 4, "a", 29500)),
        (POD, node.Place(2, 1, 8, "j-master-0", 23456)),
        ({"GPUS_PER_NODE": "1"}, node.Place(1, 0, 1, "127.0.0.1", 29500)),
    ],
)
def test_a_hosts_place_is_read_from_each_scheduler(environ, place):
    assert node.place(environ) == place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NODES": "two"}, "NODES='two'"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2"),
        ({"NODE_RANK": ""}, "NODE_RANK, SLURM_NODEID, RANK"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE='0'"),
        ({"GPUS_PER_NODE": ""}, "GPUS_PER_NODE, SLURM_GPUS_ON_NODE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
        ({"NODES": "\N{SUPERSCRIPT TWO}"}, "NODES="),
        ({"NODES": "9" * 5000}, "NODES='999"),
        ({"GRACE_SECONDS": "soon"}, "GRACE_SECONDS='soon'"),
        ({"GRACE_SECONDS": "1e9"}, "GRACE_SECONDS='1e9'"),
        ({"JOIN_SECONDS": "0"}, "JOIN_SECONDS='0'"),
        ({"RESTARTS": "-1"}, "RESTARTS='-1'"),
        ({"NODE_RANK": "", "SLURM_NODEID": "x"}, "SLURM_NODEID='x'"),
        ({"NODES": "x", "MASTER_PORT": "y", "RESTARTS": "z"}, r"(?s)NODES='x'.*MASTER_PORT='y'.*RESTARTS='z'"),
    ],
)
def test_a_place_that_makes_no_sense_is_named(change, said, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(node.PlaceError, match=said):
        node.place(HOSTS | change)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp", "zero2", "zero3", "configs/accelerate/cpu.yaml"])
def test_accelerate_reads_the_options_of_every_engine(engine, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(ROOT)
    words = node.options(node.place(HOSTS), {"ENGINE": engine, "RESTARTS": "2", "JOIN_SECONDS": "90"})
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "launch/train.py"]))
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 8)
    assert (args.main_process_ip, args.main_process_port, args.same_network) == ("a", 29500, True)
    assert (args.max_restarts, args.rdzv_backend, args.rdzv_conf) == (2, "static", "timeout=90")
    if engine == "hsdp":
        assert (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size) == (2, 4)
    if engine.startswith("zero"):
        assert args.deepspeed_multinode_launcher == "standard"


def test_a_hosts_gpus_are_counted_where_nothing_names_them(monkeypatch):
    monkeypatch.setattr(node, "count_gpus", lambda: 6)
    assert node.place(HOSTS | {"GPUS_PER_NODE": ""}).gpus == 6


def test_an_unknown_engine_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(node.PlaceError, match=r"ENGINE='zero9'.*ddp, fsdp2, hsdp, zero2, zero3"):
        node.options(node.place(HOSTS), {"ENGINE": "zero9"})


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())


# Keys of kubeflow.org/v1's PyTorchJob; the API server drops or rejects others.
RUN_POLICY = {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend"}
SPEC = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
CONTAINER = {"name", "image", "imagePullPolicy", "workingDir", "command", "args", "ports", "env", "resources"}
CONTAINER |= {"volumeMounts"}


def test_the_manifest_has_the_structure_of_a_pytorchjob(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = manifest["spec"]
    assert set(spec) <= SPEC
    assert set(spec["runPolicy"]) <= RUN_POLICY | {"ttlSecondsAfterFinished"}
    assert spec["runPolicy"]["cleanPodPolicy"] in ("Running", "All", "None")
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replica in spec["pytorchReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        assert set(pod) == {"terminationGracePeriodSeconds", "containers", "volumes"}
        (container,) = pod["containers"]
        assert set(container) == CONTAINER
        assert container["name"] == "pytorch"
        assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 23456}]
        assert all(set(one) == {"name", "value"} and isinstance(one["value"], str) for one in container["env"])
        assert all(isinstance(word, str) for word in container["command"] + container["args"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_manifests_numbers_agree_with_each_other(manifest):
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    pods = sum(replica["replicas"] for replica in replicas.values())
    assert manifest["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == pods
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        env = {one["name"]: one["value"] for one in container["env"]}
        assert env["NODES"] == str(pods)
        assert env["GPUS_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert float(env["GRACE_SECONDS"]) < pod["terminationGracePeriodSeconds"]
        shm = next(mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        volume = next(one for one in pod["volumes"] if one["name"] == shm)
        assert volume["emptyDir"]["medium"] == "Memory"


def test_the_manifests_command_is_one_that_the_launcher_and_the_trainer_accept(manifest, monkeypatch):
    monkeypatch.chdir(ROOT)
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["command"] == ["python", "launch/node.py"]
        recipe = parse_recipe(container["args"])
        assert recipe.run_dir == "/shared/runs/kubernetes"
        env = {one["name"]: one["value"] for one in container["env"]}
        place = node.place(env | {"RANK": "1", "MASTER_ADDR": "robust-dist-master-0", "MASTER_PORT": "23456"})
        assert (place.nodes, place.rank, place.port) == (2, 1, 23456)
        assert "configs/accelerate/multinode_ddp.yaml" in node.options(place, env)
