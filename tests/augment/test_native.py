"""The pass in C gives the bits of torch's operations, whatever the sizes, settings, threads and instruction sets."""

import dataclasses
import os
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, fused_cpu, sample_keys
from tests.augment.reference import CELLS, pictures, plan_of
from tests.forked import python

built = pytest.mark.skipif(fused_cpu.missing() is not None, reason="the C library is not built")
WIDTHS = range(0 if fused_cpu.missing() else fused_cpu._load().robust_dist_widest() + 1)
KINDS = ["noise", "smooth", "grey", "low contrast", "constant", "two levels"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SEED = st.integers(0, 2**32)


def test_the_library_is_built_where_there_is_a_compiler():
    """The test set-up installs the package; a fallback that nobody notices would make the other tests skip."""
    if os.environ.get("CC") != "false" and subprocess.run(["which", "gcc"], capture_output=True).returncode == 0:
        assert fused_cpu.missing() is None


@built
def test_the_native_backend_is_what_auto_takes_on_the_processor():
    assert RobustAugment(10, 8, [0.5], [0.2]).backend_for("cpu") == "native"
    assert TrivialAugment().backend_for("cpu") == "native"


@built
@pytest.mark.parametrize("widest", WIDTHS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("kind", "channels", "height", "width", "fill"),
    [(kind, 3, 32, 32, 0) for kind in KINDS]
    + [("noise", 1, 33, 47, 0), ("noise", 3, 8, 8, 77), ("smooth", 3, 65, 17, (1, 200, 99))]
    + [("noise", 3, 2, 9, 0), ("noise", 3, 3, 1, 255), ("low contrast", 1, 9, 64, 5), ("noise", 3, 1, 1, 0)],
)
def test_every_operation_bin_and_sign_equals_torchs(kind, channels, height, width, fill, interpolation, widest):
    cells = CELLS if interpolation == "nearest" else [cell for cell in CELLS if 1 <= cell[0] <= 5]
    images, plan = pictures(kind, (len(cells), channels, height, width)), plan_of(cells)
    stage = TrivialAugment(interpolation=interpolation, fill=fill, backend="torch")
    assert torch.equal(fused_cpu.trivial(stage, images, plan, widest), stage.apply(images, plan))


@built
@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
    batch=st.sampled_from([0, 1, 2, 7, 16, 19]),
    flags=st.fixed_dictionaries({name: st.booleans() for name in ("flip", "trivial", "cutmix", "channels_last")}),
    crop=st.sampled_from([None, 1, 4, 50]),
    mixing=st.fixed_dictionaries(
        {
            "cutmix_mode": st.sampled_from(["elem", "batch"]),
            "cutmix_alpha": st.sampled_from([1.0, 0.2, 3.0]),
            "cutmix_p": st.sampled_from([0.0, 0.5, 1.0]),
            "block": st.sampled_from([1, 2, 8, 64]),
        }
    ),
    look=st.fixed_dictionaries(
        {
            "num_bins": st.sampled_from([2, 31, 40]),
            "interpolation": st.sampled_from(["nearest", "bilinear"]),
            "fill": st.sampled_from([0, 128, 255]),
            "dtype": st.sampled_from(DTYPES),
        }
    ),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    gathered=st.booleans(),
    seed=SEED,
)
@settings(max_examples=150, deadline=None)
def test_the_pipeline_equals_torchs(shape, batch, flags, crop, mixing, look, layout, gathered, seed):
    module = RobustAugment(
        7, shape[1:], [0.4] * shape[0], [0.3] * shape[0], crop=crop, backend="torch", **flags, **mixing, **look
    )
    size = 23 if gathered else batch
    images, labels = pictures("noise", (size, *shape), seed), torch.arange(size) % 7
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        images = images.repeat_interleave(2, 3)[..., ::2]
    index = torch.randint(0, 23, (batch,), generator=torch.Generator().manual_seed(seed)) if gathered else None
    keys = sample_keys(seed, 0, range(batch))
    expected = module(images, labels, keys, index=index)
    for widest in WIDTHS:
        found = fused_cpu.augment(module, images, labels, keys, index, widest)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        assert found[0].is_contiguous(memory_format=module.out_format(images))


@built
@pytest.mark.parametrize("size", [(65, 131), (3, 4201), (224, 224)])
@pytest.mark.parametrize("options", [{}, {"channels_last": True, "dtype": torch.bfloat16, "interpolation": "bilinear"}])
def test_images_of_several_bands_equal_torchs(size, options):
    images, labels, keys = pictures("smooth", (16, 3, *size)), torch.arange(16) % 10, sample_keys(2, 3, range(16))
    module = RobustAugment(10, size, [0.4] * 3, [0.3] * 3, backend="torch", **options)
    expected = module(images, labels, keys)
    for widest in WIDTHS:
        for ours, theirs in zip(fused_cpu.augment(module, images, labels, keys, None, widest), expected, strict=True):
            assert torch.equal(ours, theirs)


@built
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_trivial_augment_and_cutmix_alone_equal_torchs(form, dtype):
    levels, labels, keys = pictures("noise", (19, 3, 13, 21)), torch.arange(19) % 10, sample_keys(1, 2, range(19))
    images = (levels if dtype == torch.uint8 else (levels / 255).to(dtype)).contiguous(memory_format=form)
    for make in (TrivialAugment, lambda **s: CutMix(10, mode="elem", **s), lambda **s: CutMix(10, alpha=0.5, **s)):
        parts = (images, keys) if make is TrivialAugment else (images, labels, keys)
        ours, theirs = (make(backend=backend)(*parts) for backend in ("native", "torch"))
        for one, other in zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@built
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_boxes_made_by_hand_are_clipped_and_empty_ones_cut_nothing(channels):
    images, labels = pictures("noise", (6, channels, 7, 9)), torch.zeros(6, dtype=torch.int64)
    plan = dataclasses.replace(
        CutMix(10, mode="elem").plan(sample_keys(0, 0, range(6)), 7, 9),
        box=torch.tensor([[-3, -2, 20, 30], [4, 4, 4, 9], [5, 1, 2, 6], [0, 0, 9, 7], [8, 6, 9, 7], [0, 9, 3, 12]]),
    )
    ours, theirs = (CutMix(10, backend=backend).apply(images, labels, plan)[0] for backend in ("native", "torch"))
    assert torch.equal(ours, theirs)


@built
def test_images_that_want_a_gradient_are_mixed_by_torch():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    mixed, _ = CutMix(10, backend="native")(images, torch.zeros(4, dtype=torch.int64))
    mixed.sum().backward()
    assert images.grad.sum() == images.numel()


@built
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_every_integer_type_pass(dtype):
    images, keys = pictures("noise", (5, 3, 12, 16)), sample_keys(0, 0, range(5))
    ours, theirs = (
        RobustAugment(10, (12, 16), [0.5] * 3, [0.2] * 3, backend=backend)(images, torch.arange(5).to(dtype), keys)
        for backend in ("native", "torch")
    )
    assert torch.equal(ours[1], theirs[1])


@built
def test_a_fill_of_other_channels_is_refused():
    module = RobustAugment(10, 8, [0.5], [0.2], crop=None, fill=(1, 2, 3), backend="native")
    with pytest.raises(ValueError, match="fill has 3 channels, the images have 1"):
        module(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))


@built
def test_a_dtype_of_one_byte_is_not_taken_for_levels():
    images, labels, keys = (
        pictures("noise", (9, 3, 8, 8)),
        torch.zeros(9, dtype=torch.int64),
        sample_keys(0, 0, range(9)),
    )
    ours, theirs = (
        RobustAugment(10, 8, [0.5] * 3, [0.2] * 3, backend=backend, dtype=torch.float8_e4m3fn)(images, labels, keys)[0]
        for backend in ("native", "torch")
    )
    assert torch.equal(ours.float(), theirs.float())


@built
def test_a_new_dtype_gives_a_new_scale():
    module, parts = (
        RobustAugment(10, 8, [0.5], [0.2], backend="native"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])),
    )
    assert module(*parts)[0].dtype == torch.float32
    module.dtype = torch.bfloat16
    assert module(*parts)[0].dtype == torch.bfloat16


@built
def test_code_that_is_being_compiled_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert TrivialAugment().backend_for("cpu") == "torch"
    with pytest.raises(RuntimeError, match='backend="native" cannot be compiled: set backend="auto" or "torch"'):
        TrivialAugment(backend="native").backend_for("cpu")


THREADS = """
import os, torch
from robust_dist.augment import RobustAugment, sample_keys
torch.set_num_threads(1)  # torch's own pool would not survive the fork
images, labels = torch.randint(0, 256, (64, 3, 24, 24), dtype=torch.uint8), torch.arange(64) % 10
module, keys = RobustAugment(10, 24, [0.5] * 3, [0.2] * 3, backend="native"), sample_keys(0, 0, range(64))
def augmented():
    return module(images, labels, keys)[0].numpy().tobytes()
alone = augmented()
torch.set_num_threads(2)
assert augmented() == alone
child = os.fork()
if child == 0:
    os._exit(0 if augmented() == alone else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert augmented() == alone
"""


@built
def test_one_thread_two_threads_and_a_forked_child_give_the_same():
    code, said = python("-c", THREADS)
    assert code == 0, said
