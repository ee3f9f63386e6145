"""The options that save memory: masters, first moments in bfloat16, stochastic rounding by keyed bits."""

import copy
import io

import pytest
import torch

from robust_dist import sample_keys
from robust_dist.optim import RAdaBeliefW
from robust_dist.optim.counting import advanced, count_of, counts_of, increments, value_of
from robust_dist.optim.foreach import CPU_BLOCK, THREADED_CPU_BLOCK
from robust_dist.optim.reference import reference_step
from robust_dist.optim.rounding import HIGH, LOW, indices, random_bits, round_stochastically, tensor_keys
from robust_dist.optim.settings import DEFAULTS
from robust_dist.optim.settings import OPTIONS as OPTIONAL
from robust_dist.optim.state import state_dtype
from tests.optim import interpreted
from tests.optim.helpers import BACKENDS, bits, gradients, start, step, train

BF16 = torch.bfloat16
WORD = 2**32 - 1
OPTIONS = [
    {"master_weights": True},
    {"exp_avg_dtype": BF16},
    {"stochastic_rounding": True, "seed": 7},
    {"exp_avg_dtype": BF16, "stochastic_rounding": True},
    {"exp_avg_dtype": BF16, "stochastic_rounding": True, "master_weights": True},
]
# "default" is one of the others
backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "default"])
options = pytest.mark.parametrize("kwargs", OPTIONS, ids=lambda k: ",".join(k))


def bits_by_hand(key, index):
    x = (index + key) & WORD
    x = ((x ^ x >> 16) * 0x7FEB352D) & WORD
    x ^= (key >> 32 & WORD) ^ ((index >> 32) * 0x9E3779B9 & WORD)
    x = ((x ^ x >> 15) * 0x846CA68B) & WORD
    return x ^ x >> 16


def rounded_by_hand(values, key, half, first=0):
    """As rounding.py says, in Python's integers; `values` are walked in the order of memory."""
    found = []
    for index, pattern in enumerate(values.reshape(-1).view(torch.int32).tolist(), first):
        found.append((((pattern & WORD) + (bits_by_hand(key, index) >> half & 0xFFFF)) & WORD) >> 16)
    halves = torch.tensor([b - 2**16 if b >= 2**15 else b for b in found], dtype=torch.int16)
    return halves.view(BF16).view(values.shape)


def test_the_bits_are_a_function_of_seed_step_place_and_index():
    places = torch.tensor([0, 1, 5, 2**40])
    keys = tensor_keys(3, 12, places)
    assert keys.tolist() == sample_keys(3, 12, places).tolist()
    assert keys.tolist() == tensor_keys(3, torch.full((4,), 12.0), places).tolist()
    for key in keys.tolist():
        for first in (0, 2**32 - 2, 2**40 + 7):
            by_hand = [bits_by_hand(key, first + i) for i in range(4)]
            assert random_bits(key, torch.arange(first, first + 4)).tolist() == by_hand
    assert len({*keys.tolist(), *tensor_keys(4, 12, places).tolist(), *tensor_keys(3, 13, places).tolist()}) == 12


def test_bits_are_uniform_and_do_not_repeat_between_neighbours_steps_and_halves():
    n = 1 << 16
    keys = tensor_keys(0, 1, torch.arange(2)).tolist() + tensor_keys(0, 2, torch.arange(1)).tolist()
    rows = [random_bits(key, torch.arange(n)) for key in keys]
    streams = torch.stack([row >> half & 0xFFFF for row in rows for half in (LOW, HIGH)]).double() / 2**16 - 0.5
    streams = torch.cat([streams, streams[:1].roll(1, 1)])
    covariance = streams @ streams.T / n * 12
    assert (covariance - torch.eye(len(streams))).abs().max() < 5 / n**0.5
    assert streams.mean(1).abs().max() < 5 * (1 / 12 / n) ** 0.5


def test_rounding_is_unbiased_and_takes_one_of_the_two_neighbours():
    n = 1 << 16
    drawn = random_bits(tensor_keys(0, 1, torch.tensor([0])).item(), torch.arange(n))
    for value in (1.001, -3.14159, 1e-30, 2e-40, 0.9999):
        exact = torch.tensor(value)
        stored = round_stochastically(exact.expand(n).contiguous(), drawn, LOW).double()
        low, high = stored.unique().tolist()
        assert low < exact.item() < high
        share = (exact.item() - low) / (high - low)
        error = (high - low) * (share * (1 - share) / n) ** 0.5
        assert abs(stored.mean().item() - exact.item()) < 4 * error


def test_what_bfloat16_has_exactly_and_what_is_not_finite_stays():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    stored = round_stochastically(every.float(), torch.full((2**16,), 0xFFFF), LOW)
    assert torch.equal(stored.isnan(), every.isnan())
    assert bits(stored[~every.isnan()]) == bits(every[~every.isnan()])
    nan = torch.tensor([0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, torch.full((3,), 0xFFFF), LOW).isnan().all()


def test_indices_count_in_the_order_of_memory():
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert indices(last, 9).permute(0, 2, 3, 1).reshape(-1).tolist() == list(range(9, 129))
    assert indices(torch.zeros(4, 6).t(), 0).reshape(-1).tolist() == list(range(24))
    assert indices(torch.zeros(()), 3).item() == 3


def _laid(tensor, layout):
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last).requires_grad_()
    return (torch.stack([tensor, tensor], -1)[..., 0] if layout == "strided" else tensor).requires_grad_()


def _params(dtype, layout="contiguous"):
    return [_laid(start(shape, dtype=dtype, seed=i), layout) for i, shape in enumerate([(2, 3, 2, 3), (7,)])]


@backends
@options
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *((BF16, layout) for layout in ("contiguous", "channels_last", "strided")),
        *((dtype, "contiguous") for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_every_step_is_that_of_float32_and_stored_as_the_options_say(backend, kwargs, dtype, layout):
    params = _params(dtype, layout)
    frozen = torch.zeros(3).requires_grad_()
    optimizer = RAdaBeliefW(
        [{"params": [frozen, params[0]]}, {"params": params[1:]}], lr=0.03, **BACKENDS[backend], **kwargs
    )
    for t, grads in enumerate(zip(*(gradients(p.shape, 5, dtype=dtype) for p in params), strict=True), 1):
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for p in params]
        step(optimizer, params, grads)
        for param, grad, place, (old, state) in zip(params, grads, (1, 2), before, strict=True):
            twin = _laid(state.get("master", old).float().contiguous(), layout)
            exact = RAdaBeliefW([twin], lr=0.03, **BACKENDS[backend])
            wide = {k: v.float() for k, v in state.items() if k != "master"}
            exact.state[twin].update(wide)
            step(exact, [twin], [grad.float()])
            key = sample_keys(kwargs.get("seed", 0), t, [place]).item()
            _check(param, optimizer.state[param], twin.detach(), exact.state[twin], kwargs, layout, key)


def _check(param, state, value, wide, kwargs, layout, key):
    def stored(exact, dtype, half):
        if dtype != BF16 or "stochastic_rounding" not in kwargs:
            return exact.to(dtype)
        if layout == "channels_last" and exact.dim() == 4:
            return rounded_by_hand(exact.permute(0, 2, 3, 1).contiguous(), key, half).permute(0, 3, 1, 2)
        return rounded_by_hand(exact.contiguous(), key, half)

    low = param.dtype != torch.float32
    if "master_weights" in kwargs and low:
        assert torch.equal(state["master"], value)
        assert torch.equal(param.detach(), value.to(param.dtype))
    else:
        assert "master" not in state
        assert torch.equal(param.detach(), stored(value, param.dtype, LOW))
    assert state["exp_avg"].dtype == kwargs.get("exp_avg_dtype", torch.float32)
    assert torch.equal(state["exp_avg"], stored(wide["exp_avg"], state["exp_avg"].dtype, HIGH))
    assert torch.equal(state["exp_avg_sq"], wide["exp_avg_sq"])
    assert state["exp_avg_sq"].dtype == torch.float32


@backends
def test_float64_and_complex_parameters_have_no_master_and_keep_the_dtype_of_their_state(backend):
    for dtype in (torch.float64, torch.complex64):
        kwargs = {"master_weights": True, "exp_avg_dtype": BF16, "stochastic_rounding": True}
        params, twins = [start((5,)).to(dtype).requires_grad_()], [start((5,)).to(dtype).requires_grad_()]
        grads = [[g.to(dtype)] for g in gradients((5,), 7)]
        optimizer = train(params, grads, **kwargs, **BACKENDS[backend])
        train(twins, grads, **BACKENDS[backend])
        assert bits(params[0]) == bits(twins[0])
        assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[params[0]]["exp_avg"].dtype == dtype


@backends
def test_a_step_below_half_the_spacing_stalls_when_rounded_to_the_nearest_and_moves_by_chance(backend):
    n, steps, lr = 4096, 50, 1e-4
    ends = {}
    for name, kwargs in {
        "nearest": {},
        "chance": {"stochastic_rounding": True},
        "master": {"master_weights": True},
    }.items():
        param = torch.ones(n, dtype=BF16).requires_grad_()
        optimizer = RAdaBeliefW([param], lr=lr, weight_decay=0.0, betas=(0.0, 0.0), **BACKENDS[backend], **kwargs)
        for _ in range(steps):
            step(optimizer, [param], [torch.ones(n, dtype=BF16)])
        ends[name] = optimizer.state[param].get("master", param).detach().double().mean().item()
    assert ends["nearest"] == 1.0
    assert ends["master"] == pytest.approx(1.0 - steps * lr, rel=1e-5)
    # Below 1 the spacing of bfloat16 is 2^-8; a step's variance is at most spacing * lr.
    assert abs(ends["chance"] - ends["master"]) < 4 * (steps * 2**-8 * lr / n) ** 0.5


@pytest.mark.parametrize("backend", [name for name in ("fused", "foreach") if name in BACKENDS])
@pytest.mark.parametrize(("beta1", "short"), [(0.9, 0.01), (0.99, 0.1)])
def test_a_first_moment_stops_short_of_a_constant_gradient_to_the_nearest_and_reaches_it_by_chance(
    backend, beta1, short
):
    grad = torch.linspace(1.0, 2.0, 4096)
    means = {}
    for chance in (False, True):
        param = torch.zeros(4096).requires_grad_()
        kwargs = {"exp_avg_dtype": BF16, "stochastic_rounding": chance, "betas": (beta1, 0.9), "lr": 0.0}
        optimizer = RAdaBeliefW([param], **kwargs, **BACKENDS[backend])
        for _ in range(round(7 / (1 - beta1))):
            step(optimizer, [param], [grad])
        exact = grad * (1 - beta1 ** round(7 / (1 - beta1)))
        means[chance] = (optimizer.state[param]["exp_avg"].float() / exact).mean().item()
    assert 1 - 2**-8 / (1 - beta1) < means[False] < 1 - short
    assert abs(means[True] - 1) < 1e-3


@pytest.mark.parametrize("backend", [name for name in ("fused", "foreach") if name in BACKENDS])
def test_threads_chunks_and_blocks_change_no_bit(backend):
    # One thread cuts the first into two blocks, several threads leave it whole.
    shapes, ends, threads = [(CPU_BLOCK + 70_001,), (3,), (40_000,)], [], torch.get_num_threads()
    assert shapes[0][0] < THREADED_CPU_BLOCK
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            params = [start(s, dtype=BF16, seed=i).requires_grad_() for i, s in enumerate(shapes)]
            grads = [gradients(s, 3, dtype=BF16, seed=i) for i, s in enumerate(shapes)]
            kwargs = {"exp_avg_dtype": BF16, "stochastic_rounding": True}
            train(params, list(zip(*grads, strict=True)), **BACKENDS[backend], **kwargs)
        finally:
            torch.set_num_threads(threads)
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _grads(steps, seed=1):
    return list(zip(*(gradients(p.shape, steps, dtype=BF16, seed=seed) for p in _params(BF16)), strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_past_2_24_steps_the_count_and_the_bits_go_on(backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
        interpreted.on_the_cpu(monkeypatch)
    settings = {"lr": 0.5, "betas": (0.9, 1 - 1e-8)}
    kwargs = {"stochastic_rounding": True, **settings, **BACKENDS.get(backend, {})}
    param, wide = start((64,), dtype=BF16).requires_grad_(), start((5,)).requires_grad_()
    optimizer, first, values = RAdaBeliefW([param, wide], **kwargs), 2**24 - 2, []
    for tensor in (param, wide):
        state = {key: torch.full_like(tensor, 0.01, dtype=state_dtype(tensor)) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[tensor] = {"step": torch.tensor(float(first)), **state}
    for t, (grad, its) in enumerate(zip(gradients((64,), 5, dtype=BF16), gradients((5,), 5), strict=True), first + 1):
        if t == 2**24 + 2:
            optimizer.load_state_dict(optimizer.state_dict())
        state = {key: value.detach().clone() for key, value in optimizer.state[wide].items()}
        exact = reference_step(wide.detach(), its, state["exp_avg"], state["exp_avg_sq"], t, **settings)
        low = [param.detach().float(), grad.float(), *map(optimizer.state[param].get, ("exp_avg", "exp_avg_sq"))]
        drawn = reference_step(*(x.double() for x in low), t, **settings)[0].float()
        step(optimizer, [param, wide], [grad, its])
        torch.testing.assert_close(wide.detach(), exact[0], rtol=1e-12, atol=1e-14)
        # but for what float32's rounding puts on the other side of its bits
        same = param.detach() == rounded_by_hand(drawn, sample_keys(0, t, [0]).item(), LOW)
        assert same.sum() >= 63
        count = optimizer.state[param]["step"]
        assert (count.dtype, count.dim()) == (torch.float32, 0)
        values.append(count.item())
    assert values == sorted({*values})
    assert values[:2] == [2**24 - 1, 2**24]


def test_a_step_tensor_stands_for_every_count_to_8e8():
    counts = [0, 1, 2, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2**23, 2**25 + 12345, 10**8 + 7, 8 * 10**8]
    values = list(map(value_of, counts))
    assert values[:5] == counts[:5]
    steps = torch.tensor(values)
    assert steps.tolist() == values
    assert list(map(count_of, values)) == counts
    assert counts_of(steps).tolist() == counts
    after = [step + more for step, more in zip(steps, increments(list(steps)), strict=True)]
    assert [count_of(step.item()) for step in after] == [count + 1 for count in counts]
    assert advanced(list(steps))[0] == [count + 1 for count in counts]
    assert advanced(list(steps))[1] == after


def _through_file(optimizer, params):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = RAdaBeliefW(twins, lr=0.9)
    twin.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return twin, twins


def _deepcopied(optimizer, params):
    twin = copy.deepcopy(optimizer)
    return twin, twin.param_groups[0]["params"]


@options
@backends
@pytest.mark.parametrize("way", [_through_file, _deepcopied])
def test_a_copy_keeps_dtypes_and_continues_bit_for_bit(kwargs, backend, way):
    params = _params(BF16)
    optimizer = train(params, _grads(4), **BACKENDS[backend], **kwargs)
    twin, twins = way(optimizer, params)
    for param, other in zip(params, twins, strict=True):
        for key, value in optimizer.state[param].items():
            assert twin.state[other][key].dtype == value.dtype
            assert bits(twin.state[other][key]) == bits(value)
    for grads in _grads(4, seed=5):
        step(optimizer, params, grads)
        step(twin, twins, grads)
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_the_exp_avg_of_float32_parameters_is_loaded_in_bfloat16():
    params = _params(torch.float32)
    optimizer = train(params, [[g.float() for g in row] for row in _grads(3)], exp_avg_dtype="bfloat16")
    twin = RAdaBeliefW(_params(torch.float32))
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["exp_avg_dtype"] == "bfloat16"
    assert {s["exp_avg"].dtype for s in twin.state.values()} == {BF16}
    assert {s["exp_avg_sq"].dtype for s in twin.state.values()} == {torch.float32}


def test_options_that_are_off_are_not_in_the_groups_so_that_older_checkpoints_fit():
    optimizer = RAdaBeliefW(_params(BF16))
    assert set(optimizer.param_groups[0]) == {"params", *DEFAULTS}
    optimizer = RAdaBeliefW(_params(BF16), master_weights=True, exp_avg_dtype="bfloat16", seed=0)
    assert set(optimizer.param_groups[0]) - {"params", *DEFAULTS} == {"master_weights", "exp_avg_dtype"}
    assert not set(OPTIONAL) & set(DEFAULTS)


def test_options_may_be_set_on_a_running_optimizer():
    params = _params(BF16)
    optimizer = train(params, _grads(2))
    optimizer.param_groups[0].update(master_weights=True, exp_avg_dtype=BF16)
    step(optimizer, params, _grads(1)[0])
    assert optimizer.param_groups[0]["exp_avg_dtype"] == "bfloat16"
    for param in params:
        state = optimizer.state[param]
        assert (state["exp_avg"].dtype, state["master"].dtype) == (BF16, torch.float32)
        assert torch.equal(state["master"].to(BF16), param.detach())


@backends
def test_a_learning_rate_of_0_leaves_parameters_and_masters_alone(backend):
    values = torch.tensor([-0.0, 0.0, 1.5, 1e30], dtype=BF16)
    for kwargs in ({"master_weights": True}, {"stochastic_rounding": True, "exp_avg_dtype": BF16}):
        param = values.clone().requires_grad_()
        optimizer = RAdaBeliefW([param], lr=0.0, weight_decay=0.5, **BACKENDS[backend], **kwargs)
        for grad in gradients((4,), 7, dtype=BF16):
            step(optimizer, [param], [grad])
        assert bits(param) == bits(values)
        assert bits(optimizer.state[param].get("master", values.float())) == bits(values.float())
        assert optimizer.state[param]["exp_avg"].count_nonzero() == 4


@pytest.mark.parametrize("backend", ["capturable_foreach", "capturable_single"])
def test_an_overflow_changes_nothing(backend):
    kwargs = {"master_weights": True, "exp_avg_dtype": BF16, "stochastic_rounding": True}
    params = _params(BF16)
    optimizer = train(params, _grads(3), **BACKENDS[backend], **kwargs)
    before = copy.deepcopy([optimizer.state[p] for p in params])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    step(optimizer, params, _grads(1)[0])
    for param, old in zip(params, before, strict=True):
        assert {k: bits(v) for k, v in optimizer.state[param].items()} == {k: bits(v) for k, v in old.items()}
        assert torch.equal(param.detach(), old["master"].to(BF16))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_a_compiled_step_draws_the_same_bits():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, lr = CompileCounterWithBackend("aot_eager"), torch.tensor(0.1)
    params, twins = _params(BF16), _params(BF16)
    compiled, eager = (
        RAdaBeliefW([{"params": group[:1], **OPTIONS[3]}, {"params": group[1:], **OPTIONS[4]}], lr=lr, **capturable)
        for group, capturable in ((params, {}), (twins, {"capturable": True}))
    )
    for param in (*params, *twins):  # on past float32's whole numbers
        optimizer = compiled if param in set(params) else eager
        optimizer.state[param]["step"] = torch.tensor(2.0**24 - 2)
    compiled_step = torch.compile(compiled.step, backend=counter)
    for grads in _grads(6):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        compiled_step()
        step(eager, twins, grads)
    assert counter.frame_count == 1
    assert [bits(p) for p in params] == [bits(p) for p in twins]
