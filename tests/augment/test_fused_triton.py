"""Triton's kernels give the bits of torch's operations: by the interpreter here, on a GPU where there is one."""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from robust_dist.augment import RobustAugment, TrivialAugment, fused_triton, sample_keys
from tests.augment.interpreted import Interpreter
from tests.augment.reference import pictures, plan_of

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SIGNED, BINNED, PLAIN = range(1, 10), (10, 11), (0, 12, 13)
CORNERS = [
    *((op, b, negative) for op in SIGNED for b in (13, 30) for negative in (0, 1)),
    *((5, 20, negative) for negative in (0, 1)),  # a quarter turn: in 8 x 11 every pixel is read between two
    *((op, b, 0) for op in BINNED for b in (0, 15, 30)),
    *((op, 0, 0) for op in PLAIN),
]


@pytest.fixture(scope="module")
def interpreter():
    pytest.importorskip("triton", minversion="3.3")  # the interpreter of older ones breaks on NumPy 2.4
    with Interpreter() as running:
        yield running


def make(shape, **settings):
    return RobustAugment(10, shape[2:], MEAN[: shape[1]], STD[: shape[1]], **settings)


def keys_of(cells, num_bins=31):
    """Keys that draw the operation, bin and sign of each cell."""
    keys = sample_keys(5, 0, range(30 * 14 * num_bins * 2))
    plan = make((1, 1, 1, 1), num_bins=num_bins).trivial.plan(keys)
    drawn = (plan.op * num_bins + plan.magnitude_bin) * 2 + plan.negative.long()
    wanted = torch.tensor([(op * num_bins + b) * 2 + negative for op, b, negative in cells])
    first = (drawn == wanted.unsqueeze(1)).int().argmax(1)
    assert torch.equal(drawn[first], wanted)
    return keys[first]


def batch(shape, kind="noise", cells=()):
    keys = keys_of(cells) if cells else sample_keys(3, 0, range(shape[0]))
    shape = (keys.shape[0], *shape[1:])
    return pictures(kind, shape), torch.arange(shape[0]) % 10, keys


def by_torch(module, images, labels, keys, index=None):
    module = copy.deepcopy(module)
    for stage in (module, module.trivial, module.cutmix):
        if stage is not None:
            stage.backend = "torch"
    return module(images, labels, keys, index=index)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


CASES = {
    "colour": ((0, 3, 8, 11), {}),
    "grey": ((0, 1, 11, 9), {"cutmix_mode": "batch", "cutmix_alpha": 0.5, "fill": 200}),
    "bilinear": ((0, 3, 8, 9), {"interpolation": "bilinear", "crop": None, "fill": (10, 200, 90)}),
    "bilinear grey": ((0, 1, 9, 8), {"interpolation": "bilinear", "fill": 255, "cutmix_p": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_operation_at_small_and_large_bins_of_both_signs_equals_torchs(case, interpreter):
    shape, settings = CASES[case]
    module, parts = make(shape, **settings), batch(shape, cells=CORNERS[:: 2 if case == "bilinear grey" else 1])
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))


@pytest.mark.parametrize("kind", ["smooth", "low contrast", "constant", "two levels"])
@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_of_cropped_images_equal_torchs(channels, kind, interpreter):
    shape, cells = (0, channels, 17, 19), [(8, 30, 0), (8, 20, 1), (12, 0, 0), (13, 0, 0)]
    module, parts = make(shape, cutmix=False), batch(shape, kind, cells)
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))


@pytest.mark.parametrize("kind", ["noise", "low contrast", "constant"])
@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_of_the_tiles_of_large_images_are_those_of_the_whole(channels, kind, interpreter):
    shape, cells = (0, channels, 65, 130), [(8, 30, 0), (8, 20, 1), (12, 0, 0), (13, 0, 0)]
    module, parts = make(shape), batch(shape, kind, cells)
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))
    stage = TrivialAugment(backend="torch")
    found, expected = interpreter("trivial", stage, parts[0], plan_of(cells)), stage.apply(parts[0], plan_of(cells))
    assert_same([found], [expected])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_come_in_the_dtype_and_format_asked_for(dtype, channels_last, interpreter):
    shape = (4, 3, 8, 8)
    module, parts = make(shape, dtype=dtype, channels_last=channels_last), batch(shape)
    found = interpreter("augment", module, *parts, None)
    assert_same(found, by_torch(module, *parts))
    assert found[0].is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "cut out"])
def test_images_of_any_strides_are_read_in_place_and_keep_their_format(layout, interpreter):
    images, labels, keys = batch((6, 3, 8, 8))
    images = {
        "channels_last": lambda: images.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: images.transpose(2, 3),
        "cut out": lambda: torch.nn.functional.pad(images, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    }[layout]()
    module = make(images.shape)
    found, expected = interpreter("augment", module, images, labels, keys, None), by_torch(module, images, labels, keys)
    assert_same(found, expected)
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_a_batch_is_gathered_from_the_set(mode, interpreter):
    images, labels, _ = batch((20, 3, 8, 8))
    index = torch.tensor([19, 3, 3, 0, 7, 12, 19, 1, 5, 18, 2])
    module, keys = make(images.shape, cutmix_mode=mode), sample_keys(0, 1, index)
    found = interpreter("augment", module, images, labels.int(), keys, index)
    assert_same(found, by_torch(module, images, labels, keys, index))


@pytest.mark.parametrize(
    "off", [("crop",), ("flip",), ("trivial",), ("cutmix",), ("crop", "flip", "trivial", "cutmix")]
)
def test_stages_can_be_off(off, interpreter):
    shape = (6, 3, 8, 8)
    module, parts = make(shape, **{name: None if name == "crop" else False for name in off}), batch(shape)
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_bins": 5, "block": 3, "cutmix_p": 0.5},
        {"cutmix_mode": "batch", "cutmix_p": 0.0},
        {"cutmix_alpha": 20.0, "block": 1, "fill": 7},
        {"crop": 11, "cutmix_alpha": 0.05},
    ],
)
def test_other_settings_equal_torchs(settings, interpreter):
    shape = (10, 3, 8, 8)
    module, parts = make(shape, **settings), batch(shape)
    module.flip.p = 0.3
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 8, 8), (4, 1, 2, 9), (4, 3, 1, 1)])
def test_small_batches_and_images_equal_torchs(shape, interpreter):
    module, parts = make(shape, cutmix_mode="batch"), batch(shape)
    assert_same(interpreter("augment", module, *parts, None), by_torch(module, *parts))


def test_the_pipeline_takes_it_by_name(interpreter):
    module, parts = make((6, 3, 8, 8)), batch((6, 3, 8, 8))
    module.backend = "triton"
    assert_same(interpreter(module, *parts), by_torch(module, *parts))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_trivialaugment_alone_takes_any_plan(layout, interpreter):
    cells = [(1, 30, 0), (5, 7, 1), (8, 30, 0), (9, 30, 1), (10, 9, 0), (12, 0, 0), (13, 0, 0)]
    images = pictures("noise", (len(cells), 3, 16, 17))
    images = images.contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format")))
    stage = TrivialAugment(fill=(1, 2, 3), backend="torch")
    found, expected = interpreter("trivial", stage, images, plan_of(cells)), stage.apply(images, plan_of(cells))
    assert_same([found], [expected])
    assert found.stride() == expected.stride()


def test_partners_of_a_whole_batch_are_torchs_permutation(interpreter):
    keys = sample_keys(2, 0, range(150))
    keys[40:70] = keys[40]
    expected = make((150, 1, 1, 1), cutmix_mode="batch").cutmix.plan(keys, 1, 1).partner
    assert torch.equal(interpreter("_partners", keys), expected)


def test_a_fill_of_more_channels_than_the_images_is_refused():
    module = make((2, 1, 8, 8), crop=None, fill=(1, 2, 3))
    with pytest.raises(ValueError, match="fill has 3 channels, the images have 1"):
        fused_triton.augment(module, *batch((2, 1, 8, 8)), None)


def test_without_a_gpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_triton.missing() in ("there is no CUDA device", "Triton is not installed")
    assert not fused_triton.runs_on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "error", "words"),
    [
        ((6, 1), None, "compute capability 6.1, and Triton needs 7.0"),
        ((9, 0), RuntimeError("Failed to find C compiler"), "cannot launch kernels: Failed to find C compiler"),
        ((9, 0), None, None),
    ],
)
def test_a_gpu_that_triton_cannot_use_is_told_why(capability, error, words, monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = Mock(side_effect=error)
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_target=target)))
    why = fused_triton.missing()
    assert why is None if words is None else words in why
