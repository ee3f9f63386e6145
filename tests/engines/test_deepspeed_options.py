"""What averaging and a measured rate do not run with is an error on every rank before DeepSpeed's first step."""

import pytest
import torch.distributed as dist
from torch import nn

from robust_dist.optim import RAdaBeliefW
from tests.engines.deepspeed_on_cpu import get_ready
from tests.engines.test_deepspeed_config import BEYOND
from tests.ranks import run_ranks

pytest.importorskip("deepspeed")
OPTIONS = {"averaging": "schedule_free", "rate_guard": 1.0}
FLOAT16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
JSON = {"train_batch_size": 4, "steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False}


class ModelParallel:
    """As Megatron's `mpu`: both ranks are one model's."""

    def __init__(self):
        self.alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_world_size(self):
        return 2

    def get_model_parallel_group(self):
        return dist.group.WORLD

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_group(self):
        return self.alone


def started(options=OPTIONS, model=None, config=None, **more):
    import deepspeed

    model = model() if model else nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = RAdaBeliefW(model.parameters(), **options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=JSON | (config or {}), **more)[0]


def with_experts():
    from deepspeed.moe.layer import MoE

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(4, nn.Linear(4, 4), num_experts=2)

    return Experts()


def in_two_stages():
    from deepspeed.pipe import PipelineModule

    return PipelineModule([nn.Linear(4, 4), nn.Linear(4, 2)], num_stages=2, loss_fn=nn.MSELoss())


def refused(match, *args, **kwargs):
    """Whether each option alone, and both, are refused in these words."""
    for name in OPTIONS:
        with pytest.raises(ValueError, match=rf"rank {dist.get_rank()}: .*{name}.*{match}|{match}.*{name}"):
            started({name: OPTIONS[name]}, *args, **kwargs)


def under_two_ranks():
    from robust_dist.engines.deepspeed import register

    get_ready()
    register()
    for config, named in BEYOND:
        # The one keeps its mesh for all later engines, and this DeepSpeed has no other any more.
        if not named.startswith(("sequence_parallel_size", "zero_optimization.mics")):
            refused(named.partition("=")[0], config=config)
    with pytest.raises(ValueError, match=r"scheduler.type='WarmupLR'; RAdaBeliefW's rate_guard=1 takes no learning"):
        started(config={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}})
    cosine = {"scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": 9}}}
    with pytest.raises(ValueError, match=r"scheduler.params=.*'total_num_steps': 9.*rate_guard=1 takes no learning"):
        started(config=cosine)
    refused("experts in parallel", model=with_experts)
    refused("mp_world_size=2", mpu=ModelParallel())
    refused("pipeline parallelism", model=in_two_stages)


def switched_by_a_load(folder):
    from robust_dist.engines.deepspeed import register

    get_ready()
    register()
    zero = {"zero_optimization": {"stage": 1}}
    for name in OPTIONS:
        engine, plain = started({name: OPTIONS[name]}, config=zero), started({}, config=zero)
        engine.save_checkpoint(folder, tag=name)
        with pytest.warns(
            UserWarning, match=f"the loaded state has {name}={OPTIONS[name]!r}.*was made with {name}=None"
        ):
            plain.load_checkpoint(folder, tag=name)
        assert plain.basic_optimizer.param_groups[0][name] == OPTIONS[name]
    # The last: DeepSpeed keeps its autocast for all later engines.
    engine = started({}, config=zero | FLOAT16)
    with (
        pytest.warns(UserWarning, match="the loaded state has rate_guard"),
        pytest.raises(ValueError, match=r"torch_autocast.dtype='float16'; .*rate_guard=1.0 cannot run with it"),
    ):
        engine.load_checkpoint(folder, tag="rate_guard")


def test_what_the_options_do_not_run_with_is_an_error_before_the_first_step():
    run_ranks(under_two_ranks, 2)


def test_what_a_checkpoint_switches_is_said_and_checked(tmp_path):
    run_ranks(switched_by_a_load, 2, str(tmp_path))
