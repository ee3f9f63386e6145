"""The optimizers that a recipe can name: each follows its equation, and none is mistaken for another."""

import io
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from robust_dist.engines.accelerate import EngineError, check
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.reference import rectification, reference_step
from robust_dist.train.baselines import NAG, PaperAdam, ScheduleFreePlus
from robust_dist.train.build import build_optimizer, build_schedule
from robust_dist.train.fit import fit
from robust_dist.train.optimizers import check_fits, make_optimizer, second_beta
from robust_dist.train.recipe import ModelConfig, OptimizerConfig, Recipe, ScheduleConfig, TrackingConfig, parse_recipe
from robust_dist.train.step import summed_entropy, summed_loss
from tests.train.few import few_digits

STEPS, B1, B2, EPS, DECAY = 30, 0.9, 0.99, 1e-8, 0.02
NAMES = ["RAdaBeliefW", "nag", "adam", "adamw", "radam", "adabelief", "nadamw", "schedulefree_adamw", "prodigy"]
NAMES += ["schedulefree_radam", "schedulefree_plus", "mechanic"]
OF_RATE_ONE = ("prodigy", "mechanic", "schedulefree_plus")


def rate(step):
    return 0.05 * (1 + math.cos(math.pi * step / STEPS)) / 2


def gradients():
    generator = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(STEPS)]


def start():
    return torch.linspace(-1, 1, 5, dtype=torch.float64)


def trained(name, **settings):
    """The recipe's optimizer with gradients independent of the parameter, under a falling rate."""
    param = nn.Parameter(start())
    config = OptimizerConfig(name=name, betas=(B1, B2), eps=EPS, **settings)
    optimizer = make_optimizer(config, [{"params": [param], "weight_decay": config.weight_decay}], STEPS)
    for step, grad in enumerate(gradients()):
        optimizer.param_groups[0]["lr"] = rate(step)
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def equation(*, belief, rectify, decay):
    """Eq. 6 to 10, 13 to 16 term by term, with the decay of theta before the step."""
    theta, m, v = start(), torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for t, g in enumerate(gradients(), 1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * ((g - m) ** 2 if belief else g**2) + (EPS if belief else 0)
        m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
        gamma = rectification(t, B2) if rectify else 1.0
        direction = m_hat if gamma is None else gamma * m_hat / torch.sqrt(v_hat + EPS)
        theta = theta - rate(t - 1) * (direction + decay * theta)
    return theta


@pytest.mark.parametrize(
    ("name", "decay", "belief", "rectify"),
    [
        ("adam", 0.0, False, False),
        ("adamw", DECAY, False, False),
        ("radam", DECAY, False, True),
        ("adabelief", DECAY, True, False),
        ("RAdaBeliefW", DECAY, True, True),
    ],
)
def test_each_adaptive_baseline_is_its_equation_in_float64(name, decay, belief, rectify):
    expected = equation(belief=belief, rectify=rectify, decay=decay)
    assert torch.allclose(trained(name, weight_decay=decay), expected, rtol=0, atol=1e-12)


def test_the_equation_with_belief_and_rectification_is_the_reference_of_radabeliefw():
    theta, m, v = start(), torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for t, g in enumerate(gradients(), 1):
        settings = {"lr": rate(t - 1), "betas": (B1, B2), "eps": EPS, "weight_decay": DECAY}
        theta, m, v = reference_step(theta, g, m, v, t, **settings)
    assert torch.allclose(theta, equation(belief=True, rectify=True, decay=DECAY), rtol=0, atol=1e-12)


def test_torch_s_adam_has_eps_elsewhere_and_so_is_another_optimizer_where_gradients_are_small():
    ours, theirs = (nn.Parameter(start()) for _ in range(2))
    pair = PaperAdam([ours], lr=0.05, weight_decay=0), torch.optim.Adam([theirs], lr=0.05)
    for optimizer, param in zip(pair, (ours, theirs), strict=True):
        param.grad = torch.full_like(param, 1e-4)
        optimizer.step()
    # 1e-4 / sqrt(1e-8 + 1e-8) against 1e-4 / (1e-4 + 1e-8)
    assert torch.allclose(start() - ours, torch.full((5,), 0.05 / math.sqrt(2), dtype=torch.float64))
    assert torch.allclose(start() - theirs, torch.full((5,), 0.05 / 1.0001, dtype=torch.float64))


def test_nag_is_the_paper_s_gradient_at_the_look_ahead_point_with_the_rate_inside_the_momentum():
    def slope(point):  # of a quadratic, so that it matters where it is taken
        return torch.arange(1.0, 6.0, dtype=torch.float64) * point + DECAY * point

    mu, theta, d = B1, start(), torch.zeros(5, dtype=torch.float64)
    param = nn.Parameter(start())
    optimizer = NAG([param], momentum=mu, weight_decay=DECAY)
    for step in range(STEPS):
        look_ahead = theta - mu * d
        assert torch.allclose(param.detach(), look_ahead, rtol=0, atol=1e-12)
        d = mu * d + (1 - mu) * rate(step) * slope(look_ahead)
        theta = theta - d
        optimizer.param_groups[0]["lr"] = rate(step)
        param.grad = (slope(param) - DECAY * param).detach()
        optimizer.step()
    assert torch.allclose(param.detach() + mu * optimizer.state[param]["momentum_buffer"], theta, rtol=0, atol=1e-12)


def test_nag_at_a_constant_rate_is_torch_s_at_a_tenth_of_it():
    ours, theirs = (nn.Parameter(start()) for _ in range(2))
    pair = (
        NAG([ours], lr=0.1, momentum=0.9, weight_decay=DECAY),
        torch.optim.SGD([theirs], lr=0.01, momentum=0.9, nesterov=True, weight_decay=DECAY),
    )
    for grad in gradients():
        for optimizer, param in zip(pair, (ours, theirs), strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


def test_schedule_free_plus_is_its_equations():
    def loss_of(theta):
        return ((theta - 1.5) ** 4).sum()

    def slope(theta):
        return 4 * (theta - 1.5) ** 3

    beta, decay, polyak = 0.9, 0.5, 0.3
    x, y, z = start(), start(), start()
    m, v, e, largest, total = torch.zeros_like(x), torch.zeros_like(x), 0.0, 0.0, 0.0
    param = nn.Parameter(start())
    optimizer = ScheduleFreePlus([param], betas=(B1, B2), eps=EPS, weight_decay=decay, polyak_beta=polyak)
    for t in range(1, STEPS + 1):
        gamma = min(t / 5, 1.0)
        g = slope(y)
        e = polyak * e + (1 - polyak) * math.sqrt(math.pi / 2) * float(g.abs().sum())
        value = float(loss_of(y)) + beta * float(g @ (z - x))
        alpha = gamma * max(0.0, value) / (e / (1 - polyak**t))
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        z = z - alpha**2 * decay * y - alpha * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS)
        largest = max(largest, alpha)
        total += largest**2
        x = x + (z - x) * largest**2 / total
        y = beta * x + (1 - beta) * z
        optimizer.param_groups[0]["lr"] = gamma
        param.grad = slope(param.detach())
        # Micro-batches: their mean is used.
        for part in (0.5, 1.5):
            optimizer.observe(part * loss_of(param))
        optimizer.step()
        assert optimizer.measured_rate == pytest.approx(alpha, rel=1e-9)
        assert torch.allclose(param.detach(), y, rtol=0, atol=1e-9)
    optimizer.eval()
    optimizer.eval()
    assert torch.allclose(param.detach(), x, rtol=0, atol=1e-9)
    optimizer.train()
    assert torch.allclose(param.detach(), y, rtol=0, atol=1e-9)
    with pytest.raises(RuntimeError, match=r"observe\(loss\)"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_every_named_optimizer_learns_under_the_schedule_and_goes_on_from_its_state(name):
    def run(stop, state=None):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        recipe = Recipe(
            optimizer=OptimizerConfig(name=name, lr=1.0 if name in OF_RATE_ONE else 0.05, weight_decay=0.0),
            schedule=ScheduleConfig(name="constant" if name.startswith("schedulefree") else "cosine"),
        )
        optimizer = build_optimizer(recipe, model, 40)
        schedule = build_schedule(recipe, optimizer, 40)
        if state is not None:
            # As in a checkpoint: only plain numbers and tensors come back.
            file = io.BytesIO()
            torch.save(state[1:], file)
            model.load_state_dict(state[0])
            loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            optimizer.load_state_dict(loaded[0])
            schedule.load_state_dict(loaded[1])
        mode(optimizer, "train")
        images = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(0 if state is None else 20, stop):
            loss = nn.functional.cross_entropy(model(images), images[:, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            if getattr(optimizer, "measures_rate", False):
                optimizer.observe(loss)
            optimizer.step()
            schedule.step()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        return loss.item(), (weights, optimizer.state_dict(), schedule.state_dict())

    def mode(optimizer, which):
        if hasattr(optimizer, which):
            getattr(optimizer, which)()

    first, _ = run(1)
    last, whole = run(40)
    assert last < first
    _, half = run(20)
    _, resumed = run(40, half)
    assert all(torch.equal(whole[0][key], resumed[0][key]) for key in whole[0])


@pytest.mark.parametrize("name", [*NAMES, "lr auto"])
def test_a_recipe_trains_with_each(name, tmp_path):
    AcceleratorState._reset_state(True)
    settings = {"name": "RAdaBeliefW", "lr": "auto"} if name == "lr auto" else {"name": name, "lr": 0.01}
    if name in ("adam", "radam", "adabelief"):
        settings["weight_decay"] = 0.0
    averages = name == "lr auto" or name.startswith("schedulefree")
    recipe = Recipe(
        model=ModelConfig("mlp"),
        optimizer=OptimizerConfig(**settings),
        schedule=ScheduleConfig("constant" if averages else "cosine", weight_decay_off_at=1.0),
        tracking=TrackingConfig(trackers=[], progress=False),
        epochs=2,
        batch_size=16,
        run_dir=str(tmp_path),
    )
    rows = fit(recipe, **few_digits(64, 32)).rows
    assert [math.isfinite(row["train_loss"]) for row in rows] == [True, True]


@pytest.mark.parametrize(
    ("total_steps", "expected"), [(750, 0.99), (2250, 1 - 7.5 / 2250), (7500, 0.999), (117300, 0.999)]
)
def test_beta2_auto_follows_the_number_of_steps_and_ends_at_the_paper_s(total_steps, expected):
    assert second_beta(OptimizerConfig(beta2="auto"), total_steps) == pytest.approx(expected, abs=1e-12)
    groups = build_optimizer(Recipe(optimizer=OptimizerConfig(beta2="auto")), nn.Linear(2, 2), total_steps).param_groups
    assert [group["betas"] for group in groups] == [(0.9, pytest.approx(expected, abs=1e-12))]


def test_beta2_as_a_number_and_another_constant_are_taken_and_the_default_is_the_paper_s():
    assert second_beta(OptimizerConfig(beta2=0.95), 100) == 0.95
    assert second_beta(OptimizerConfig(beta2=0.0), 100) == 0.0
    assert second_beta(OptimizerConfig(beta2="auto", beta2_steps=20), 1000) == 0.98
    assert second_beta(OptimizerConfig(), 100) == 0.999


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (Recipe(optimizer=OptimizerConfig(name="adam")), "optimizer.weight_decay=0.01"),
        (Recipe(optimizer=OptimizerConfig(name="schedulefree_adamw")), "schedule.name='cosine'"),
        (Recipe(optimizer=OptimizerConfig(options={"speed": 3})), "optimizer.options"),
        (Recipe(optimizer=OptimizerConfig(name="prodigy", options={"lr_of": 3})), "optimizer.options"),
        (Recipe(optimizer=OptimizerConfig(beta2="auto"), epochs=1), "optimizer.beta2='auto'"),
        (Recipe(optimizer=OptimizerConfig(name="schedulefree_radam")), "schedule.name='cosine'"),
        (
            Recipe(
                optimizer=OptimizerConfig(name="schedulefree_plus", clip_norm=1.0),
                schedule=ScheduleConfig(name="constant"),
            ),
            "optimizer.clip_norm=1.0",
        ),
        (Recipe(optimizer=OptimizerConfig(lr="auto")), "schedule.name='cosine' with optimizer.lr='auto'"),
        (
            Recipe(optimizer=OptimizerConfig(options={"averaging": "schedule_free"})),
            "schedule.name='cosine' with optimizer.options.averaging",
        ),
        (
            Recipe(
                optimizer=OptimizerConfig(lr="auto"), schedule=ScheduleConfig(name="constant", warmup_steps=3), epochs=1
            ),
            "schedule.warmup_steps=3",
        ),
        (
            Recipe(optimizer=OptimizerConfig(lr="auto", head_lr_mult=2), schedule=ScheduleConfig(name="constant")),
            "optimizer.head_lr_mult=2",
        ),
        (Recipe(optimizer=OptimizerConfig(lr="auto"), schedule=ScheduleConfig(name="constant"), ema_decay=0.9), "ema"),
        (
            Recipe(optimizer=OptimizerConfig(options={"rate_guard": 1})),
            "schedule.name='cosine' with optimizer.options.rate_guard=1, which takes no rate: set schedule.name=const",
        ),
        (
            Recipe(
                optimizer=OptimizerConfig(options={"rate_guard": 1.0}, head_lr_mult=2),
                schedule=ScheduleConfig(name="constant", warmup_steps=3),
            ),
            "schedule.warmup_steps=3 with optimizer.options.rate_guard=1.0.*optimizer.head_lr_mult=2",
        ),
        (
            Recipe(
                optimizer=OptimizerConfig(lr="auto", options={"rate_guard": 2}),
                schedule=ScheduleConfig(name="constant"),
            ),
            "optimizer.options.rate_guard=2 with optimizer.lr='auto': leave it out, or give lr as a number",
        ),
    ],
)
def test_a_setting_that_an_optimizer_cannot_have_is_named(recipe, named):
    with pytest.raises(ValueError, match=named):
        build_optimizer(recipe, nn.Linear(2, 2), 7)


def test_all_that_lr_auto_cannot_have_comes_in_one_message():
    recipe = Recipe(optimizer=OptimizerConfig(lr="auto", head_lr_mult=2), ema_decay=0.9)
    with pytest.raises(ValueError, match=r"schedule\.name='cosine'.*ema_decay=0\.9.*optimizer\.head_lr_mult=2"):
        check_fits(recipe)


def test_lr_auto_measures_averages_and_takes_beta2_auto():
    recipe = Recipe(optimizer=OptimizerConfig(lr="auto", weight_decay="auto"), schedule=ScheduleConfig(name="constant"))
    optimizer = build_optimizer(recipe, nn.Linear(2, 2), 750)
    (group,) = optimizer.param_groups
    assert optimizer.measures_rate
    assert optimizer.averages_weights
    assert (group["rate_guard"], group["averaging"], group["betas"]) == (1.0, "schedule_free", (0.9, 0.99))
    assert (group["weight_decay"], group["decay_by_rate"]) == (3 / 750, False)
    assert second_beta(OptimizerConfig(lr="auto", beta2=0.95), 750) == 0.95


CONSTANT = ScheduleConfig(name="constant")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"options": {"averaging": "sf"}},
            r"optimizer.options.averaging='sf': averaging must be None or 'sche",
        ),
        ({"options": {"rate_guard": "1"}}, r"optimizer.options.rate_guard='1': rate_guard must be a number"),
        ({"options": {"rate_guard": 0.5}}, r"optimizer.options.rate_guard=0.5: .* of at least 1"),
        ({"options": {"rate_gard": 1}}, r"optimizer.options.rate_gard=1: .* no such option; did you mean 'rate_guard'"),
        (
            {"options": {"exp_avg_dtype": "float16"}},
            r"optimizer.options.exp_avg_dtype='float16': exp_avg_",
        ),
        ({"options": {"seed": -1}}, r"optimizer.options.seed=-1: seed=-1 is below 0"),
        (
            {"options": {"weight_decay": 0.1}},
            r"optimizer.options.weight_decay=0.1 has no effect: set optimizer.weig",
        ),
        (
            {"options": {"rate_constant": 2.0}},
            r"optimizer.options=.*rate_constant=2.0 has no effect without",
        ),
        ({"options": {"foreach": True, "fused": True}}, r"optimizer.options=.*foreach=True and fused=True exclude"),
        ({"lr": "auto", "options": {"lr": 0.1}}, r"optimizer.options.lr=0.1 has no effect"),
        ({"lr": "auto", "options": {"averaging": None}}, r"optimizer.options.averaging=None with optimizer.lr='auto'"),
        (
            {"lr": "auto", "betas": (0.0, 0.9)},
            r"optimizer.betas=\(0.0, 0.9\).*averaging=.* needs betas\[0\]",
        ),
        (
            {"weight_decay": "auto", "options": {"decay_by_rate": True}},
            r"decay_by_rate=True with optimizer.weight",
        ),
        ({"weight_decay": 1.5, "options": {"decay_by_rate": False}}, r"optimizer.weight_decay=1.5.*must be at most 1"),
    ],
)
def test_a_wrong_option_is_named_as_the_recipe_has_it_before_the_data_is_opened(config, named):
    with pytest.raises(ValueError, match=f"^{named}|^optimizer.*{named}"):
        check_fits(Recipe(optimizer=OptimizerConfig(**config), schedule=CONSTANT))


def test_all_wrong_options_come_in_one_message_and_right_ones_pass():
    options = {"averaging": "sf", "rate_guard": 0.5, "sed": 1}
    with pytest.raises(ValueError, match=r"averaging='sf'.*rate_guard=0\.5.*sed=1"):
        check_fits(Recipe(optimizer=OptimizerConfig(options=options)))
    right = {"averaging": "schedule_free", "rate_guard": 2, "rate_constant": 2.0, "fused": None, "decay_by_rate": False}
    check_fits(Recipe(optimizer=OptimizerConfig(options=right), schedule=CONSTANT))


def test_an_option_that_another_optimizer_refuses_is_named_with_it():
    config = OptimizerConfig(name="nadamw", options={"momentum_decay": -1.0})
    with pytest.raises(ValueError, match=r"optimizer.options=\{'momentum_decay': -1.0\} do not suit nadamw: .*-1.0"):
        build_optimizer(Recipe(optimizer=config), nn.Linear(2, 2), STEPS)


def test_a_share_of_each_step_needs_three_of_them():
    recipe = Recipe(optimizer=OptimizerConfig(weight_decay="auto"))
    with pytest.raises(ValueError, match=r"optimizer.weight_decay='auto' needs at least 3 steps, and this run makes 2"):
        build_optimizer(recipe, nn.Linear(2, 2), 2)


def test_a_schedule_over_an_own_optimizer_that_takes_no_rate_is_named_as_the_recipe_has_it():
    optimizer = RAdaBeliefW(nn.Linear(2, 2).parameters(), rate_guard=1.0)
    with pytest.raises(ValueError, match=r"schedule.name='cosine' with schedule.warmup_steps=0: .*rate_guard=1, which"):
        build_schedule(Recipe(), optimizer, 7)
    build_schedule(Recipe(schedule=CONSTANT), optimizer, 7)


def test_a_rate_that_is_trusted_within_a_factor_goes_with_schedule_and_warm_up():
    check_fits(Recipe(optimizer=OptimizerConfig(options={"rate_guard": 2}), schedule=ScheduleConfig(warmup_steps=3)))


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
def test_auto_is_radabeliefw_s(setting):
    with pytest.raises(ValueError, match=rf"optimizer.{setting}='auto'.*with optimizer.name='adamw'"):
        OptimizerConfig(name="adamw", **{setting: "auto"})


def test_the_loss_that_a_measured_rate_sees_is_the_divergence_from_the_targets():
    torch.manual_seed(0)
    soft = torch.softmax(3 * torch.randn(7, 4), 1)
    soft[:2] = torch.eye(4)[:2]
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0, 1])
    for smoothing in (0.0, 0.1):
        for targets in (soft, torch.tensor([0, 1, 2, 3, 0, 1, 2])):
            whole = targets if targets.is_floating_point() else nn.functional.one_hot(targets, 4).float()
            smooth = whole * (1 - smoothing) + smoothing / 4
            logits = torch.log(smooth.clamp(min=1e-30))
            for some in (None, weights):
                entropy = summed_entropy(targets, 4, some, smoothing)
                assert float(summed_loss(logits, targets, some, smoothing) - entropy) == pytest.approx(0, abs=1e-5)


def test_schedule_free_goes_with_a_constant_schedule_and_without_an_average_of_its_own():
    recipe = Recipe(optimizer=OptimizerConfig(name="schedulefree_adamw"), schedule=ScheduleConfig(name="constant"))
    check_fits(recipe)
    recipe.ema_decay = 0.9
    with pytest.raises(ValueError, match="ema_decay"):
        check_fits(recipe)


def test_an_engine_that_puts_another_optimizer_in_the_place_of_the_recipe_s_is_found_out():
    weight, accelerator = nn.Parameter(torch.zeros(2)), Accelerator(cpu=True)
    ours, theirs = accelerator.prepare(PaperAdam([weight]), torch.optim.AdamW([weight]))
    check(accelerator, ours, optimizer_class=PaperAdam)
    with pytest.raises(EngineError, match=r"torch\.optim\.adamw\.AdamW, not PaperAdam"):
        check(accelerator, theirs, optimizer_class=PaperAdam)
    with pytest.raises(EngineError, match=r"PaperAdam, not RAdaBeliefW"):
        check(accelerator, ours)


def test_a_recipe_reaches_the_options_that_save_memory():
    words = ["--optimizer.options", "{exp_avg_dtype: bfloat16, stochastic_rounding: true, seed: 3}"]
    param = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(parse_recipe(words).optimizer, [{"params": [param]}], STEPS)
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.bfloat16
    assert (optimizer.param_groups[0]["stochastic_rounding"], optimizer.param_groups[0]["seed"]) == (True, 3)
    with pytest.raises(ValueError, match=r"exp_avg_dtype must be None or torch\.bfloat16, got 'float16'"):
        make_optimizer(OptimizerConfig(options={"exp_avg_dtype": "float16"}), [{"params": [param]}], STEPS)
