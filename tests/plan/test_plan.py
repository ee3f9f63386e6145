"""What the plan proposes, what it sends, and how it answers mistakes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from robust_dist.cli import main
from robust_dist.engines.deepspeed.engine import partition
from robust_dist.engines.fsdp.engine import own_rows, padded_rows
from robust_dist.engines.variant import Collective
from robust_dist.plan.choose import micro_batches, plan, traffic, variants
from robust_dist.plan.profile import Parameter, Shapes, Unit, build_on_meta, read_shapes
from robust_dist.plan.question import Question

ROOT = Path(__file__).parents[2]
BY_NAME = {variant.name: variant for variant in variants()}
SMALL = {"model": "resnet8", "image_size": 32, "num_classes": 10}


def toy_shapes(*sizes):
    parameters = tuple(Parameter(f"p{i}", (size,)) for i, size in enumerate(sizes))
    return Shapes(parameters, (Unit("", parameters, True),), 0, 0)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (64, 3, 3, 3)])
def test_shares_of_rows_cover_a_parameter_once(shape, shards):
    shares = [own_rows(shape, shards, rank) for rank in range(shards)]
    assert sum(shares) == math.prod(shape)
    assert max(shares) == shares[0] == padded_rows(shape, shards)


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("numel", [1, 16, 1001])
def test_zero_s_parts_are_equal_aligned_and_cover_the_group(numel, shards):
    own = partition(numel, shards)
    assert own % 2 == 0
    assert numel <= own * shards < numel + 2 * shards


def test_the_worst_zero_rank_is_the_one_whose_part_touches_the_largest_gradients():
    shapes = toy_shapes(10, 1000, 10, 10, 10)
    job = Question("any", gpus_per_node=4, batch_size=4)
    zero2 = BY_NAME["ZeRO-2"]
    found = [zero2.held(shapes, job, rank).gradients for rank in range(4)]
    assert found[zero2.worst_rank(shapes, job)] == max(found)
    assert found[0] == 4 * 1010
    assert found[3] == 4 * (1000 + 30)


@pytest.mark.parametrize(
    ("operation", "sent"), [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("broadcast", 100.0)]
)
def test_bytes_are_a_ring_s(operation, sent):
    assert Collective("x", operation, 100, 4, 1, False, True).sent == sent


def sums(engine, shapes, job, accumulation):
    found = {}
    for one in traffic(BY_NAME[engine], shapes, job, accumulation):
        found[one.operation] = found.get(one.operation, 0) + one.payload
    return found


def test_what_is_sent_again_for_every_micro_batch():
    shapes = toy_shapes(8_000_000, 8_000_000)
    job = Question("any", gpus_per_node=8, batch_size=64)
    whole = 4 * 16_000_000
    assert sums("DDP", shapes, job, 4) == {"all-reduce": whole}
    assert sums("ZeRO-1", shapes, job, 4) == {"all-reduce": whole, "all-gather": whole}
    assert sums("ZeRO-2", shapes, job, 4) == {"all-reduce": 4 * whole, "all-gather": whole}
    assert sums("ZeRO-3", shapes, job, 4) == {"all-gather": 4 * whole, "reduce-scatter": 4 * whole}
    assert sums("FSDP2", shapes, job, 4) == {"all-gather": 4 * whole, "reduce-scatter": whole}


def test_hsdp_sends_between_nodes_only_an_eighth_of_the_gradients():
    shapes = toy_shapes(8_000_000)
    job = Question("any", nodes=4, gpus_per_node=8, batch_size=64)
    away = [one for one in traffic(BY_NAME["HSDP"], shapes, job, 1) if one.between_nodes]
    assert [(one.operation, one.payload, one.ranks) for one in away] == [("all-reduce", 4_000_000, 4)]


def test_a_larger_memory_never_makes_the_micro_batch_smaller_and_all_fit_the_margin():
    job = Question(**SMALL, gpus_per_node=2, batch_size=4096, precision="no")
    before = 0
    for memory in (2.0, 3.0, 8.0):
        found = plan(replace(job, memory_gib=memory))
        assert found.best is not None
        assert found.best.memory.peak <= 0.9 * memory * 2**30
        assert found.best.micro_batch >= before
        assert found.best.accumulation == math.ceil(2048 / found.best.micro_batch)
        before = found.best.micro_batch
    assert before > plan(replace(job, memory_gib=2.0)).best.micro_batch


def test_micro_batches_are_the_sizes_of_equal_parts():
    assert micro_batches(10) == [10, 5, 4, 3, 2, 1]


def test_where_replicas_do_not_fit_a_sharding_engine_is_proposed():
    # DDP's step needs 24 bytes of each of 11 million elements, FSDP2's an eighth, beside an allowance of 1.5 GiB.
    job = Question("resnet18", image_size=32, num_classes=10, batch_size=8, memory_gib=1.65, margin=0)
    found = plan(job)
    fits = {one.variant.name: one.fits for one in found.estimates}
    assert not fits["DDP"]
    assert fits["FSDP2"]
    assert found.best.variant.name != "DDP"


def test_where_nothing_fits_it_says_what_would(capsys):
    words = ["plan", "--model", "vit_b_16", "--gpus-per-node", "2", "--memory-gb", "1.8", "--batch-size", "2"]
    assert main(words) == 1
    output = capsys.readouterr().out
    assert "Nothing fits" in output
    assert "GiB" in output
    assert "--precision bf16" in output


def test_one_gpu_is_one_process():
    found = plan(Question(**SMALL, gpus_per_node=1))
    assert [one.variant.name for one in found.estimates] == ["DDP", "ZeRO-3, offload"]
    assert found.best.variant.name == "DDP"
    assert found.best.traffic == []
    assert "FSDP2" in found.unfit


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_s_settings_are_those_of_our_jsons(name):
    ours = next(variant for variant in variants() if variant.file == name)
    loaded = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    zero = loaded["zero_optimization"]
    assert loaded["communication_data_type"] == "fp32"
    assert (zero["reduce_bucket_size"], zero["overlap_comm"]) == (ours.reduce_bucket, ours.overlaps)
    assert zero["contiguous_gradients"]
    if zero["stage"] == 3:
        assert zero["stage3_prefetch_bucket_size"] == ours.prefetch
        assert zero["stage3_param_persistence_threshold"] == ours.persistent
        assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == ours.max_live
    assert ("offload_param" in zero) == ("offload_optimizer" in zero) == ours.offload


@pytest.mark.parametrize("variant", BY_NAME.values(), ids=BY_NAME)
def test_the_launch_line_is_one_that_accelerate_takes(variant):
    launch = pytest.importorskip("accelerate.commands.launch")
    job = Question(**SMALL, gpus_per_node=4)
    assert (ROOT / variant.config_file(job)).is_file()
    line = variant.launch_line(replace(job, nodes=2, batch_size=16), 2)
    line = line.replace("$NODE_RANK", "1").replace("$MASTER_ADDR", "host0").split()
    words = launch.launch_command_parser().parse_args(line[2:])
    assert (words.num_processes, words.num_machines, words.training_script) == (8, 2, "launch/train.py")
    rest = dict(zip(words.training_script_args[::2], words.training_script_args[1::2], strict=True))
    assert rest["--batch_size"] == "16"
    assert rest["--accumulation"] == "2"


HALVED = """
from dataclasses import dataclass

from robust_dist.engines.ddp import DDP
from robust_dist.engines.variant import Collective, Variant


@dataclass(frozen=True, kw_only=True)
class HalfVariant(Variant):
    def collectives(self, shapes, job, accumulation):
        yield Collective("gradients", "all-reduce", 2 * shapes.numel, job.world_size, 1, job.nodes > 1, True)


engine = DDP(kind="half_ddp", variants=(HalfVariant(name="DDP, half", file="half"),))
"""


def test_an_engine_from_another_package_stands_in_the_table_with_what_it_sends_and_how_it_starts(tmp_path):
    (tmp_path / "halved.py").write_text(HALVED)
    info = tmp_path / "halved-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halved\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robust_dist.engines]\nhalf = halved:engine\n")
    words = ["plan", "--model", "resnet8", "--image-size", "32", "--batch-size", "64", "--nodes", "2", "--json"]
    code = f"import sys; from robust_dist.cli import main; sys.exit(main({words}))"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    # A fresh process: torch 2.6 cannot import its compiler on the meta device, where the model is built.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = {one["engine"]: one for one in json.loads(done.stdout)["engines"]}
    assert {"DDP, half", "DDP", "FSDP2", "ZeRO-3"} <= set(found)
    sent = {name: found[name]["traffic"][0]["payload"] for name in ("DDP", "DDP, half")}
    assert sent["DDP"] == 2 * sent["DDP, half"]
    assert found["DDP, half"]["config"] == "configs/accelerate/multinode_half.yaml"


def test_json_holds_the_same_answer(capsys):
    words = ["plan", "--model", "resnet8", "--image-size", "32", "--num-classes", "10", "--nodes", "2", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    shapes = read_shapes(build_on_meta("resnet8", 10))
    assert found["parameters"] == shapes.numel == 75_290
    names = [one["engine"] for one in found["engines"]]
    assert found["best"] in names
    assert set(found["not_taken"]) == {*BY_NAME} - {found["best"]}
    ddp = found["engines"][names.index("DDP")]
    assert ddp["memory"]["held"]["state"] == 8 * 75_290 + 4 * len(shapes.parameters)


def test_a_recipe_gives_what_the_command_line_leaves_out(capsys):
    recipe = str(ROOT / "configs" / "recipes" / "cifar10_resnet34.yaml")
    words = ["plan", "--config", recipe, "--gpus-per-node", "4", "--num-classes", "10", "--json"]
    assert main(words) == 0
    question = json.loads(capsys.readouterr().out)["question"]
    wanted = {"model": "resnet34_cifar", "precision": "bf16", "batch_size": 128, "image_size": 32, "gpus_per_node": 4}
    assert {key: question[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet50x"], "resnet50"),
        ([], "--model or --config is needed"),
        (["--model", "resnet8", "--gpu", "h10"], "Did you mean h100"),
        (["--model", "resnet8", "--nodes", "0"], "--nodes=0"),
        (["--model", "resnet8", "--batch-size", "4"], "at least 8"),
        (["--model", "resnet8", "--micro-batch", "17"], "between 1 and 16"),
        (["--model", "resnet8", "--memory-gb", "-3"], "--memory-gb=-3.0"),
        (["--model", "resnet8", "--mfu", "2"], "--mfu=2.0"),
        (["--model", "resnet8", "--gpu", "t4", "--precision", "bf16"], "fp16"),
        (["--model", "vit_b_16", "--image-size", "100"], "--image-size"),
        (["--config", "no.yaml"], "no.yaml"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
