import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from robust_dist.engines.deepspeed import check_config, config, register
from robust_dist.engines.deepspeed.config import normalized
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule
from tests.forked import python
from tests.schedule.toys import make

AUTO = {
    "optimizer": {"type": "RAdaBeliefW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "train_batch_size": "auto",
}
GIVEN = {
    "optimizer": {"type": "RAdaBeliefW", "params": {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.01}},
    "scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": 9, "warmup_num_steps": 2}},
    "zero_optimization": {"stage": 2},
    "train_batch_size": 8,
}
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.fixture(autouse=True)
def names_for_this_test(monkeypatch):
    # Undone afterwards: registration belongs to a process that uses DeepSpeed.
    monkeypatch.setattr(torch.optim, "RAdaBeliefW", None, raising=False)
    monkeypatch.setattr(torch.optim.lr_scheduler, "RobustSchedule", None, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    register()


def params(section, **more):
    return {section: {**GIVEN[section], "params": {**GIVEN[section]["params"], **more}}}


def test_a_right_json_passes_as_a_dict_and_as_a_file_and_full_of_auto_where_somebody_fills_it_in(tmp_path):
    check_config(GIVEN)
    check_config(AUTO, auto=True)
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(GIVEN))
    check_config(path)
    check_config(str(path))
    check_config({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "train_batch_size": 8})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_json_of_this_repository_passes(path):
    check_config(path, auto=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"type": "RAdaBelifW"}}, r"optimizer.type='RAdaBelifW'; there is no .* mean 'RAdaBeliefW'"),
        ({"optimizer": {"type": "radabeliefw"}}, r"optimizer.type='radabeliefw'; .* mean 'RAdaBeliefW'"),
        ({"optimizer": {"type": "AdaBelief"}}, r"optimizer.type='AdaBelief'; .* mean 'RAdaBeliefW'"),
        ({"optimizer": {"type": "RobustSchedule"}}, r"optimizer.type='RobustSchedule'; .* mean 'RAdaBeliefW'"),
        ({"optimizer": {"type": 3}}, r"optimizer.type=3; give a name"),
        ({"optimizer": "RAdaBeliefW"}, r"optimizer='RAdaBeliefW'; write \{"),
        ({"optimizer": {"type": "RAdaBeliefW", "params": [0.1]}}, r"optimizer.params=\[0.1\]; write an object"),
        ({"scheduler": {"type": "RobustScheduler"}}, r"scheduler.type='RobustScheduler'; .* mean 'RobustSchedule'"),
        ({"scheduler": {"type": "WeightDecaySwitch"}}, r"scheduler.type='WeightDecaySwitch'; .* 'RobustSchedule'"),
        (params("optimizer", weight_decy=0.1), r"params.weight_decy=0.1; .* did you mean 'weight_decay'"),
        (params("optimizer", momentum=0.9), r"no parameter 'momentum': drop it; there are lr, betas"),
        (params("optimizer", adam_w_mode=False), r"adam_w_mode=False; .* decay is always decoupled"),
        (params("optimizer", bias_correction=False), r"bias_correction=False; .* always corrects the bias"),
        (params("optimizer", amsgrad=True), r"amsgrad=True; .* no maximum of the second moment"),
        (params("optimizer", fp32_optimizer_states=False), r"fp32_optimizer_states=False; .*exp_avg_dtype"),
        (params("optimizer", max_grad_norm=1.0), r"max_grad_norm=1.0; .* \"gradient_clipping\" at the top level"),
        (params("optimizer", lr="auto"), r"optimizer.params.lr='auto'; .* give the value"),
        (params("optimizer", lr="0.1"), r"lr must be a number, got '0.1'"),
        (params("optimizer", lr=-1), r"lr must be a finite number of at least 0, got -1"),
        (params("optimizer", betas=[0.9]), r"betas must be a pair"),
        (params("scheduler", warmup_step=1), r"params.warmup_step=1; .* did you mean 'warmup_steps'"),
        (params("scheduler", decay_fraction=1), r"no parameter 'decay_fraction': drop it; there are total_steps"),
        (params("scheduler", warmup_num_steps="2"), r"warmup_num_steps='2' is a str"),
        (params("scheduler", warmup_num_steps=1.5), r"warmup_num_steps=1.5 is a float"),
        (params("scheduler", total_num_steps=0), r"total_num_steps=0; .* below 1"),
        (params("scheduler", warmup_num_steps=10), r"warmup_num_steps=10 is above"),
        (params("scheduler", weight_decay_off_at=2), r"weight_decay_off_at=2.0 is out of range"),
        (params("scheduler", warmup_type="cosine"), r"warmup_type='cosine' is unknown"),
        (params("scheduler", total_steps=9), r"total_steps=9 and total_num_steps=9 are the same setting"),
        ({"scheduler": {"type": "RobustSchedule", "params": {}}}, r"total_steps is missing"),
        ({"train_batch_size": "auto"}, r"train_batch_size='auto'; .* give the value"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"zero_optimization.reduce_bucket_size='auto'"),
        ({"zero_optimization": {**OFFLOAD, "zenflow": {"topk_ratio": 0.1}}}, r"zero_optimization.zenflow=.* own Adam"),
    ],
)
def test_a_wrong_json_is_an_error_that_names_setting_value_and_what_to_change(more, message):
    with pytest.raises(ValueError, match=f"^rank 0: the DeepSpeed JSON has .*{message}"):
        check_config({**GIVEN, **more})


CONSTANT = {"scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": 9, "decay": "constant"}}}
NVME = {"device": "nvme", "nvme_path": "/tmp"}
BEYOND = [
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}},
        "zero_optimization.offload_optimizer.device='nvme'",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "zero_optimization.offload_param.device='nvme'"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_optimization.zero_hpz_partition_size=2"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "zero_optimization.mics_shard_size=1"),
    ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "zero_optimization.elastic_checkpoint=True"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2"),
    ({"data_parallel_size": 1, "sequence_parallel_size": 2}, "sequence_parallel_size=2"),
    ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled=True"),
]


@pytest.mark.parametrize(("more", "named"), BEYOND, ids=[named for _, named in BEYOND])
@pytest.mark.parametrize("option", [{"averaging": "schedule_free"}, {"rate_guard": 2}])
def test_an_engine_that_an_option_does_not_run_with_is_an_error(more, named, option):
    ((name, value),) = option.items()
    wanted = rf"{re.escape(named)}; RAdaBeliefW's {name}={value!r} cannot run with it: leave that out, or leave {name} "
    with pytest.raises(ValueError, match=wanted):
        check_config({**GIVEN, **CONSTANT, **more, **params("optimizer", **option)})
    check_config({**GIVEN, **CONSTANT, **more})


def test_a_measured_rate_does_not_run_with_autocast_in_float16():
    for dtype in ("float16", "fp16", "torch.float16"):
        autocast = {"torch_autocast": {"enabled": True, "dtype": dtype}}
        with pytest.raises(ValueError, match=rf"torch_autocast.dtype='{dtype}'; RAdaBeliefW's rate_guard=2 cannot run"):
            check_config({**GIVEN, **CONSTANT, **autocast, **params("optimizer", rate_guard=2)})
        check_config({**GIVEN, **CONSTANT, **autocast, **params("optimizer", averaging="schedule_free")})
        autocast["torch_autocast"]["enabled"] = False
        check_config({**GIVEN, **CONSTANT, **autocast, **params("optimizer", rate_guard=2)})
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    check_config({**GIVEN, **CONSTANT, **autocast, **params("optimizer", rate_guard=2)})


def test_all_that_options_do_not_run_with_is_in_one_message():
    zero = {"stage": 3, "offload_param": NVME, "zero_hpz_partition_size": 2}
    more = {"zero_optimization": zero, "torch_autocast": {"enabled": True, "dtype": "fp16"}}
    options = {"averaging": "schedule_free", "rate_guard": 1}
    with pytest.raises(ValueError, match=r"(?s)device='nvme'.*hpz_partition_size=2.*autocast.*takes no learning rate"):
        check_config({**GIVEN, **more, **params("optimizer", **options)})


SCHEDULES = [
    ({"type": "WarmupCosineLR", "params": {}}, "scheduler.type='WarmupCosineLR'"),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, "scheduler.type='WarmupLR'"),
    ({"type": "RobustSchedule", "params": {"total_num_steps": "auto"}}, "scheduler.params={'total_num_steps': 'auto'}"),
    (
        {"type": "RobustSchedule", "params": {"total_steps": 9, "decay": "constant", "warmup_steps": 2}},
        "scheduler.params=",
    ),
]


@pytest.mark.parametrize(("scheduler", "named"), SCHEDULES)
def test_a_schedule_of_rates_with_an_optimizer_that_takes_none_is_an_error(scheduler, named):
    wanted = rf"{re.escape(named)}.*; RAdaBeliefW's rate_guard=1 takes no learning rate.*\"decay\": \"constant\""
    with pytest.raises(ValueError, match=wanted):
        check_config({**GIVEN, "scheduler": scheduler, **params("optimizer", rate_guard=1)}, auto=True)
    check_config({**GIVEN, "scheduler": scheduler, **params("optimizer", rate_guard=2)}, auto=True)


@pytest.mark.parametrize(
    "right", [{}, {"total_num_steps": "auto", "decay": "constant", "warmup_num_steps": "auto", "warmup_max_lr": "auto"}]
)
def test_a_schedule_that_leaves_the_rate_alone_passes(right):
    scheduler = {"type": "RobustSchedule", "params": right} if right else {}
    check_config({**GIVEN, "scheduler": scheduler, **params("optimizer", rate_guard=1)}, auto=True)


def test_a_constant_without_a_measured_rate_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer.params.rate_constant=2.0 has no effect without rate_guard"):
        check_config({**GIVEN, **params("optimizer", rate_constant=2.0)})
    check_config({**GIVEN, **CONSTANT, **params("optimizer", rate_constant=2.0, rate_guard=1)})


def test_what_asks_an_adam_for_what_is_done_anyway_means_nothing_and_passes():
    idle = {"torch_adam": True, "adam_w_mode": True, "bias_correction": True, "amsgrad": False, "set_grad_none": True}
    check_config({**GIVEN, **params("optimizer", **idle, eps=1e-8, betas=[0.9, 0.999])})
    assert normalized("optimizer", {"lr": 0.1, **idle}) == {"lr": 0.1}


def test_step_counts_may_be_whole_floats():
    counts = {"total_num_steps": 1e4, "warmup_num_steps": 1000.0, "last_batch_iteration": -1.0}
    check_config({**GIVEN, **params("scheduler", **counts)})
    check_config(
        {**GIVEN, "scheduler": {"type": "RobustSchedule", "params": {"total_steps": 1e4, "warmup_steps": 2.0}}}
    )
    optimizer = RAdaBeliefW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.RobustSchedule(optimizer, total_num_steps=1e4, warmup_num_steps=1000.0)
    assert isinstance(schedule, RobustSchedule)
    curve = schedule.curve
    assert (curve.total_steps, curve.warmup_steps) == (10_000, 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": None}, r"total_steps is missing"),
        ({"warmup_num_step": 3}, r"no parameter 'warmup_num_step'; .*warmup_num_steps"),
        ({"total_num_steps": 10}, r"total_steps=10 and total_num_steps=10 are the same"),
        ({"warmup_steps": 2, "warmup_num_steps": 2}, r"warmup_steps=2 and warmup_num_steps=2"),
        ({"warmup_num_steps": 12}, r"warmup_num_steps=12"),
        ({"warmup_num_steps": 2, "warmup_type": "cubic"}, r"warmup_type='cubic' .*'log', 'linear'"),
        ({"warmup_min_lr": 0.1, "warmup_min_ratio": 0.1}, r"warmup_min_lr=0.1 and warmup_min_ratio"),
        ({"warmup_min_lr": -1.0}, r"warmup_min_lr=-1.0"),
        ({"warmup_max_lr": [0.1, 0.2]}, r"2 values for 3 param groups"),
        ({"warmup_max_lr": math.nan}, r"warmup_max_lr=nan"),
        ({"cos_min_ratio": 1.5}, r"min_lr_ratio=1.5"),
        ({"warmup_max_lr": 0.3, "weight_decay_off_at": 2}, r"off_at=2"),
    ],
)
def test_a_wrong_setting_of_a_schedule_made_by_name_names_it_and_touches_nothing(settings, message):
    optimizer = make()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        torch.optim.lr_scheduler.RobustSchedule(optimizer, **({"total_steps": 10} | settings))
    assert [dict(group) for group in optimizer.param_groups] == before


WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 2, "warmup_type": "linear"}
COSINE = {"total_num_steps": 9, "warmup_min_ratio": 0.1, "warmup_num_steps": 2, "cos_min_ratio": 0.01}


def test_the_parameters_of_deepspeeds_warmups_pass_and_without_a_total_the_message_says_what_to_write():
    for right in (WARMUP | {"total_num_steps": 9}, COSINE):
        check_config({**GIVEN, "scheduler": {"type": "RobustSchedule", "params": right}})
    without = {**GIVEN, "scheduler": {"type": "RobustSchedule", "params": WARMUP}}
    check_config(
        without | {"scheduler": {"type": "RobustSchedule", "params": WARMUP | {"total_num_steps": "auto"}}}, auto=True
    )
    for auto in (False, True):
        with pytest.raises(
            ValueError, match=r'write "total_num_steps": "auto" where Trainer or Accelerate fills it in'
        ):
            check_config(without, auto=auto)


def test_an_auto_that_nobody_fills_in_is_an_error_even_under_accelerate():
    for section, name in (("scheduler", "total_steps"), ("scheduler", "cos_min_ratio"), ("optimizer", "seed")):
        with pytest.raises(ValueError, match=f"{section}.params.{name}='auto'; nobody fills in"):
            check_config({**GIVEN, **params(section, **{name: "auto"})}, auto=True)


def test_everything_that_is_wrong_is_in_one_message():
    one_cycle = {"cycle_min_lr": 0.0, "cycle_max_lr": 0.1, "decay_step_size": 2, "cycle_momentum": False}
    wrong = {
        **params("optimizer", freeze_step=400, cuda_aware=True, amsgrad=True, lr="0.1", betas=[2, 0.9]),
        "scheduler": {"type": "RobustSchedule", "params": {**one_cycle, "warmup_max_lr": -1}},
        "train_batch_size": "auto",
    }
    with pytest.raises(ValueError, match="rank 0: the DeepSpeed JSON has ") as caught:
        check_config({**GIVEN, **wrong})
    text = str(caught.value)
    for part in (
        *one_cycle,
        "freeze_step",
        "cuda_aware",
        "amsgrad=True",
        "lr='0.1'",
        "betas=[2, 0.9]",
        "total_num_steps",
    ):
        assert part in text
    assert "warmup_max_lr=-1" in text
    assert "train_batch_size='auto'" in text
    with pytest.raises(ValueError, match=r"(?s)cos_min_ratio=3.*warmup_num_steps=200"):
        check_config({**GIVEN, **params("scheduler", warmup_num_steps=200, cos_min_ratio=3)})


@pytest.mark.parametrize("nothing", [None, {}, {"type": None}, {"type": None, "params": {"lr": "0.1"}}])
def test_a_json_that_names_neither_passes(nothing):
    check_config({"optimizer": nothing, "scheduler": nothing, "train_batch_size": 8})
    check_config({"optimizr": {"type": "AdamW"}, "train_batch_size": 8})


@pytest.mark.parametrize(("name", "near"), [("optimzer", "optimizer"), ("Optimizer", "optimizer"), ("schedule", None)])
def test_a_misspelt_section_which_deepspeed_ignores_is_an_error(name, near):
    config = {name: GIVEN["optimizer"], "train_batch_size": 8}
    with pytest.raises(ValueError, match=rf"has {name}=.* it is called '{near or 'scheduler'}'"):
        check_config(config)


def test_an_offload_that_would_step_with_another_optimizer_is_an_error():
    client = {"zero_optimization": OFFLOAD, "train_batch_size": 8}
    with pytest.raises(ValueError, match=r"zero_force_ds_cpu_optimizer=True; .* set it to false, or name"):
        check_config(client)
    check_config(client | {"zero_force_ds_cpu_optimizer": False})
    check_config(GIVEN | {"zero_optimization": OFFLOAD})
    for wrong in ({"ratio": 0.5}, {"super_offload": True}):
        offload = {"stage": 3, "offload_optimizer": {"device": "cpu", **wrong}}
        with pytest.raises(ValueError, match=f"offload_optimizer.{next(iter(wrong))}="):
            check_config(GIVEN | {"zero_optimization": offload})


@pytest.mark.parametrize(("cores", "level"), [(1, "INFO"), (16, "WARNING")])
def test_an_offload_says_how_many_threads_step(monkeypatch, caplog, cores, level):
    monkeypatch.setattr(config, "usable_cores", lambda: cores)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    caplog.set_level("INFO", logger=config.__name__)
    check_config(GIVEN)
    assert caplog.records == []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check_config(GIVEN | {"zero_optimization": OFFLOAD})
    finally:
        torch.set_num_threads(before)
    (record,) = caplog.records
    assert record.levelname == level
    assert f"with 1 threads, this host has {cores} cores" in record.getMessage()


def test_a_forgotten_registration_is_an_error(monkeypatch):
    monkeypatch.delattr(torch.optim, "RAdaBeliefW")
    with pytest.raises(ValueError, match=r"type='RAdaBeliefW'; call robust_dist.register"):
        check_config(GIVEN)


def test_a_file_that_is_no_json_object_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "config.json is not JSON"), ("[1]", "config.json contains a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            check_config(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        check_config(tmp_path / "nothing.json")


def printed(code):
    status, said = python("-c", code)
    assert status == 0, said
    return said.split()


def test_registering_is_asked_for_cheap_and_may_be_repeated_in_any_order_with_the_import():
    pytest.importorskip("deepspeed")
    code = """
import sys, torch
import robust_dist.engines, robust_dist.engines.deepspeed
print(hasattr(torch.optim, "RAdaBeliefW"), hasattr(torch.optim.lr_scheduler, "RobustSchedule"))
import robust_dist.autoregister
from robust_dist.engines.deepspeed import register
register()
print(torch.optim.RAdaBeliefW.__name__, torch.optim.lr_scheduler.RobustSchedule.__name__, "deepspeed" in sys.modules)
print(len([finder for finder in sys.meta_path if type(finder).__module__.startswith("robust_dist")]))
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as supported
register()
print(supported.count(torch.optim.RAdaBeliefW))
"""
    words = ["False", "False", "RAdaBeliefW", "DeepSpeedRobustSchedule", "False", "1", "1"]
    assert [word for word in printed(code) if word in {*words, "0", "2", "True"}] == words


def test_everything_that_is_wrapped_is_still_there_in_this_deepspeed_and_wrapped_once():
    pytest.importorskip("deepspeed")
    code = """
from robust_dist import register
import deepspeed
for _ in range(2):
    register()
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
for method in (
    DeepSpeedEngine._do_sanity_check,
    DeepSpeedEngine.load_checkpoint,
    DeepSpeedEngine._configure_optimizer,
    DeepSpeedEngine.clip_fp32_gradients,
    BF16_Optimizer.step,
    DeepSpeedZeroOptimizer.step,
    FP16_UnfusedOptimizer.step,
    DeepSpeedZeroOptimizer_Stage3.step,
    FP16_UnfusedOptimizer.initialize_optimizer_states,
    DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3,
):
    print("wrapped", method.patched_by_robust_dist, getattr(method.__wrapped__, "patched_by_robust_dist", False))
"""
    words = " ".join(printed(code))
    assert words.count("wrapped True False") == 10, words
