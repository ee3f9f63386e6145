import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from robust_dist.engines.timm import register
from robust_dist.optim import RAdaBeliefW
from robust_dist.schedule import RobustSchedule, base_optimizer
from tests.engines.toys import LR, batch, build_model, groups_of, same, used, wanted
from tests.ranks import run_ranks

TOTAL = 8


def train(model, optimizer, steps=TOTAL, schedule=None):
    for step in range(steps):
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return [p.detach().clone() for p in model.parameters()]


def reference():
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    return train(model, optimizer, schedule=RobustSchedule(optimizer, TOTAL))


def under_fabric(folder):
    from lightning_fabric import Fabric

    rank, world = dist.get_rank(), dist.get_world_size()
    fabric = Fabric(accelerator="cpu", devices=world, num_nodes=1, strategy="ddp" if world > 1 else "auto")
    fabric.launch()
    assert fabric.world_size == world
    model, optimizer, schedule = made_for(fabric)
    run(fabric, model, optimizer, schedule, rank, world, 0, 7)
    fabric.save(f"{folder}/{world}", {"model": model, "optimizer": optimizer, "schedule": schedule})
    run(fabric, model, optimizer, schedule, rank, world, 7, TOTAL)
    after = [p.detach().clone() for p in model.parameters()]
    # The file is from after the switch, the fresh objects from before it.
    model, optimizer, schedule = made_for(fabric)
    fabric.load(f"{folder}/{world}", {"model": model, "optimizer": optimizer, "schedule": schedule})
    run(fabric, model, optimizer, schedule, rank, world, 7, TOTAL)
    assert all(map(torch.equal, model.parameters(), after))
    return after


def made_for(fabric):
    model = build_model()
    optimizer = RAdaBeliefW(groups_of(model), lr=LR)
    schedule = RobustSchedule(optimizer, TOTAL)
    model, optimizer = fabric.setup(model, optimizer)
    assert type(base_optimizer(optimizer)) is RAdaBeliefW
    return model, optimizer, schedule


def run(fabric, model, optimizer, schedule, rank, world, first, last):
    for step in range(first, last):
        assert same(used(optimizer), wanted(step, TOTAL)), step
        images, labels = (part[rank::world] for part in batch(step))
        fabric.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("world", [1, 2])
def test_under_fabric_a_run_and_its_resume_are_those_of_one_process_without_it(world, tmp_path):
    for parameters in run_ranks(under_fabric, world, str(tmp_path)):
        torch.testing.assert_close(parameters, reference(), rtol=0, atol=1e-6)


def by_name(model, **settings):
    from timm.optim import create_optimizer_v2

    register()
    register()
    return create_optimizer_v2(model, "radabeliefw", **settings)


def test_timm_makes_the_optimizer_by_name_with_decay_on_weights_alone():
    model, twin = build_model(), build_model()
    optimizer = by_name(model, lr=LR, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    assert type(optimizer) is RAdaBeliefW
    hand = RAdaBeliefW(groups_of(twin), lr=LR, betas=(0.8, 0.99), eps=1e-6)
    assert all(map(torch.equal, train(model, optimizer), train(twin, hand)))


def test_timms_filter_and_its_other_settings_arrive():
    optimizer = by_name(build_model(), lr=LR, weight_decay=0.1, filter_bias_and_bn=False, foreach=False, maximize=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
    assert optimizer.param_groups[0]["foreach"] is False
    assert optimizer.param_groups[0]["maximize"] is True
    with pytest.raises(TypeError, match="bets"):
        by_name(build_model(), bets=(0.9, 0.9))


def test_timms_name_takes_averaging_and_a_measured_rate():
    settings = {"rate_guard": 1.0, "averaging": "schedule_free", "betas": (0.9, 0.9)}
    model, twin = build_model(), build_model()
    found = []
    for one, optimizer in (
        (model, by_name(model, lr=LR, weight_decay=0.1, **settings)),
        (twin, RAdaBeliefW(groups_of(twin), lr=LR, **settings)),
    ):
        for step in range(TOTAL):
            images, labels = batch(step)
            loss = nn.functional.cross_entropy(one(images), labels)
            loss.backward()
            optimizer.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        found.append([optimizer.measured_rate, *(p.detach() for p in one.parameters())])
    assert found[0][0] == found[1][0] > 0.0
    assert all(map(torch.equal, found[0][1:], found[1][1:]))


def test_timms_layer_decay_has_no_part_where_the_rate_is_measured_alone():
    with pytest.raises(ValueError, match=r"layer_decay .* rate_guard=1 ignores learning rates; set rate_guard above 1"):
        by_name(layered(), lr=LR, layer_decay=0.5, rate_guard=1.0)
    rates = {group["lr"] for group in by_name(layered(), lr=LR, layer_decay=0.5, rate_guard=2.0).param_groups}
    assert rates == {LR, LR / 2}


class Layered(nn.Sequential):
    def group_matcher(self, coarse=False):
        return {"stem": r"^0", "blocks": r"^(\d+)"}


def layered():
    return Layered(*build_model())


def test_timms_layer_decay_scales_the_rates_of_the_layers_under_robust_schedule():
    model, twin = layered(), layered()
    optimizer = by_name(model, lr=LR, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    scales = [rates[id(p)] / LR for p in model.parameters()]
    assert scales[0] == scales[1] < scales[2] == scales[3] == 1.0
    groups = [
        {"params": [p], "lr": LR * scale, "weight_decay": 0.1 if p.ndim > 1 else 0.0}
        for p, scale in zip(twin.parameters(), scales, strict=True)
    ]
    hand = RAdaBeliefW(groups)
    mine = train(model, optimizer, schedule=RobustSchedule(optimizer, TOTAL))
    assert all(map(torch.equal, mine, train(twin, hand, schedule=RobustSchedule(hand, TOTAL))))


def test_timms_own_cosine_gives_the_layers_the_rates_that_it_gives_to_adamw():
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    ours = by_name(layered(), lr=LR, weight_decay=0.1, layer_decay=0.5)
    theirs = create_optimizer_v2(layered(), "adamw", lr=LR, weight_decay=0.1, layer_decay=0.5)
    for step in range(TOTAL):
        rates = []
        for optimizer in (ours, theirs):
            CosineLRScheduler(optimizer, TOTAL, t_in_epochs=False).step_update(step)
            rates.append([group["lr"] for group in optimizer.param_groups])
        assert rates[0] == pytest.approx(rates[1], abs=1e-15)
        assert max(rates[0]) == pytest.approx(LR * (1 + math.cos(math.pi * step / TOTAL)) / 2)


def test_a_timm_model_trains_by_name_and_its_copy_by_hand_alike():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3, in_chans=3)
    twin = copy.deepcopy(model)
    split = {ndim: [p for p in twin.parameters() if (p.ndim > 1) is ndim] for ndim in (False, True)}
    hand = RAdaBeliefW(
        [{"params": split[False], "weight_decay": 0.0}, {"params": split[True], "weight_decay": 0.1}], lr=LR
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for one, optimizer in ((model, by_name(model, lr=LR, weight_decay=0.1)), (twin, hand)):
        schedule = RobustSchedule(optimizer, 4)
        for step in range(4):
            assert max(used(optimizer)[0]) == (0.1 if step < 3 else 0.0)
            nn.functional.cross_entropy(one(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
