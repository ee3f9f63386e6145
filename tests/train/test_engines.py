"""Every file in configs/accelerate trains a recipe, resumes bit for bit, and resumes another engine's run."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from robust_dist.checkpoint import verify
from robust_dist.engines.engine import engines
from robust_dist.train import checkpoints as run_checkpoints
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks
from tests.small_disk import can_mount, small_disk
from tests.train.launching import metrics
from tests.train.under_engines import ROOT, train_under
from tests.versions import TORCH_2_7

pytest.importorskip("deepspeed")
# ZeRO last: DeepSpeed changes functions of torch when it is first used.
ON_TWO = ["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
HANDED_ON = [("fsdp2", "zero3"), ("zero3", "fsdp1"), ("fsdp1", "zero1"), ("zero1", "ddp")]
STOPPED = ["fsdp2", "zero2"]
# optimizer.lr=auto: a measured rate and averaged weights.
MEASURED = ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
AUTO = ("--optimizer.lr", "auto", "--schedule.name", "constant")
REFUSING = ["ddp", "zero2", "zero3"]
STEP, TOTAL = 10, 12


def rows(folder):
    """What a run recorded, without the figures that are measured."""
    return metrics(Path(folder))


@contextlib.contextmanager
def expecting():
    """The number of bytes that all ranks expected to write into a checkpoint."""
    real, needs = run_checkpoints.checkpoint_bytes, []

    def noted(*args, **options):
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, real(*args, **options))
        needs.extend(gathered)
        return gathered[dist.get_rank()]

    run_checkpoints.checkpoint_bytes = noted
    try:
        yield needs
    finally:
        run_checkpoints.checkpoint_bytes = real


def checkpoints(folder):
    return sorted(path.name for path in Path(folder, "checkpoints").iterdir())


def on_first_rank(action):
    """Let one rank change files once all have read them, while the others wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def cut_back(folder):
    """Turn the run into one that was killed between step 10 and its end."""
    shutil.rmtree(Path(folder, "checkpoints", f"step-{TOTAL:08d}"))
    Path(folder, "metrics.jsonl").unlink()


def close(mine, theirs):
    assert len(mine) == len(theirs) == 1
    assert mine[0].keys() == theirs[0].keys()
    for key, value in theirs[0].items():
        # The accuracy is at chance level, where rounding decides between classes: one of a class's 36 images.
        slack = 0.03 if "accuracy" in key else 0.0
        assert mine[0][key] == pytest.approx(value, rel=2e-4, abs=slack), (key, mine, theirs)


def assert_room(run, needs):
    """The saved folder has a checkpoint, and with each rank's allowance for small files the estimate is not far
    above."""
    files = (path for path in Path(f"{run}/checkpoints/step-{TOTAL:08d}").rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    assert size <= sum(needs), needs
    assert sum(needs) - len(needs) * 2**20 <= 1.6 * size, (needs, size)


def trains(name, folder):
    with expecting() as needs:
        out = train_under(name, f"{folder}/{name}")
    assert_room(f"{folder}/{name}", needs)
    assert checkpoints(f"{folder}/{name}") == [f"step-{STEP:08d}", f"step-{TOTAL:08d}"], out
    assert rows(f"{folder}/{name}")[0]["weight_decay"] == 0.0
    assert dist.get_rank() or "checkpoints: 3 in the background" in out, out
    close(rows(f"{folder}/{name}"), rows(f"{folder}/ddp"))


def measures(name, folder):
    """With a measured rate and averaged weights: the figures of DDP, and resuming bit for bit."""
    run = f"{folder}/{name}-auto"
    with expecting() as needs:
        out = train_under(name, run, *AUTO)
    whole = rows(run)
    assert whole, out
    assert_room(run, needs)
    assert whole[0]["lr"] not in (0.0, 0.05)
    close(whole, rows(f"{folder}/ddp-auto"))
    on_first_rank(lambda: cut_back(run))
    out = train_under(name, run, *AUTO)
    assert dist.get_rank() or f"at step {STEP} of {TOTAL}" in out, out
    assert rows(run) == whole


def goes_on(name, folder, config=None):
    whole = rows(f"{folder}/{name}")
    on_first_rank(lambda: cut_back(f"{folder}/{name}"))
    out = train_under(config or name, f"{folder}/{name}")
    assert dist.get_rank() or f"at step {STEP} of {TOTAL}" in out, out
    assert rows(f"{folder}/{name}") == whole


def stops(name, folder):
    """Only rank 1 is signalled; all stop at the same step, staged checkpoints are completed, and the run resumes
    exactly."""
    run, words = f"{folder}/{name}-stopped", ("--checkpoint.every_steps", "2")
    if dist.get_rank() == 1:
        threading.Thread(target=signal_after, args=(run, 2), daemon=True).start()
    out = train_under(name, run, *words)
    note = json.loads(Path(run, "stopped.json").read_text())
    assert dist.get_rank() or f"stopped by SIGUSR1 at step {note['step']} of {TOTAL}" in out, out
    assert 2 < note["step"] < TOTAL
    assert checkpoints(run)[-1] == Path(note["checkpoint"]).name == f"step-{note['step']:08d}"
    out = train_under(name, run, *words)
    assert dist.get_rank() or f"at step {note['step']} of {TOTAL}" in out, out
    assert rows(run) == rows(f"{folder}/{name}")


def full_disk(name, folder):
    """A rank's thread runs out of space: one error on all ranks, and every existing checkpoint is complete."""
    place = Path(f"{folder}/{name}-disk")
    with contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(small_disk(place, "9m")))
        words = ("--checkpoint.every_steps", "1", "--checkpoint.keep", "100")
        out = train_under(name, str(place / "run"), *words)
        assert dist.get_rank() or "could not be written: No space left on device" in out, out
        # The first rank removes what was half-written while the others exit.
        dist.barrier()
        steps = [verify(path).step for path in sorted(Path(place, "run", "checkpoints").iterdir())]
        assert steps == [*range(1, len(steps) + 1)]
        assert 1 < len(steps) < TOTAL
        dist.barrier()


def one_rank_cannot_write(name, folder):
    """Only rank 1 fails, in the middle of a save that all wait for: one error on all ranks, long before a timeout."""
    real, run = torch.save, f"{folder}/{name}-refusing"

    def refusing(value, file, *args, **kwargs):
        if dist.get_rank() == 1 and "step-" in str(file):
            raise OSError(28, "No space left on device", str(file))
        return real(value, file, *args, **kwargs)

    torch.save = refusing
    try:
        out = train_under(name, run, "--checkpoint.background", "false")
    finally:
        torch.save = real
    assert dist.get_rank() or "could not be written: No space left on device" in out, out
    assert dist.get_rank() or "waited in vain" not in out, out
    # The first rank removes what was half-written while the others exit.
    dist.barrier()
    assert checkpoints(run) == []


def install_added_engine(place):
    """The page's instructions for adding an engine, as an installed distribution."""
    page = Path(ROOT, "robust_dist", "engines", "README.md").read_text().partition("## Adding an engine")[2]
    code, entry = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "toml"))
    Path(place, "compressed_ddp-1.dist-info").mkdir(parents=True)
    Path(place, "compressed_ddp-1.dist-info", "METADATA").write_text("Name: compressed_ddp\nVersion: 1\n")
    group, line = entry.strip().splitlines()
    name = group.removeprefix('[project.entry-points."').removesuffix('"]')
    said = f"[{name}]\n" + line.replace('"', "") + "\n"
    Path(place, "compressed_ddp-1.dist-info", "entry_points.txt").write_text(said)
    Path(place, "compressed_ddp.py").write_text(code)


def added_engine(folder):
    """An engine from someone else's file trains, is recorded in its checkpoints, and FSDP resumes its run."""
    run = f"{folder}/compressed_ddp"
    on_first_rank(lambda: install_added_engine(f"{folder}/outside"))
    sys.path.insert(0, f"{folder}/outside")
    os.environ["COMPRESS_GRADIENTS"] = "1"
    engines.cache_clear()
    try:
        out = train_under("ddp", run)
        assert dist.get_rank() or "checkpoints: 3" in out, out
        assert verify(Path(run, "checkpoints", f"step-{TOTAL:08d}")).metadata["engine"] == "compressed_ddp"
        loss, plain = rows(run)[0]["train_loss"], rows(f"{folder}/ddp")[0]["train_loss"]
        # The gradients took another path than DDP's.
        assert loss != plain
        assert loss == pytest.approx(plain, rel=0.02)
        goes_on("compressed_ddp", folder, "ddp")
    finally:
        del os.environ["COMPRESS_GRADIENTS"]
    target = "fsdp2" if TORCH_2_7 else "fsdp1"
    takes_up("compressed_ddp", target, folder, f"{folder}/compressed_ddp-{target}")
    sys.path.remove(f"{folder}/outside")
    engines.cache_clear()


def signal_after(run, step):
    while not Path(run, "checkpoints", f"step-{step:08d}").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGUSR1)


def takes_up(source, target, folder, copy, words=()):
    def prepare():
        shutil.copytree(f"{folder}/{source}", copy)
        cut_back(copy)

    on_first_rank(prepare)
    out = train_under(target, copy, *words)
    assert dist.get_rank() or f"at step {STEP} of {TOTAL}" in out, out
    assert dist.get_rank() or "it continues, but not bit for bit" in out
    close(rows(copy), rows(f"{folder}/{source}"))
    assert checkpoints(copy) == [f"step-{STEP:08d}", f"step-{TOTAL:08d}"]


def refuses(name, folder, words, *said, json_values=None):
    changed = None
    if json_values is not None:
        config = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text()) | json_values
        changed = Path(folder, f"changed{dist.get_rank()}.json")
        changed.write_text(json.dumps(config))
    out = train_under(name, f"{folder}/refused", *words, deepspeed_json=changed)
    assert dist.get_rank() or all(word in out for word in said), out
    assert not Path(folder, "refused").exists()


def refuses_norms(name, folder):
    out = train_under(name, f"{folder}/{name} norms", "--precision.mixed", "bf16")
    assert dist.get_rank() or "precision.mixed='bf16': model.name='resnet8' normalises batches" in out, out
    assert not [*Path(f"{folder}/{name} norms").glob("checkpoints/*")]


def refusals(folder):
    adamw = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    rate = {"optimizer": {"type": "RAdaBeliefW", "params": {"lr": 0.3}}}
    option = {"optimizer": {"type": "RAdaBeliefW", "params": {"lr": "auto", "rectify_threshold": 5.0}}}
    warmup = {"scheduler": {"type": "RobustSchedule", "params": {"total_num_steps": "auto", "warmup_num_steps": 7}}}
    misspelt = {"scheduler": {"type": "RobustScheduler", "params": {}}}
    clipping, batch = {"gradient_clipping": 0.5}, {"train_batch_size": 96}
    return {
        "ema under fsdp": lambda: refuses("fsdp2", folder, ["--ema_decay", "0.9"], "ema_decay=0.9", "null"),
        "ema under zero3": lambda: refuses("zero3", folder, ["--ema_decay", "0.9"], "ema_decay=0.9", "zero3"),
        "another optimizer": lambda: refuses("zero2", folder, [], "AdamW", "RAdaBeliefW", json_values=adamw),
        "another rate": lambda: refuses("zero2", folder, [], "optimizer.params.lr=0.3", "0.05", json_values=rate),
        "another option": lambda: refuses("zero2", folder, [], "rectify_threshold=5.0", json_values=option),
        "another warm-up": lambda: refuses("zero2", folder, [], "warmup_num_steps=7", json_values=warmup),
        "a misspelt scheduler": lambda: refuses("zero2", folder, [], "RobustScheduler", json_values=misspelt),
        "another clipping": lambda: refuses("zero2", folder, [], "gradient_clipping=0.5", json_values=clipping),
        "another batch": lambda: refuses("zero2", folder, [], "train_batch_size=96", json_values=batch),
        "norms under fsdp2": lambda: refuses_norms("fsdp2", folder),
        "norms under zero2": lambda: refuses_norms("zero2", folder),
    }


REFUSALS = list(refusals(""))


def possible(names):
    """Those available in this torch: 2.6 runs FSDP2 only on GPUs."""
    return [name for name in names if TORCH_2_7 or not {"fsdp2", "hsdp"} & {*name.split()}]


def run_possible(scenarios):
    return run_scenarios({name: scenarios[name] for name in possible(scenarios)})


def everything_on_two(folder):
    scenarios = {f"trains {name}": lambda name=name: trains(name, folder) for name in ON_TWO}
    scenarios |= {f"goes on {name}": lambda name=name: goes_on(name, folder) for name in ON_TWO}
    scenarios |= {f"measures {name}": lambda name=name: measures(name, folder) for name in MEASURED}
    scenarios |= {f"stops {name}": lambda name=name: stops(name, folder) for name in STOPPED}
    if can_mount():
        scenarios |= {f"full disk {name}": lambda name=name: full_disk(name, folder) for name in STOPPED}
    scenarios |= {f"refusing {name}": lambda name=name: one_rank_cannot_write(name, folder) for name in REFUSING}
    for source, target in HANDED_ON:
        copy = f"{folder}/{source}-{target}"
        scenarios[f"{source} {target}"] = lambda s=source, t=target, c=copy: takes_up(s, t, folder, c)
    scenarios["added engine"] = lambda: added_engine(folder)
    return run_possible(scenarios | refusals(folder))


def everything_on_four(folder, two):
    def hsdp_takes_up():
        takes_up("fsdp2", "hsdp", two, f"{folder}/fsdp2-hsdp")

    def zero2_takes_up():
        takes_up("zero2", "zero2", two, f"{folder}/zero2-4", ["--num_processes", "4"])

    return run_possible(
        {
            "trains hsdp": lambda: train_under("hsdp", f"{folder}/hsdp"),
            "goes on hsdp": lambda: goes_on("hsdp", folder),
            "fsdp2 hsdp": hsdp_takes_up,
            "zero2 zero2": zero2_takes_up,
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return str(tmp_path_factory.mktemp("two")), str(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two(folders):
    return run_ranks(everything_on_two, 2, folders[0], timeout=120.0)


@pytest.fixture(scope="module")
def four(folders, two):
    return run_ranks(everything_on_four, 4, folders[1], folders[0], timeout=120.0)


@pytest.mark.parametrize("name", possible(ON_TWO))
def test_a_recipe_trains_under_every_config_as_under_ddp(two, name):
    assert_passed(two, f"trains {name}")


@pytest.mark.parametrize("name", possible(ON_TWO))
def test_a_run_goes_on_from_an_earlier_checkpoint_bit_for_bit_under_every_config(two, name):
    assert_passed(two, f"goes on {name}")


@pytest.mark.parametrize("name", possible(MEASURED))
def test_a_measured_rate_and_averaged_weights_train_as_under_ddp_and_go_on_bit_for_bit(two, name):
    assert_passed(two, f"measures {name}")


@pytest.mark.parametrize("name", possible(STOPPED))
def test_a_signal_at_one_rank_stops_all_at_one_step_and_the_run_goes_on_bit_for_bit(two, name):
    assert_passed(two, f"stops {name}")


@pytest.mark.skipif(not can_mount(), reason="mounting needs root, and a container that allows it")
@pytest.mark.parametrize("name", possible(STOPPED))
def test_a_full_disk_stops_all_ranks_with_one_error_and_costs_no_whole_checkpoint(two, name):
    assert_passed(two, f"full disk {name}")


@pytest.mark.parametrize("name", REFUSING)
def test_a_rank_that_cannot_write_its_part_leaves_no_other_waiting(two, name):
    assert_passed(two, f"refusing {name}")


@pytest.mark.parametrize(("source", "target"), [pair for pair in HANDED_ON if possible([" ".join(pair)])])
def test_a_run_is_taken_up_by_another_engine(two, source, target):
    assert_passed(two, f"{source} {target}")


def test_an_engine_is_added_by_one_file_as_the_page_says(two):
    assert_passed(two, "added engine")


@pytest.mark.parametrize("name", possible(REFUSALS))
def test_what_the_engine_cannot_do_is_refused_before_anything_is_written(two, name):
    assert_passed(two, name)


@pytest.mark.parametrize("name", possible(["trains hsdp", "goes on hsdp", "fsdp2 hsdp", "zero2 zero2"]))
def test_four_ranks_train_and_take_up_the_run_of_two(four, name):
    assert_passed(four, name)


def test_every_config_is_started_by_a_test():
    names = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    # tests/multinode starts those for several hosts.
    several = {f"multinode_{name}" for name in ("ddp", "fsdp2", "hsdp", "zero2", "zero3")}
    assert names == {*ON_TWO, "hsdp", "cpu"} | several
    used = {path.stem for path in (ROOT / "configs" / "deepspeed").glob("*.json")}
    assert used <= set(ON_TWO)
