"""A step over tensors with fixed addresses gives the ordinary loop's numbers, called and recorded, bit for bit."""

import copy
import json
import multiprocessing
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from robust_dist import RAdaBeliefW, RobustAugment, RobustSchedule
from robust_dist.data import DeviceLoader, HostSet, ImageSet
from robust_dist.data.batches import Cut
from robust_dist.engines.accelerate import EngineError
from robust_dist.schedule import group_values
from robust_dist.train import build, fit
from robust_dist.train.graph import WARM_UP_STEPS, DeviceRates, StaticStep, check_graph
from robust_dist.train.metrics import without_measured
from robust_dist.train.recipe import DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig, Recipe, TrackingConfig
from tests.data import pretended
from tests.train.few import few_digits
from tests.train.tape import Tape
from tests.versions import needs_torch_2_7

N, BATCH, EPOCHS = 44, 16, 3


def toy_set(device="cpu"):
    images = torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(N) % 4, tuple("abcd"), "toy").to(device)


class Toy:
    """A model with batch normalisation, its optimizer, its schedule with the switch in mid-run, and the loss so far."""

    def __init__(self, device="cpu", *, capturable=False, autocast=False, layer=nn.Identity):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), layer(), nn.Linear(144, 4)
        ).to(device)
        no_decay = [p for p in self.model.parameters() if p.ndim == 1]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [{"params": decayed}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = RAdaBeliefW(groups, lr=0.03, weight_decay=0.1, capturable=capturable)
        self.schedule = RobustSchedule(self.optimizer, 3 * EPOCHS, warmup_steps=2, weight_decay_off_at=0.5)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # A pass in C would leave nothing to record.
        backend = "torch" if device == "cpu" else "auto"
        self.pipeline = RobustAugment(4, 8, (0.5,) * 3, (0.2,) * 3, crop=1, block=4, backend=backend).to(device)
        self.device, self.autocast = torch.device(device), autocast

    def learn(self, batch):
        images, targets = batch.augmented(self.pipeline)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        (loss / batch.global_size).backward()
        self.loss += loss.detach().double()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, image_set, step=None, epochs=EPOCHS):
        loader = image_set.loader(Cut(BATCH, seed=1, block=4))
        rates = []
        for epoch in range(epochs):
            for (batch,) in loader.epoch(epoch):
                rates.append([(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups])
                (step or self.learn)(batch)
                self.schedule.step()
        return rates

    def numbers(self):
        state = [self.optimizer.state[p] for p in self.model.parameters()]
        moments = [value for one in state for value in one.values()]
        return [self.loss, *self.model.state_dict().values(), *moments]


def same(one, other):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.numbers(), other.numbers(), strict=True))


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_static_step_trains_as_the_ordinary_loop_bit_for_bit(place):
    image_set = toy_set() if place == "device" else HostSet(toy_set(), torch.device("cpu"))
    plain, static = Toy(), Toy()
    step = StaticStep(static.learn, static.optimizer, static.device, BATCH)
    assert plain.train(image_set) == static.train(image_set, step)
    assert same(plain, static)


def test_the_groups_hold_numbers_outside_of_a_step_so_that_a_checkpoint_is_the_ordinary_one():
    plain, static = Toy(), Toy()
    plain.train(toy_set(), epochs=1)
    static.train(toy_set(), StaticStep(static.learn, static.optimizer, static.device, BATCH), epochs=1)
    ours, theirs = static.optimizer.state_dict(), plain.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {type(group["lr"]) for group in ours["param_groups"]} == {float}


def test_a_checkpoint_that_is_loaded_into_a_static_step_goes_on_bit_for_bit():
    whole, first, second = Toy(), Toy(), Toy()
    image_set = toy_set()
    whole.train(image_set, epochs=2)
    first.train(image_set, epochs=1)
    step = StaticStep(second.learn, second.optimizer, second.device, BATCH)
    for name in ("model", "optimizer", "schedule"):
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    second.loss.copy_(first.loss)
    for (batch,) in image_set.loader(Cut(BATCH, seed=1, block=4)).epoch(1):
        step(batch)
        second.schedule.step()
    assert same(whole, second)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """As on a GPU: augmentation decides nothing on the host, the optimizer counts in place, a capture is detected."""
    monkeypatch.setattr(group_values, "_capturing", lambda: True)
    for name, module in list(sys.modules.items()):
        if name.startswith("robust_dist.augment") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda tensor: False)

    def advance(self, gathered, found_inf):
        torch._foreach_add_(gathered.steps, 1.0)
        return gathered.steps

    monkeypatch.setattr(RAdaBeliefW, "_advance_on_device", advance)


def taped(toy):
    step = StaticStep(toy.learn, toy.optimizer, toy.device, BATCH)
    step.rates.capturable = True
    step.replay = Tape(step.over_static)
    return step


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("as_on_a_device")
def test_a_recorded_step_repeated_over_its_memory_trains_as_the_ordinary_loop_bit_for_bit(autocast):
    image_set = toy_set()
    plain, static = Toy(capturable=True, autocast=autocast), Toy(autocast=autocast)
    rates = plain.train(image_set)
    assert static.train(image_set, taped(static)) == rates
    assert len({lr for ((lr, _), _) in rates}) > 5
    assert {decay for ((_, decay), _) in rates} == {0.1, 0.0}
    assert same(plain, static)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_recording_that_reads_the_host_s_rates_differs_so_the_tape_would_show_it():
    plain, baked = Toy(capturable=True), Toy(capturable=True)
    image_set = toy_set()
    plain.train(image_set)
    step = taped(baked)
    step.rates.fill = lambda: None
    baked.train(image_set, step)
    assert not same(plain, baked)


@pytest.mark.usefixtures("as_on_a_device")
def test_what_is_loaded_after_a_recording_is_what_goes_on():
    image_set = toy_set()
    saved, plain, static = Toy(capturable=True), Toy(capturable=True), Toy(capturable=True)
    saved.train(image_set, epochs=1)
    step = taped(static)
    plain.train(image_set, epochs=1)
    static.train(image_set, step, epochs=1)
    for toy, train in ((plain, plain.learn), (static, step)):
        for name in ("model", "optimizer", "schedule"):
            getattr(toy, name).load_state_dict(copy.deepcopy(getattr(saved, name).state_dict()))
        for (batch,) in image_set.loader(Cut(BATCH, seed=1, block=4)).epoch(1):
            train(batch)
            toy.schedule.step()
    assert same(plain, static)


@needs_torch_2_7
def test_a_step_asks_the_device_nothing():
    pipeline = RobustAugment(3, 8, (0.5,) * 3, (0.5,) * 3, block=2, backend="torch")
    with pretended.pretending():
        pretended.move(pipeline)
        with pretended.DEVICE:
            model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 3))
        optimizer = RAdaBeliefW(model.parameters(), foreach=True)  # a kernel would want memory
        schedule = RobustSchedule(optimizer, 100)
        schedule.step()  # the first one compares the ranks
        rates = DeviceRates(optimizer, pretended.DEVICE)
        for (batch,) in DeviceLoader(pretended.image_set(N, 8), batch_size=BATCH, seed=0, block=2).epoch(0):
            images, targets = batch.augmented(pipeline)
            assert nn.functional.cross_entropy(model(images), targets).device == pretended.DEVICE
            # A backward pass would need a real device; nothing is read from it.
            for param in model.parameters():
                param.grad = torch.empty_like(param)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            rates.fill()
            with rates.in_groups():
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class Fake:
    def __init__(self, kind=DistributedType.NO, ranks=1, device="cuda"):
        self.distributed_type, self.num_processes, self.device = kind, ranks, torch.device(device)


@pytest.mark.parametrize(
    ("accelerator", "changes", "match"),
    [
        (Fake(device="cpu"), {}, "the device cpu: run on a CUDA device, or set cuda_graph=false"),
        (Fake(DistributedType.MULTI_GPU, 2), {}, r"2 rank\(s\) under MULTI_GPU: start one process"),
        (Fake(DistributedType.FSDP, 1), {}, r"1 rank\(s\) under FSDP"),
        (Fake(DistributedType.DEEPSPEED, 4), {}, r"4 rank\(s\) under DEEPSPEED"),
        (Fake(), {"accumulation": 2}, "accumulation=2: set accumulation=1 and micro_batch_size=null"),
        (Fake(), {"precision": PrecisionConfig(mixed="fp16")}, "precision.mixed='fp16'.* set precision.mixed=bf16"),
        (Fake(), {"optimizer": OptimizerConfig(name="nag")}, "optimizer.name='nag'.* set RAdaBeliefW"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_setting_value_and_remedy(accelerator, changes, match):
    with pytest.raises(ValueError, match=f"cuda_graph=True cannot capture a whole step with .*{match}"):
        check_graph(accelerator, Recipe(cuda_graph=True, **changes))
    check_graph(accelerator, Recipe(**changes))


def test_one_process_on_a_gpu_may_capture_in_float32_and_bfloat16():
    for mixed in ("no", "bf16"):
        check_graph(Fake(), Recipe(cuda_graph=True, precision=PrecisionConfig(mixed=mixed)))


def run(folder, **changes):
    AcceleratorState._reset_state(True)
    settings = {
        "data": DataConfig(name="digits"),
        "model": ModelConfig("resnet8"),
        "optimizer": OptimizerConfig(lr=0.05, clip_norm=1.0),
        "tracking": TrackingConfig(trackers=[], progress=False),
        "epochs": 2,
        "batch_size": 32,
        "ema_decay": 0.9,
        "run_dir": str(folder),
    }
    return [without_measured(row) for row in fit(Recipe(**settings | changes), **few_digits(72, 16)).rows]


def test_a_run_by_static_steps_has_the_rows_of_the_ordinary_run_and_says_where_its_data_lie(
    tmp_path, monkeypatch, capsys
):
    plain = run(tmp_path / "plain")
    assert "of data on cpu: digits (train), 216.6 KiB in 72 images; digits (test)," in capsys.readouterr().out
    noted = json.loads((tmp_path / "plain" / "environment.json").read_text())["starts"][0]["data"]
    assert [one["device_bytes"] for one in noted] == [72 * (3 * 32 * 32 + 8), 16 * (3 * 32 * 32 + 8)]
    with pytest.raises(ValueError, match=r"cuda_graph=True .* device cpu"):
        run(tmp_path / "refused", cuda_graph=True)
    monkeypatch.setattr(build, "check_graph", lambda accelerator, recipe: None)
    assert run(tmp_path / "static", cuda_graph=True) == plain


@pytest.fixture
def deterministic():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("place", ["device", "host"])
def test_a_replayed_graph_trains_as_its_step_called_and_close_to_the_ordinary_loop(place, autocast):
    image_set = toy_set("cuda") if place == "device" else HostSet(toy_set(), torch.device("cuda"))
    plain, called, graphed = (Toy("cuda", autocast=autocast) for _ in range(3))
    plain.train(image_set, epochs=EPOCHS)
    ordinary = StaticStep(called.learn, called.optimizer, called.device, 0)  # no batch has this size: all are called
    called.train(image_set, ordinary)
    step = StaticStep(graphed.learn, graphed.optimizer, graphed.device, BATCH)
    graphed.train(image_set, step)
    assert step.replay.graph is not None
    assert same(called, graphed)
    for one, other in zip(plain.numbers(), graphed.numbers(), strict=True):
        torch.testing.assert_close(one.cpu().double(), other.cpu().double(), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_a_replayed_step_draws_new_dropout_masks_as_the_called_one():
    image_set = toy_set("cuda")
    called, graphed = (Toy("cuda", layer=nn.Dropout) for _ in range(2))
    torch.cuda.manual_seed(3)
    called.train(image_set, StaticStep(called.learn, called.optimizer, called.device, 0))
    torch.cuda.manual_seed(3)
    graphed.train(image_set, StaticStep(graphed.learn, graphed.optimizer, graphed.device, BATCH))
    assert same(called, graphed)


@pytest.mark.gpu
def test_replayed_steps_wait_for_nothing():
    image_set, toy = toy_set("cuda"), Toy("cuda")
    step = StaticStep(toy.learn, toy.optimizer, toy.device, BATCH)
    toy.train(image_set, step, epochs=WARM_UP_STEPS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        toy.train(image_set, step, epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ask_while_capturing():
    toy = Toy("cuda")

    def learn(batch):
        toy.learn(batch)
        toy.loss.item()

    with pytest.raises(EngineError, match=r"cuda_graph=True: the step cannot be captured .*set cuda_graph=false"):
        toy.train(toy_set("cuda"), StaticStep(learn, toy.optimizer, toy.device, BATCH))


@pytest.mark.gpu
def test_a_step_that_asks_the_device_cannot_be_captured_and_is_told_so():
    # A failed capture may leave its process's generator unusable.
    child = multiprocessing.get_context("spawn").Process(target=ask_while_capturing)
    child.start()
    child.join()
    assert child.exitcode == 0
