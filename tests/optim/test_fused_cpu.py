"""The pass in C: bits that depend on nothing but the numbers, and no trace left in the process."""

import ctypes
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_dist import extras
from robust_dist.optim import RAdaBeliefW, fused_cpu
from robust_dist.optim.fused_cpu import _KINDS, _Scalars, _table, call, library
from robust_dist.optim.rounding import LOW, random_bits, round_stochastically, tensor_keys
from robust_dist.optim.tensors import TensorLists
from tests.forked import python
from tests.optim.helpers import BACKENDS, bits, gradients, reference, start, train

built = pytest.mark.skipif(library() is None, reason="the C library is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
COPY = {"rate": 1.0, "beta2": 0.9, "grad_scale": 1.0, "decay": 1.0, "kind": 1, "threads": 1}


def moved(param, grad, widest=None, origin=None, key=0, **scalars):
    """`param` after one raw call of the C pass with zero moments."""
    m, v = (torch.zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32)) for _ in range(2))
    kinds = _KINDS[param.dtype], _KINDS[grad.dtype], _KINDS[m.dtype]
    batch = TensorLists([param], [grad], [m], [v], origins=[] if origin is None else [origin])
    keys = None if origin is None else [key]
    call(batch, kinds, _Scalars(**{**COPY, **scalars}), keys=keys, widest=widest)
    return param


def same_numbers(ours, theirs):
    both_nan = ours.isnan() & theirs.isnan()
    return torch.equal(ours.masked_fill(both_nan, 0), theirs.masked_fill(both_nan, 0))


def widths():
    return range(library().robust_dist_widest() + 1) if library() else []


def test_the_library_is_built_where_there_is_a_compiler():
    """The test set-up installs the package; a fallback that nobody notices would make the other tests skip."""
    if os.environ.get("CC") != "false" and subprocess.run(["which", "gcc"], capture_output=True).returncode == 0:
        assert library() is not None, fused_cpu.why_not()


@built
@pytest.mark.parametrize("widest", widths())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_and_written_back_as_it_was(dtype, widest):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    kept = moved(every.clone(), torch.zeros(2**16), widest)
    assert same_numbers(kept, every)


@built
@pytest.mark.parametrize("widest", widths())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_is_rounded_as_torch_rounds_it(dtype, widest):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    ties = halves * (1 + 2.0**-9)
    values = torch.cat([patterns, halves, ties, torch.linspace(-1e-4, 1e-4, 50_001)])
    written = moved(torch.zeros(len(values), dtype=dtype), values, widest, step_size=-1.0)
    assert same_numbers(written, values.to(dtype))


@built
@pytest.mark.parametrize("widest", widths())
@pytest.mark.parametrize("first", [0, 2**32 - 1500, 5 * 2**32 - 3])
def test_a_bfloat16_is_rounded_by_the_bits_that_rounding_py_says(first, widest):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (40_000,), generator=generator).to(torch.int32).view(torch.float32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    values = torch.cat([patterns, halves])
    for key in tensor_keys(0, 1, torch.arange(2)).tolist():
        zeros = torch.zeros(len(values), dtype=torch.bfloat16)
        written = moved(zeros, values, widest, (0, first), key, step_size=-1.0)
        expected = round_stochastically(values, random_bits(key, torch.arange(first, first + len(values))), LOW)
        assert same_numbers(written, expected)


class Chunks:
    """The C code's chunks of tensors that are not there."""

    def __init__(self, numels, threads):
        self.numels, self.threads = torch.tensor(numels), threads
        self.count = library().robust_dist_chunks(self.numels.data_ptr(), len(numels), threads)

    def __getitem__(self, number):
        found = torch.zeros(3, dtype=torch.int64)
        library().robust_dist_chunk(self.numels.data_ptr(), len(self.numels), self.threads, number, found.data_ptr())
        return found.tolist()


@built
@given(numels=st.lists(st.integers(0, 2_000_000), min_size=1, max_size=8), threads=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_the_chunks_cover_every_element_once(numels, threads):
    chunks = Chunks(numels, threads)
    at = dict.fromkeys(range(len(numels)), 0)
    for tensor, first, length in (chunks[number] for number in range(chunks.count)):
        assert first == at[tensor]
        assert 0 < length <= 262_144
        at[tensor] += length
    assert list(at.values()) == numels


@built
@pytest.mark.parametrize("numels", [[2**31 + 5], [7, 2**33 + 1, 0, 2**31 - 1], [2**40 + 3, 1]], ids=str)
def test_the_chunks_of_tensors_beyond_2_31_elements_are_where_they_should_be(numels):
    chunks, size = Chunks(numels, 2), 262_144
    ends = [chunks[number] for number in (0, chunks.count - 1)]
    each = [-(-numel // size) for numel in numels]
    assert chunks.count == sum(each)
    assert ends[0] == [0, 0, min(numels[0], size)]
    last = max(i for i, numel in enumerate(numels) if numel)
    assert ends[1] == [last, (each[last] - 1) * size, numels[last] - (each[last] - 1) * size]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_last_chunk_of_a_tensor_beyond_2_32_elements_is_stepped_where_it_lies(dtype):
    """Its memory is the only one that is there: the pointers are those that its beginning would have."""
    n, first = 1000, 262_144 * 2**15
    params, grads = start((n,), dtype=dtype), gradients((n,), 1, dtype=dtype)[0]
    m, v = (torch.zeros(n, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    kinds = tuple(_KINDS[t.dtype] for t in (params, grads, m))
    batch = TensorLists([params], [grads], [m], [v], origins=[(0, 0)])
    table, arrays = _table(batch, kinds, [11])
    for name, tensor in {"params": params, "grads": grads, "exp_avgs": m, "exp_avg_sqs": v}.items():
        arrays[name][0] -= first * tensor.element_size()
    arrays["numels"][0] = first + n
    scalars, found = _Scalars(**COPY, step_size=0.5), torch.zeros(3, dtype=torch.int64)
    expected = moved(params.clone(), grads, None, (0, first), 11, step_size=0.5)
    library().robust_dist_step_chunk(
        ctypes.byref(table), ctypes.byref(scalars), library().robust_dist_widest(), 2**15, found.data_ptr()
    )
    assert found.tolist() == [0, first, n]
    assert bits(params) == bits(expected)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype):
    params, grads = start((1003,), dtype=dtype), gradients((1003,), 1, dtype=dtype)[0]
    scalars = {"rate": 0.1, "beta2": 0.999, "share": 8e-4, "added_eps": 1e-8, "grad_scale": 0.5, "decay": 0.999}
    scalars |= {"step_size": 0.01, "inner": 1e-8, "outer": 1e-6, "kind": 2}
    ends = [bits(moved(params.clone(), grads, widest, **scalars)) for widest in widths()]
    assert all(end == ends[0] for end in ends)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tensor_cut_in_pieces_gives_what_the_whole_gives(dtype, threads):
    size, cuts = 100_003, [1, 17, 32_768, 32_769, 70_000]
    whole, grads = start((size,), dtype=dtype).requires_grad_(), gradients((size,), 7, dtype=dtype)
    pieces = [piece.clone().requires_grad_() for piece in whole.detach().tensor_split(cuts)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        train([whole], [[g] for g in grads], fused=True)
        train(pieces, [g.tensor_split(cuts) for g in grads], fused=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([piece.detach() for piece in pieces]), whole.detach())


@given(
    backend=st.sampled_from(list(BACKENDS)),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    lr=st.sampled_from([0.0, 1e-3, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    absent=st.integers(0, 2**12 - 1),
    strided=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_backend_equals_the_reference(backend, shapes, dtype, betas, lr, weight_decay, maximize, absent, strided):
    sign = -1.0 if maximize else 1.0
    params = [start(shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    given_ = [gradients(shape, 3, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    if strided:
        given_ = [[_strided(g) for g in grads] for grads in given_]
    rows = [[None if absent >> (3 * i + t) & 1 else grads[t] for i, grads in enumerate(given_)] for t in range(3)]
    optimizer = train(
        params, rows, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, **BACKENDS[backend]
    )
    for i, (param, grads) in enumerate(zip(params, given_, strict=True)):
        seen = [sign * g.double() for t, g in enumerate(grads) if not absent >> (3 * i + t) & 1]
        p, m, v = reference(start(shapes[i], dtype=dtype, seed=i), seen, lr=lr, betas=betas, weight_decay=weight_decay)
        tolerance = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
        torch.testing.assert_close(param.detach().double(), p, **tolerance)
        if seen:
            exact = {"rtol": 2e-6, "atol": 1e-7}
            torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), m, **exact)
            torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"].double(), v, **exact)


def _strided(grad):
    wide = torch.zeros((*grad.shape, 2), dtype=grad.dtype)
    wide[..., 0] = grad
    return wide[..., 0]


@built
def test_channels_last_and_expanded_tensors_are_walked_rightly():
    ends = []
    for options in ({"fused": True}, {"foreach": True}):
        last = start((2, 3, 4, 5), dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
        plain = start((2, 3, 4, 5), dtype=torch.float32).requires_grad_()
        optimizer = RAdaBeliefW([last, plain], **options)
        for t, grad in enumerate(gradients((2, 3, 4, 5), 6, dtype=torch.float32)):
            last.grad = grad.to(memory_format=torch.channels_last) if t % 2 else grad
            plain.grad = torch.full((), 0.1 * t).expand(2, 3, 4, 5)
            optimizer.step()
        ends.append((last.detach().contiguous(), plain.detach()))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def lazy_negation():
    found = torch.tensor([1 + 2j]).conj().imag
    assert found.is_neg()
    assert found.is_contiguous()
    return found


@built
def test_a_gradient_that_is_a_lazy_negation_is_read_with_its_sign():
    ends = []
    for options in ({"fused": True}, {"foreach": True}):
        param = torch.zeros(1, requires_grad=True)
        optimizer = RAdaBeliefW([param], **options)
        for _ in range(6):
            param.grad = lazy_negation()
            optimizer.step()
        ends.append((param.detach(), optimizer.state[param]["exp_avg"]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@built
def test_a_parameter_that_is_a_lazy_negation_is_refused_as_torch_refuses_it():
    param = lazy_negation().requires_grad_()
    param.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="negation"):
        RAdaBeliefW([param], fused=True).step()


@built
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_do_what_they_do_in_the_reference(value):
    grads = gradients((5,), 7, dtype=torch.float32)
    grads[5][2] = value
    param = start((5,), dtype=torch.float32).requires_grad_()
    train([param], [[g] for g in grads], fused=True)
    p, _, _ = reference(start((5,), dtype=torch.float32), grads)
    torch.testing.assert_close(param.detach().double(), p, rtol=2e-6, atol=1e-6, equal_nan=True)


@built
def test_autograd_notices_a_parameter_that_was_stepped_between_forward_and_backward():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    RAdaBeliefW([weight], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@built
def test_two_threads_with_two_optimizers_do_not_disturb_each_other():
    def run(seed, ends):
        grads = gradients((70_000,), 30, dtype=torch.float32, seed=seed)
        param = start((70_000,), dtype=torch.float32, seed=seed).requires_grad_()
        train([param], [[g] for g in grads], fused=True)
        ends[seed] = param.detach()

    alone, together = {}, {}
    for seed in (1, 2):
        run(seed, alone)
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(alone[seed], together[seed]) for seed in (1, 2))


FORKED = """
import os
from torch.utils.data import DataLoader, Dataset
from robust_dist.optim import RAdaBeliefW
param = torch.ones(200_000, requires_grad=True)
param.grad = torch.ones_like(param)
optimizer = RAdaBeliefW([param], fused=True)
def stepped():
    torch.set_num_threads(2)
    optimizer.step()
    return param.detach()[-1:].clone()
stepped()
child = os.fork()
if child == 0:
    stepped()
    os._exit(0 if optimizer.state[param]["step"].item() == 2 else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
class Steps(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return stepped()
seen = torch.cat(list(DataLoader(Steps(), num_workers=2, multiprocessing_context="fork")))
second, third = stepped(), stepped()
assert torch.equal(seen, torch.stack([second, second, third, third])), (seen, second, third)
"""
DENORMALS = """
from robust_dist.optim import RAdaBeliefW
def denormals_survive():
    tiny = torch.full((100_000,), 1e-40)
    return bool((tiny * 0.5 > 0).all()) and 1e-310 * 0.5 > 0
assert denormals_survive()
param = torch.ones(200_000, requires_grad=True)
param.grad = torch.ones_like(param)
RAdaBeliefW([param], fused=True).step()
assert denormals_survive()
"""


@built
@pytest.mark.parametrize("script", [FORKED, DENORMALS], ids=["forked children step", "denormals survive"])
def test_the_process_is_left_as_it_was(script):
    code, said = python("-c", "import torch\ntorch.set_num_threads(2)\n" + script)
    assert code == 0, said


@built
@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "fused_cpu"), ({"fused": True}, "fused_cpu"), ({"fused": False}, "foreach"), ({"foreach": True}, "foreach")],
)
def test_the_compiled_backend_is_taken_unless_it_is_declined(options, name):
    assert RAdaBeliefW([start((4,)).requires_grad_()], **options).backend_in_use() == name


def test_without_the_library_foreach_takes_over_and_fused_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(fused_cpu, "_load", lambda: "it was not built: no C compiler")
    fused_cpu.library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"no fused backend here, on cpu \(it was not built: no C compiler"):
            RAdaBeliefW([start((3,)).requires_grad_()], fused=True)
        param = start((3,)).requires_grad_()
        grads = gradients((3,), 9)
        train([param], [[g] for g in grads])
        torch.testing.assert_close(param.detach(), reference(start((3,)), grads)[0], rtol=1e-12, atol=1e-13)
    finally:
        fused_cpu.library.cache_clear()


@pytest.mark.parametrize(
    ("text", "why"), [(None, "was not built"), (b"no library", "cannot be loaded"), ("own", "was built from other")]
)
def test_a_library_that_is_absent_broken_or_of_other_sources_is_a_reason_and_no_error(tmp_path, text, why):
    if text == "own":
        built = next(Path(fused_cpu.__file__).parent.glob("_fused*.so"), None) or pytest.skip("it was not built")
        (tmp_path / "_fused.so").write_bytes(built.read_bytes())
    elif text is not None:
        (tmp_path / "_fused.so").write_bytes(text)
    assert why in extras.load_library(tmp_path, lambda found: found.no_such_function)


SHARES = [
    # cores, ranks of this host, torch's threads, threads of a step
    (16, None, 16, 16),
    (16, None, 1, 1),  # as somebody wants it
    (16, "4", 1, 4),  # what Accelerate and torchrun leave a rank
    (16, "4", 16, 4),  # what DeepSpeed's launcher leaves it
    (16, "4", 3, 3),
    (16, "1", 1, 16),
    (2, "8", 1, 1),
    (0.5, "2", 4, 1),
    (16, "many", 16, 16),
]


@pytest.mark.parametrize(("cores", "ranks", "of_torch", "expected"), SHARES)
@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_a_step_takes_the_cores_of_its_rank_and_not_all_of_the_host_s(
    monkeypatch, name, cores, ranks, of_torch, expected
):
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    if ranks is not None:
        monkeypatch.setenv(name, ranks)
    monkeypatch.setattr(fused_cpu, "usable_cores", lambda: cores)
    before = torch.get_num_threads()
    torch.set_num_threads(of_torch)
    fused_cpu._share.cache_clear()
    try:
        assert fused_cpu.threads() == expected
    finally:
        torch.set_num_threads(before)
        fused_cpu._share.cache_clear()
