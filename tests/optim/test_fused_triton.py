"""The CUDA step in Triton, from the same source by Triton's interpreter on the CPU and, marked gpu, on a device."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from robust_dist.optim import RAdaBeliefW, fused_triton, fused_triton_plan, fused_triton_table
from robust_dist.optim.fused_cpu import library
from robust_dist.optim.fused_triton_table import CHUNK, chunk_length, chunk_table, upload
from robust_dist.optim.reference import reference_step
from robust_dist.optim.settings import hyper
from tests.optim import interpreted
from tests.optim.helpers import bits, gradients, reference, start, step
from tests.optim.interpreted import CPU, at_step_6, leaves, snapshot, train

# The interpreter of older ones breaks on NumPy 2.4.
pytest.importorskip("triton", minversion="3.3")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
built = pytest.mark.skipif(library() is None, reason="the C library is not built")


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    lr=st.sampled_from([0.0, 1e-3, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    absent=st.integers(0, 2**9 - 1),
    strided=st.booleans(),
)
@settings(
    max_examples=8,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_kernels_equal_the_reference(device, shapes, dtype, betas, lr, weight_decay, maximize, absent, strided):
    sign = -1.0 if maximize else 1.0
    params = leaves(device, shapes, dtype)
    given_ = [gradients(shape, 3, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    if strided:
        given_ = [[torch.stack([g, g], -1)[..., 0] for g in grads] for grads in given_]
    rows = [[None if absent >> (3 * i + t) & 1 else grads[t] for i, grads in enumerate(given_)] for t in range(3)]
    optimizer = train(params, rows, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
    for i, (param, grads) in enumerate(zip(params, given_, strict=True)):
        seen = [sign * g.double() for t, g in enumerate(grads) if not absent >> (3 * i + t) & 1]
        p, m, v = reference(start(shapes[i], dtype=dtype, seed=i), seen, lr=lr, betas=betas, weight_decay=weight_decay)
        torch.testing.assert_close(param.detach().cpu().double(), p, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        if seen:
            exact = {"rtol": 2e-6, "atol": 1e-7}
            state = optimizer.state[param]
            torch.testing.assert_close(state["exp_avg"].cpu().double(), m, **exact)
            torch.testing.assert_close(state["exp_avg_sq"].cpu().double(), v, **exact)
            assert state["step"].item() == len(seen)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.99, 0.9), (0.9, 0.6)])
def test_the_scalars_of_every_step_count_equal_the_reference(device, betas):
    """All counts in one step, a tensor each; float32 scalars would be off by 2 % at t = 5."""
    counts = [1, 2, 4, 5, 6, 30, 1000, 10**6]
    params = leaves(device, [(2,)] * len(counts), torch.float64)
    optimizer = RAdaBeliefW(params, lr=0.03, betas=betas)
    m, v, grad = torch.tensor([0.01, -0.02]).double(), torch.tensor([1e-4, 2e-4]).double(), gradients((2,), 1)[0]
    for param, count in zip(params, counts, strict=True):
        moments = {"exp_avg": m.to(device, copy=True), "exp_avg_sq": v.to(device, copy=True)}
        optimizer.state[param].update(step=torch.tensor(count - 1.0), **moments)
    step(optimizer, params, [grad.to(device)] * len(params))
    for i, (param, count) in enumerate(zip(params, counts, strict=True)):
        expected = reference_step(start((2,), seed=i), grad, m, v, count, lr=0.03, betas=betas)
        state = optimizer.state[param]
        for ours, theirs in zip((param.detach(), state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=0)
        assert state["step"].item() == count


PLACES_OF_EPS = [("inside", True), ("outside", True), ("outside_uncorrected", False)]
places_of_eps = pytest.mark.parametrize(("place", "accumulate"), PLACES_OF_EPS, ids=str)


def same_as_in_c(params, twins, grads, *, keep_gradients=False, **options):
    """Step both from the same state, once here and once by the pass in C, and compare their bits."""
    for param, twin, grad in zip(params, twins, grads, strict=True):
        twin.grad = torch.zeros_like(twin)
        twin.grad.data = grad.clone()
        if not keep_gradients:
            param.grad = torch.zeros_like(param)
            param.grad.data = grad.to(param.device)
    ours, theirs = at_step_6(params, **options), at_step_6(twins, **options)
    ours.step()
    with interpreted.away():
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        # exp and log of another library may differ in the last bit of a float64
        # and where y and z are nearly the same, that is more
        close = {"rtol": 1e-12, "atol": 1e-14} if "averaging" in options else {"rtol": 1e-14, "atol": 0}
        tolerance = close if param.dtype is torch.float64 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(param.detach().cpu(), twin.detach(), **tolerance)
        for key, kept in theirs.state[twin].items():
            if key == "z":
                torch.testing.assert_close(ours.state[param][key].cpu(), kept, **tolerance)
            else:
                assert bits(ours.state[param][key].cpu()) == bits(kept), key


MEMORY = [
    {"exp_avg_dtype": torch.bfloat16},
    {"stochastic_rounding": True, "seed": 2**62 + 7},
    {"exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True},
    {"master_weights": True},
    {"master_weights": True, "exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True, "lr": 0.0},
]


@built
@places_of_eps
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_the_kernels_give_the_bits_of_the_pass_in_c(device, dtype, grad_dtype, place, accumulate):
    shapes = [(9,), ()]
    grads = [gradients(shape, 1, dtype=grad_dtype)[0] for shape in shapes]
    options = {"eps": 1e-4, "eps_placement": place, "accumulate_eps": accumulate, "rectify_threshold": 5.0}
    same_as_in_c(leaves(device, shapes, dtype), leaves(CPU, shapes, dtype), grads, **options)


@built
@pytest.mark.parametrize("offset", [0, 1])
def test_a_tensor_of_several_chunks_is_stepped_to_its_end_wherever_it_lies(device, offset):
    sizes = [CHUNK + fused_triton.BLOCK + 3, CHUNK]
    whole = [start((size + offset,), dtype=torch.float32) for size in sizes]
    params = [t.to(device)[offset:].requires_grad_() for t in whole]
    twins = [t[offset:].clone().requires_grad_() for t in whole]
    same_as_in_c(params, twins, [gradients((size,), 1, dtype=torch.float32)[0] for size in sizes])


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_odd_addresses_change_no_bit(device, dtype):
    """DDP's buckets and FSDP's shards put gradients side by side, wherever the one before ends."""
    sizes = [2 * fused_triton.BLOCK + 4, 6, fused_triton.BLOCK]
    bucket = gradients((sum(sizes) + 1,), 1, dtype=dtype)[0].to(device)
    views = bucket[1:].split(sizes)
    assert [view.data_ptr() % 16 != 0 for view in views] == [True] * len(sizes)
    params, twins = (leaves(where, [(size,) for size in sizes], dtype) for where in (device, CPU))
    for param, view in zip(params, views, strict=True):
        assert param.data_ptr() % 16 == 0
        param.grad = view
    same_as_in_c(params, twins, [view.cpu() for view in views], keep_gradients=True)


@built
@pytest.mark.parametrize("programs", [1, 2, 1 << 20])
def test_bits_do_not_depend_on_the_length_of_a_chunk(device, monkeypatch, programs):
    monkeypatch.setattr(fused_triton_table, "PROGRAMS", programs)
    sizes = [2 * CHUNK + 5, 7]
    assert chunk_length(sum(sizes)) == {1: 4 * CHUNK, 2: 2 * CHUNK, 1 << 20: CHUNK}[programs]
    params, twins = (leaves(where, [(size,) for size in sizes], torch.float32) for where in (device, CPU))
    same_as_in_c(params, twins, [gradients((size,), 1, dtype=torch.float32)[0] for size in sizes])


def test_large_models_get_long_chunks_so_that_programs_are_enough_and_not_too_many():
    assert [chunk_length(numel) for numel in (0, 853_018, 11_173_962, 25_557_032, 100_000_000, 10**10)] == [
        CHUNK,
        CHUNK,
        CHUNK,
        2 * CHUNK,
        4 * CHUNK,
        4 * CHUNK,
    ]
    assert all(chunk_length(numel) % fused_triton.BLOCK == 0 for numel in (1, 10**8, 10**10))


@built
@pytest.mark.parametrize("options", MEMORY, ids=str)
def test_what_is_kept_in_bfloat16_has_the_bits_of_the_pass_in_c(device, options):
    shapes = [(9,), (4, 2)]
    grads = [gradients(shape, 1, dtype=torch.bfloat16)[0] for shape in shapes]
    same_as_in_c(leaves(device, shapes, torch.bfloat16), leaves(CPU, shapes, torch.bfloat16), grads, **options)


AVERAGING = {"averaging": "schedule_free"}


@built
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3},
        {"eps": 1e-4, "eps_placement": "outside", "maximize": True},
        {"betas": (0.8, 0.6)},  # never rectified
        {"betas": (0.9, 0.99), "decay_by_rate": False, "weight_decay": 0.3},
        {"lr": 0.0},
        *MEMORY,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averaging_has_the_bits_of_the_pass_in_c(device, dtype, options):
    if dtype is not torch.bfloat16 and options in MEMORY:
        pytest.skip("of bfloat16")
    shapes = [(9,), (fused_triton.BLOCK + 1,)]
    grads = [gradients(shape, 1, dtype=dtype)[0] for shape in shapes]
    same_as_in_c(leaves(device, shapes, dtype), leaves(CPU, shapes, dtype), grads, **AVERAGING, **options)


@built
def test_a_decay_that_is_not_multiplied_by_the_rate_is_not(device):
    grads = [gradients((9,), 1, dtype=torch.float32)[0]]
    params, twins = (leaves(where, [(9,)], torch.float32) for where in (device, CPU))
    same_as_in_c(params, twins, grads, decay_by_rate=False, weight_decay=0.3)


@built
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9), (0.9, 0.5)])
def test_the_share_of_every_step_count_is_that_of_the_pass_in_c(device, betas):
    """beta2 = 0.9 has a table of 500 steps, 0.5 of one."""
    counts = [1, 2, 4, 5, 6, 30, 500, 501, 60_000, 10**6]
    found = []
    for where in (device, CPU):
        params = leaves(where, [(2,)] * len(counts), torch.float64)
        optimizer = RAdaBeliefW(params, lr=0.03, betas=betas, **AVERAGING)
        for param, count in zip(params, counts, strict=True):
            ones = torch.ones_like(param, requires_grad=False)
            state = {"step": torch.tensor(count - 1.0), "exp_avg": ones * 0.03, "exp_avg_sq": ones * 0.01, "z": ones}
            optimizer.state[param].update(state)
        grads = [gradients((2,), 1)[0].to(where)] * len(params)
        if where is CPU and device is CPU and found:
            with interpreted.away():
                step(optimizer, params, grads)
        else:
            step(optimizer, params, grads)
        found.append([(p.detach().cpu(), optimizer.state[p]["z"].cpu()) for p in params])
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=0)  # eq. 13 cancels at t = 5


def test_a_group_that_averages_beside_one_that_does_not(device, launches):
    both, alone = (leaves(device, [(5,), (4,)], torch.float32) for _ in range(2))
    options = [AVERAGING, {"weight_decay": 0.3, "decay_by_rate": False}]
    grads = [gradients((9,), 7, dtype=torch.float32)[t].to(device).split([5, 4]) for t in range(7)]
    optimizer = RAdaBeliefW([{"params": [p], **o} for p, o in zip(both, options, strict=True)], lr=0.03)
    for row in grads:
        step(optimizer, both, row)
    assert {kinds[-1] for kinds in launches} == {False, True}
    for i, (param, option) in enumerate(zip(alone, options, strict=True)):
        train([param], [[row[i]] for row in grads], lr=0.03, **option)
    assert list(map(bits, both)) == list(map(bits, alone))


def test_all_groups_that_share_dtypes_are_stepped_by_one_launch(device, launches):
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    options = [
        {"lr": 0.1, "betas": (0.8, 0.99)},
        {"weight_decay": 0.5},
        {"maximize": True},
        {"eps_placement": "outside"},
    ]
    params = [leaves(device, [(3,), (2, 2)], dtype) for dtype in dtypes]
    optimizer = RAdaBeliefW([{"params": p, **o} for p, o in zip(params, options, strict=True)])
    grads = [[g.to(device) for g in gradients((4,), 2, dtype=dtype)] for dtype in dtypes]
    shaped = [(flat[:3], square.view(2, 2)) for flat, square in grads]
    for group, pair in zip(params, shaped, strict=True):
        for param, grad in zip(group, pair, strict=True):
            param.grad = grad.clone()
    optimizer.step()
    assert len(launches) == 2
    assert {kinds[0] for kinds in launches} == {"float32", "uint16"}
    for dtype, option, group, pair in zip(dtypes, options, params, shaped, strict=True):
        twins = leaves(device, [(3,), (2, 2)], dtype)
        with interpreted.away():
            step(RAdaBeliefW(twins, foreach=True, **option), twins, pair)
        for param, twin in zip(group, twins, strict=True):
            torch.testing.assert_close(param.detach(), twin.detach(), rtol=2e-6, atol=1e-7)


@given(
    numels=st.lists(st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 2**31 + 5]), max_size=5),
    length=st.sampled_from([CHUNK, 4 * CHUNK]),
)
@settings(max_examples=30, deadline=None)
def test_the_chunks_cover_every_element_once(numels, length):
    rows = [7 * i + 3 for i in range(len(numels))]
    chunks = chunk_table(numels, rows, CPU, length)
    for row, numel in zip(rows, numels, strict=True):
        numbers = chunks[chunks[:, 0] == row, 1]
        assert torch.equal(numbers, torch.arange(-(-numel // length)))
        if numel:
            assert 0 < numel - numbers[-1].item() * length <= length
    assert len(chunks) == sum(-(-numel // length) for numel in numels)


def test_elements_beyond_2_31_are_found(device):
    """A tensor of which only the end exists: the table says that it begins where that would make it begin."""
    numel = 2**31 + 5
    number = numel // CHUNK
    first = number * CHUNK
    whole = [leaves(device, [(numel - first,)], torch.float32) for _ in range(2)]
    grad = gradients((numel - first,), 1, dtype=torch.float32)[0].to(device)
    optimizers = [at_step_6(params) for params in whole]
    for params, optimizer in zip(whole, optimizers, strict=True):
        params[0].grad = grad.clone()
        optimizer._init_group(optimizer.param_groups[0], [], [], [], [], [], [], [], [], [])
    step(optimizers[0], whole[0], [grad])
    rows = fused_triton_plan.Rows()
    rows.add(optimizers[1]._gather(optimizers[1].param_groups[0]), hyper(optimizers[1].param_groups[0]))
    columns = rows.host_columns()
    for column in (0, 1, 2, 3):
        columns[column][0] -= first * 4
    columns[5][0] = numel
    plan = fused_triton_plan.plan(rows)
    plan.table[: len(columns)] = torch.tensor(columns)
    settings_ = upload(fused_triton_table.settings_words(rows.hypers[0], device), device)
    fused_triton._advance(plan.table, settings_, None, None)
    grads = upload([whole[1][0].grad.data_ptr() - first * 4], device)
    fused_triton._step(plan.table, grads, torch.tensor([[0, number]], device=device), plan.launches[0].kinds)
    assert snapshot(optimizers[1]) == snapshot(optimizers[0])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradients_are_unscaled_and_an_overflow_changes_nothing(device, shape):
    params, twins = (leaves(device, [(5,), (2,)], torch.float32) for _ in range(2))
    optimizer, twin = at_step_6(params), at_step_6(twins)
    grads = [gradients(p.shape, 1, dtype=torch.float32)[0].to(device) for p in params]
    step(twin, twins, grads)
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 1024.0), torch.full(shape, 1.0)
    step(optimizer, params, [g * float("inf") for g in grads])
    assert snapshot(optimizer) == snapshot(at_step_6(leaves(device, [(5,), (2,)], torch.float32)))
    optimizer.found_inf = torch.zeros(shape, device=device)
    step(optimizer, params, [g * 1024 for g in grads])
    assert snapshot(optimizer) == snapshot(twin)
    assert all(torch.equal(p.grad, g * 1024) for p, g in zip(params, grads, strict=True))


def test_a_learning_rate_of_0_leaves_the_bits_of_parameters_alone(device):
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.tensor([-0.0, 0.0, 1.5, -3e-39, 1e30, float("nan")]).to(dtype)
        param = values.to(device, copy=True).requires_grad_()
        optimizer = RAdaBeliefW([param], lr=0.0, weight_decay=0.5)
        step(optimizer, [param], [torch.ones_like(param)])
        assert bits(param.cpu()) == bits(values)
        assert optimizer.state[param]["exp_avg"].cpu().eq(0.1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_do_what_they_do_in_the_reference(device, value):
    params, grad = leaves(device, [(5,)], torch.float32), gradients((5,), 1, dtype=torch.float32)[0]
    grad[2] = value
    optimizer = at_step_6(params)
    m, v = (optimizer.state[params[0]][key].cpu().double() for key in ("exp_avg", "exp_avg_sq"))
    step(optimizer, params, [grad.to(device)])
    expected = reference_step(start((5,), dtype=torch.float32).double(), grad.double(), m, v, 7, lr=0.03)
    torch.testing.assert_close(params[0].detach().cpu().double(), expected[0], rtol=2e-6, atol=1e-6, equal_nan=True)


def test_what_does_not_lie_flat_is_stepped_rightly_beside_what_does(device):
    last = torch.channels_last
    views = [start((4, 6)).t(), start((4, 6))[:, ::2], start((2, 3, 2, 2)).to(memory_format=last), start((3,))]
    params = [view.to(device).requires_grad_() for view in views]
    params[1] = start((4, 6)).to(device)[:, ::2].requires_grad_()
    copies = [p.detach().cpu().clone().contiguous() for p in params]
    grads = [gradients(p.shape, 3, seed=i) for i, p in enumerate(params)]
    for row in zip(*grads, strict=True):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.to(device)
        params[2].grad = row[2].to(device, memory_format=last)
        optimizer = locals().get("optimizer") or RAdaBeliefW(params)
        optimizer.step()
    for param, value, own in zip(params, copies, grads, strict=True):
        torch.testing.assert_close(param.detach().cpu(), reference(value, own)[0], rtol=1e-12, atol=1e-13)
        assert optimizer.state[param]["step"].item() == 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_is_stepped_as_two_real_ones(device, launches, dtype):
    real = start((3, 2)).to(torch.view_as_real(torch.zeros((), dtype=dtype)).dtype).to(device)
    pairs = [g.to(real) for g in gradients((3, 2), 2)]
    number, pair = torch.view_as_complex(real.clone()).requires_grad_(), real.clone().requires_grad_()
    optimizer, twin = RAdaBeliefW([number]), RAdaBeliefW([pair])
    lazy = torch.view_as_complex(pairs[1]).conj().resolve_conj().conj()
    assert lazy.is_conj()
    for number.grad, grad in zip((torch.view_as_complex(pairs[0]), lazy), pairs, strict=True):
        optimizer.step()
        step(twin, [pair], [grad])
    torch.testing.assert_close(torch.view_as_real(number.detach()), pair.detach(), rtol=1e-6, atol=0)
    assert len(launches) == 3  # a lazily conjugated gradient is no array of its numbers


def test_a_gradient_that_is_a_lazy_negation_is_read_with_its_sign(device):
    params = [torch.zeros(1, device=device, requires_grad=True) for _ in range(2)]
    lazy = torch.tensor([1 + 2j]).conj().imag.to(device)
    optimizers = [RAdaBeliefW([param]) for param in params]
    for _ in range(6):
        for param, optimizer, grad in zip(params, optimizers, (lazy, lazy.resolve_neg()), strict=True):
            param.grad = grad
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-7)
