"""A measured rate and averaged weights are those of one process under every engine, on 2, 3 and 4 gloo ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.checkpoint import convert
from robust_dist.engines.deepspeed.check_checkpoint import CheckpointMismatchError
from robust_dist.engines.engine import EngineError
from robust_dist.optim import RAdaBeliefW
from tests.engines import deepspeed_course as ds
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.matrix import ENGINES as ROWS
from tests.ranks import run_ranks
from tests.versions import TORCH_2_7, needs_torch_2_7

SETTINGS = {"betas": (0.9, 0.9), "rate_guard": 1.0, "averaging": "schedule_free"}
STEPS, BATCH = 8, 12


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def batches():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(BATCH) // 3 % 2
    return [(torch.randn(BATCH, 4, generator=generator, dtype=torch.float64), labels) for _ in range(STEPS)]


def averaged_outputs(model, optimizer):
    optimizer.eval()
    with torch.no_grad():
        outputs = model(batches()[0][0].to(next(model.parameters()).dtype)).double()
    optimizer.train()
    return outputs


def rates(model, optimizer, rank=0, world=1, *, engine=None, parts=1, clip=None):
    """The rate of each step, and the average's outputs; every rank sees its part of each micro-batch.

    Where the optimizer is called, the average is evaluated in mid-run, too.

    Args:
        model: Trained, in its own dtype.
        optimizer: RAdaBeliefW.
        rank: Of `world` ranks.
        world: The number of ranks.
        engine: DeepSpeed's, which steps and clips by itself; None where the optimizer is called.
        parts: Micro-batches of a batch.
        clip: Largest norm of the gradient.
    """
    found = []
    for step, (x, y) in enumerate(batches()):
        if step == 5 and engine is None:
            averaged_outputs(model, optimizer)
        for index in range(parts):
            mine, labels = x[index::parts][rank::world], y[index::parts][rank::world]
            logits = model(mine.to(next(model.parameters()).dtype))
            loss = nn.functional.cross_entropy(logits if logits.dtype == x.dtype else logits.float(), labels)
            optimizer.observe(loss)
            if engine is not None:
                engine.backward(loss)
                engine.step()
            else:
                (loss / parts).backward()
        if engine is None and clip is not None:
            optimizer.observe_gradients()
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        if engine is None:
            optimizer.step()
            optimizer.zero_grad()
        found.append(optimizer.measured_rate)
    return found, averaged_outputs(model, optimizer)


def under_engines():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

    from robust_dist.engines.fsdp import check

    rank, world = dist.get_rank(), dist.get_world_size()

    def ddp():
        return nn.parallel.DistributedDataParallel(net())

    def fsdp1(*, orig, strategy=ShardingStrategy.FULL_SHARD, group=None):
        settings = {"sharding_strategy": strategy, "process_group": group}
        return FullyShardedDataParallel(net(), use_orig_params=orig, device_id=torch.device("cpu"), **settings)

    def hsdp1():
        shards, replicas = (
            [dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3)))
        )
        return fsdp1(orig=True, strategy=ShardingStrategy.HYBRID_SHARD, group=(shards[rank // 2], replicas[rank % 2]))

    def fsdp2(mesh=None):
        model = net()
        fully_shard(model[0], mesh=mesh or init_device_mesh("cpu", (world,)))
        fully_shard(model, mesh=mesh or init_device_mesh("cpu", (world,)))
        return model

    makers = {"ddp": ddp} | ({"fsdp2": fsdp2} if TORCH_2_7 else {})
    makers["fsdp1"] = lambda: fsdp1(orig=True)
    makers["fsdp1 flat"] = lambda: fsdp1(orig=False)
    makers["fsdp1, grad op"] = lambda: fsdp1(orig=True, strategy=ShardingStrategy.SHARD_GRAD_OP)
    if world == 4:
        makers["hsdp1"] = hsdp1
    if world == 4 and TORCH_2_7:
        makers["hsdp"] = lambda: fsdp2(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    found = {}
    for name, make in makers.items():
        model = make()
        optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
        if name == "fsdp1":
            nn.functional.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
            with pytest.raises(RuntimeError, match=r"flat shard of FSDP1.*measure_over"):
                optimizer.observe_gradients()
            optimizer.zero_grad()
            optimizer = RAdaBeliefW(model.parameters(), **SETTINGS)
        check(model, optimizer)
        found[name] = rates(model, optimizer, rank, world)
    return found


def sharded_in_two_ways():
    """Parts of a model that FSDP1 shards over different ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    from robust_dist.engines.fsdp import check

    def wrapped(module, strategy):
        return FullyShardedDataParallel(
            module, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=strategy
        )

    model = net()
    model[0] = wrapped(model[0], ShardingStrategy.NO_SHARD)
    model = wrapped(model, ShardingStrategy.FULL_SHARD)
    with pytest.raises(EngineError, match=r"FSDP1 shards parts of it over \[1, 2\] ranks; give all .* same sharding"):
        check(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    check(model, RAdaBeliefW(model.parameters()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_fsdp1_shards_in_two_ways_is_an_error_where_a_rate_is_measured():
    run_ranks(sharded_in_two_ways, 2)


def worlds(kinds_by_world):
    """Numbers of ranks, each with the cells of the matrix that its test holds."""
    return [
        pytest.param(world, marks=[pytest.mark.cell(kind, "measured rate", world) for kind in kinds if kind in ROWS])
        for world, kinds in kinds_by_world.items()
    ]


TORCH = ("DDP", "FSDP1", "FSDP1, use_orig_params=False", "FSDP2")


@pytest.mark.parametrize("world", worlds({2: TORCH, 3: TORCH, 4: (*TORCH, "HSDP")}))
def test_a_measured_rate_is_that_of_one_process(world):
    model = net()
    expected, outputs = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    for of_rank in run_ranks(under_engines, world):
        assert set(of_rank) >= {"ddp", "fsdp1", "fsdp1 flat", *["fsdp2"] * TORCH_2_7}
        for name, (found, theirs) in of_rank.items():
            assert found == pytest.approx(expected, rel=1e-6), name
            torch.testing.assert_close(theirs, outputs, rtol=1e-6, atol=1e-8, msg=name)


def gone_on(folder):
    """FSDP2: the rates and weights of a run that is saved while it is evaluated, and of one that goes on from there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    from robust_dist.engines.fsdp.state import set_state, state_of

    def started():
        model = net()
        fully_shard(model)
        return model, RAdaBeliefW(model.parameters(), **SETTINGS)

    model, optimizer = started()
    rates(model, optimizer, dist.get_rank(), dist.get_world_size())
    optimizer.eval()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    other, theirs = started()
    state = state_of(other, theirs)
    dcp.load(state, checkpoint_id=folder)
    set_state(other, theirs, state)
    found = []
    for of, by in ((model, optimizer), (other, theirs)):
        assert by.param_groups[0]["train_mode"] is False
        by.train()
        again, _ = rates(of, by, dist.get_rank(), dist.get_world_size())
        found.append((again, [p.to_local().tolist() for p in by.param_groups[0]["params"]]))
    return found


@needs_torch_2_7
def test_a_measured_rate_goes_on_bit_for_bit_under_fsdp2(tmp_path):
    for whole, resumed in run_ranks(gone_on, 2, str(tmp_path)):
        assert whole == resumed


def wider():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


def under_tensor_parallelism():
    """FSDP2 over pairs of ranks that share each layer, and then a replicated parameter whose gradient is partial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = wider()
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    found = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS), mesh["dp"].get_local_rank(), 2)

    param = nn.Parameter(distribute_tensor(torch.ones(5), mesh["tp"], [Replicate()]))
    optimizer = RAdaBeliefW([param], rate_guard=1.0)
    param.grad = DTensor.from_local(torch.arange(5.0) - 2 * mesh["tp"].get_local_rank(), mesh["tp"], [Partial()])
    optimizer.observe(1.0)
    optimizer.step()
    return found, optimizer.state_dict()["param_groups"][0]["rate_mean_gradient"]


@needs_torch_2_7
def test_each_element_counts_once_under_fsdp2_with_tensor_parallelism():
    model = wider()
    expected, outputs = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS))
    for (found, theirs), partial in run_ranks(under_tensor_parallelism, 4):
        assert found == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(theirs, outputs, rtol=1e-6, atol=1e-8)
        # |2 g - 2| of 0 to 4 is 2 + 0 + 2 + 4 + 6
        assert partial == pytest.approx(0.1 * 14, rel=1e-12)


CPU = {"device": "cpu"}
ZERO = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
    "ZeRO 2, offload": {"stage": 2, "offload_optimizer": CPU},
    "ZeRO 3, offload": {"stage": 3, "offload_optimizer": CPU},
    "ZeRO 3, parameter offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
BF16 = {f"{kind}, bf16": ZERO[kind] for kind in ("ZeRO 0", "ZeRO 2", "ZeRO 3", "ZeRO 3, parameter offload")}
# Another wrapper of DeepSpeed's; hundreds of log lines of memory make it slow.
SHORT = "ZeRO 1, bf16, gradients in fp32"
BF16[SHORT] = ZERO["ZeRO 1"]
# By their JSON's "optimizer".
NAMED = ("ZeRO 1", "ZeRO 3, offload")
PARTS, CLIP = 2, 0.3
# Gradients are rounded to 8 bits before they are summed: 3e-3 was seen. One rank too many: 1.
BF16_TOLERANCE = 1e-2


def deepspeed_engine(kind, settings=SETTINGS, **more):
    """A fresh engine with two param groups and small sub-groups, and its RAdaBeliefW."""
    import deepspeed

    bf16 = "bf16" in kind
    model = net(torch.float32)
    params = list(model.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": PARTS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"sub_group_size": 10, **{**ZERO, **BF16}[kind]},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "data_types": {"grad_accum_dtype": "fp32" if "in fp32" in kind else None},
        "steps_per_print": 10**9,
    }
    if kind in NAMED:
        named = {"optimizer": {"type": "RAdaBeliefW", "params": settings}}
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=config | more | named)[0]
    else:
        optimizer = RAdaBeliefW(groups, **settings)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config | more)[0]
    return engine, engine.basic_optimizer


def zero_rates(engine, optimizer):
    return rates(engine, optimizer, dist.get_rank(), dist.get_world_size(), engine=engine, parts=PARTS)


def assert_model_has_the_masters(engine):
    """What the forward pass uses is what the optimizer holds, on every rank; returns the masters."""
    import deepspeed

    masters = ds.whole(engine)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for name, param in engine.module.named_parameters():
            assert torch.equal(param, masters[name].to(param.dtype)), name
    return masters


def turns(engine, optimizer):
    """eval() and train() reach the model, and eval() changes it."""
    y = assert_model_has_the_masters(engine)
    optimizer.eval()
    x = assert_model_has_the_masters(engine)
    assert all(not torch.equal(x[name], y[name]) for name in y)
    optimizer.train()
    assert ds.distance(assert_model_has_the_masters(engine), y) < 1e-5


def goes_on(kind, folder, engine, optimizer):
    """A run that is saved while it is evaluated, and those that go on from there, also converted: the same bits."""
    stage = engine.zero_optimization_stage()
    optimizer.eval()
    engine.save_checkpoint(f"{folder}/{kind}", tag="evaluated")
    runs = [(engine, optimizer), deepspeed_engine(kind)]
    runs[1][0].load_checkpoint(f"{folder}/{kind}", tag="evaluated")
    if stage > 0:
        if dist.get_rank() == 0:
            convert(Path(f"{folder}/{kind}"), Path(f"{folder}/{kind} converted"), f"zero{stage}", dist.get_world_size())
        dist.barrier()
        runs.append(deepspeed_engine(kind))
        runs[2][0].load_checkpoint(f"{folder}/{kind} converted", tag="pytorch_model")
    found = []
    for of, by in runs:
        assert by.param_groups[0]["train_mode"] is False
        by.train()
        again, outputs = zero_rates(of, by)
        found.append((again, outputs.tolist(), {name: p.tolist() for name, p in ds.whole(of).items()}))
    assert all(one == found[0] for one in found), kind


def skips(kind):
    """A step that is skipped for an overflow changes neither what is measured nor the average."""
    (plain, plains), (engine, optimizer) = deepspeed_engine(kind), deepspeed_engine(kind)
    zero_rates(plain, plains)
    zero_rates(engine, optimizer)
    x, y = batches()[0]
    for _ in range(PARTS):
        loss = nn.functional.cross_entropy(engine(x[:4].bfloat16()).float(), y[:4]) * torch.inf
        optimizer.observe(1.0)
        engine.backward(loss)
        engine.step()
    assert engine.skipped_steps == 1
    (expected, outputs), (found, theirs) = zero_rates(plain, plains), zero_rates(engine, optimizer)
    assert found == expected, kind
    assert torch.equal(theirs, outputs), kind


def universal(stage, folder):
    """DeepSpeed's universal form carries what is measured, and is refused where it left averaging's z out."""
    kind, path, load = f"ZeRO {stage}", f"{folder}/universal {stage}", {"checkpoint": {"load_universal": True}}
    for settings in ({**SETTINGS, "averaging": None}, SETTINGS):
        tag = str(settings["averaging"])
        engine, optimizer = deepspeed_engine(kind, settings)
        zero_rates(engine, optimizer)
        engine.save_checkpoint(path, tag=tag)
        if dist.get_rank() == 0:
            ds.make_universal(f"{path}/{tag}", f"{path}/{tag}u", stage)
        dist.barrier()
        other, theirs = deepspeed_engine(kind, settings, **load)
        if settings["averaging"]:
            with pytest.raises(CheckpointMismatchError, match=rf"fast weights z: .*convert SRC DST --to zero{stage}"):
                other.load_checkpoint(path, tag=f"{tag}u")
        else:
            other.load_checkpoint(path, tag=f"{tag}u")
            assert zero_rates(other, theirs)[0] == pytest.approx(zero_rates(engine, optimizer)[0], rel=1e-6)


def refusals():
    """A step without a loss is an error on every rank."""
    engine, _ = deepspeed_engine("ZeRO 2")
    for _ in range(PARTS - 1):
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
    engine.backward(engine(torch.ones(2, 4)).sum())
    with pytest.raises(RuntimeError, match=r"rate_guard=1.0 needs the loss of every step: call optimizer.observe"):
        engine.step()


def observes_once():
    """In float32 ZeRO 0 leaves the gradients where the program can observe them too: they count once."""
    found = []
    for observes in (False, True):
        engine, optimizer = deepspeed_engine("ZeRO 0")
        x, y = next(iter(batches()))
        for index in range(PARTS):
            mine = slice(dist.get_rank() * PARTS + index, None, dist.get_world_size() * PARTS)
            loss = nn.functional.cross_entropy(engine(x[mine].float()), y[mine])
            optimizer.observe(loss)
            engine.backward(loss)
            if observes and index == PARTS - 1:
                optimizer.observe_gradients()
            engine.step()
        found.append(optimizer.measured_rate)
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def under_zero(folder):
    from robust_dist.engines.deepspeed import register

    get_ready()
    register()
    found = {}
    for kind in ZERO if dist.get_world_size() > 2 else {**ZERO, **BF16}:
        engine, optimizer = deepspeed_engine(kind)
        found[kind] = zero_rates(engine, optimizer)
        turns(engine, optimizer)
        if dist.get_world_size() == 2 and kind != SHORT:
            goes_on(kind, folder, engine, optimizer)
    if dist.get_world_size() == 2:
        for kind in BF16:
            if kind != SHORT:
                skips(kind)
        for stage in (2, 3):
            universal(stage, folder)
        observes_once()
        refusals()
    return found


@pytest.mark.parametrize("world", worlds({2: {**ZERO, **BF16}, 3: ZERO}))
def test_under_deepspeed_rate_and_average_are_those_of_one_process(world, tmp_path):
    """With clipping, micro-batches and offload; and a checkpoint goes on bit for bit."""
    pytest.importorskip("deepspeed")
    model = net(torch.float32)
    expected, outputs = rates(model, RAdaBeliefW(model.parameters(), **SETTINGS), parts=PARTS, clip=CLIP)
    for of_rank in run_ranks(under_zero, world, str(tmp_path), timeout=300.0):
        assert set(of_rank) >= set(ZERO)
        for kind, (found, theirs) in of_rank.items():
            bf16 = "bf16" in kind
            assert found == pytest.approx(expected, rel=BF16_TOLERANCE if bf16 else 1e-6), kind
            torch.testing.assert_close(theirs, outputs, rtol=0.0, atol=0.1 if bf16 else 1e-5, msg=kind)
