"""`launch/train.py` under every configs/accelerate/*.yaml, with many runs in one launch of gloo ranks.

Each run's environment is the one `accelerate launch --config_file` makes from the file, without starting processes.
"""

import contextlib
import functools
import io
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = ["--model.name", "resnet8", "--model.options", "{stem_stride: 2}"]
WORDS += ["--batch_size", "128", "--epochs", "1", "--optimizer.lr", "0.05"]
WORDS += ["--tracking.trackers", "[]", "--tracking.progress", "false", "--timeout_seconds", "60"]
# 12 optimizer steps, the switch at 9.
WORDS += ["--checkpoint.every_steps", "5", "--optimizer.no_decay", "[bias, norm]", "--optimizer.clip_norm", "1"]
_OURS = re.compile("^(ACCELERATE_|FSDP_|PARALLELISM_|DEEPSPEED_)")


def _forget_engine() -> None:
    for key in [key for key in os.environ if _OURS.match(key)]:
        del os.environ[key]


@functools.cache
def environment(name: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file configs/accelerate/NAME.yaml` gives its processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    made: dict[str, str] = {}
    before, starters = dict(os.environ), (launch.multi_gpu_launcher, launch.deepspeed_launcher)
    launch.multi_gpu_launcher = lambda words: made.update(prepare_multi_gpu_env(words))
    launch.deepspeed_launcher = lambda words: made.update(prepare_deepspeed_cmd_env(words)[1])
    try:
        _forget_engine()
        config = str(ROOT / "configs" / "accelerate" / f"{name}.yaml")
        launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", config, "script.py"]))
    finally:
        launch.multi_gpu_launcher, launch.deepspeed_launcher = starters
        os.environ.clear()
        os.environ.update(before)
    return {key: value for key, value in made.items() if _OURS.match(key)}


@contextlib.contextmanager
def engine(name: str):
    """This process, as `accelerate launch` would start it with this config, in the existing group."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from tests.engines.deepspeed_on_cpu import get_ready
    from tests.engines.fsdp_on_cpu import pretend_fsdp_runs_on_cpus

    before = dict(os.environ)
    made = environment(name)
    _forget_engine()
    os.environ.update(made)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        get_ready()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    # The group outlives the run: DeepSpeed keeps it for the next one.
    destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda self, group=None: None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_fsdp_runs_on_cpus()
    os.chdir(ROOT)
    try:
        yield
    finally:
        PartialState.destroy_process_group = destroy
        os.environ.clear()
        os.environ.update(before)


def train_under(name: str, run_dir: str, *words: str, deepspeed_json: Path | None = None) -> str:
    """Train; returns the output, or the error shown to the user."""
    from robust_dist.train.main import main

    out = io.StringIO()
    with engine(name), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if deepspeed_json is not None:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(deepspeed_json)
        try:
            main([*WORDS, "--run_dir", run_dir, *words])
        except SystemExit as stop:
            # 2: a user error, 75: stopped by a signal; after it was printed.
            if stop.code not in (2, 75):
                raise AssertionError(out.getvalue()) from stop
    return out.getvalue()
