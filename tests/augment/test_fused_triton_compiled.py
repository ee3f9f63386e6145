"""Triton's kernels compile for GPUs that are not here, with the arguments of their launches, and round as meant."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

from robust_dist.augment import RobustAugment, TrivialAugment, backends, checks, fused_triton, pipeline, sample_keys
from tests.augment.kernels import CAPABILITIES, KERNELS, Machine, launch, launch_alone, recorders

triton = pytest.importorskip("triton", minversion="3.3")


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Recorders in the kernels' places, by the kernels' names."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return recorders(monkeypatch.setattr)


def places(ptx, instruction):
    """The source lines that an instruction comes from."""
    files = {int(n): Path(name) for n, name in re.findall(r'\.file\s+(\d+) "(.+?)"', ptx)}
    found, place = set(), None
    for text in ptx.splitlines():
        if loc := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            place = files[int(loc[1])], int(loc[2])
        if re.match(rf"\s*{instruction}", text):
            found.add(place)
    return {file.read_text().splitlines()[line - 1].strip() for file, line in found}


def assert_rounds_as_written(ptx):
    """Products and sums are fused where the source says so and nowhere else, and nothing is approximate."""
    assert all("tl.fma(" in line for line in places(ptx, r"fma\.rn\.f32"))
    assert "fma.rn.f64" not in ptx
    assert not re.search(r"\bfma\.r[mpz]|\bmad\.r|\.approx|div\.full|\b(mul|add|sub)\.(ftz\.)?f(32|64)", ptx)


# Bits of the stores of four pixels, and of the targets, whose ten classes are one store a thread.
WIDE = {torch.bfloat16: {32: 1, 64: 3}, torch.float32: {32: 1, 128: 3}}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("size", "channels_last", "dtype", "most"),
    [
        (32, False, torch.bfloat16, {"straight": 90, "straight levels": 115, "warp": 120, "straight colour": 115}),
        (32, False, torch.float32, {"straight": 90}),
        (224, False, torch.bfloat16, {"straight": 70, "straight levels": 90, "warp": 105, "straight colour": 100}),
        (224, True, torch.bfloat16, {"straight": 70, "straight levels": 90, "warp": 105, "straight colour": 100}),
        (224, True, torch.float32, {"straight": 70}),
    ],
)
def test_four_pixels_of_a_thread_are_stored_at_once_by_few_instructions(
    size, channels_last, dtype, most, capability, kernels
):
    launch((4, 3, size, size), dtype=dtype, channels_last=channels_last, cutmix_mode="batch")
    given = kernels["pixels_kernel"].arguments
    assert kernels["pixels_kernel"].grid == (4 * size * size // (4 * given["TILE"]),)
    compiled = kernels["pixels_kernel"].compile(capability).asm
    assert_rounds_as_written(compiled["ptx"])
    assert len(places(compiled["ptx"], r"fma\.rn\.f32")) == 4  # the luma's two, Color, Sharpness
    machine = Machine(compiled["cubin"])
    assert machine.widths("STG") == WIDE[dtype]
    assert (machine.spilled, machine.shared) == (0, 0)
    assert machine.registers <= 96
    for ways, limit in most.items():
        assert machine.of_a_pixel(ways, 4, given["TILE"] // given["QUADS"]) <= limit, ways


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": (4, 1, 33, 47), "interpolation": "bilinear", "dtype": torch.float64},
        {"interpolation": "bilinear", "channels_last": True, "dtype": torch.float16},
        {"shape": (2, 3, 224, 224), "trivial": False, "crop": None},
        {"shape": (2, 3, 30, 30), "channels_last": True, "cutmix": False, "fill": 7},
    ],
)
def test_other_pixels_compile(settings, kernels):
    launch(**settings)
    compiled = kernels["pixels_kernel"].compile(90).asm
    assert_rounds_as_written(compiled["ptx"])
    assert Machine(compiled["cubin"]).spilled == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_draws_are_made_by_a_thread_for_each_sample_and_statistics_by_a_program_for_each_tile(capability, kernels):
    launch((70, 3, 32, 32), cutmix_mode="batch", cutmix_alpha=0.5, cutmix_p=0.5)
    prepare = kernels["prepare_kernel"]
    samples = prepare.arguments["SAMPLES"]
    assert samples == 32 * prepare.options["num_warps"]
    assert prepare.grid == (1 + 70 * 3,)
    compiled = prepare.compile(capability).asm
    assert_rounds_as_written(compiled["ptx"])
    assert len(places(compiled["ptx"], r"fma\.rn\.f32")) == 3  # the luma's two, Contrast
    assert compiled["ptx"].count("sqrt.rn.f64") == 1
    assert Machine(compiled["cubin"]).spilled == 0
    assert_rounds_as_written(kernels["partners_kernel"].compile(capability).asm["ptx"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_statistics_of_large_images_are_taken_in_parallel_and_without_a_loop(capability, kernels):
    launch_alone((2, 3, 224, 224))
    assert kernels["statistics_kernel"].grid == (2 * 3 * 13,)
    assert kernels["luts_kernel"].grid == (2 * 3,)
    for name in ("statistics_kernel", "luts_kernel"):
        compiled = kernels[name].compile(capability).asm
        assert_rounds_as_written(compiled["ptx"])
        machine = Machine(compiled["cubin"])
        assert machine.spilled == 0
        assert not any(machine.code[i][0].startswith("LDG") for i in machine.loop)


def test_small_images_need_no_launch_between(kernels):
    launch((2, 3, 64, 64))
    assert not hasattr(kernels["luts_kernel"], "grid")


def test_a_slice_at_an_odd_place_compiles_nothing_anew(kernels):
    """Pointers into a set are specialised on nothing, so that a batch may start anywhere."""
    wanted = {"images", "labels", "keys", "index", "partners", "beta"}
    for name in KERNELS:
        for one in kernels[name].kernel.params:
            free = one.do_not_specialize or one.do_not_specialize_on_alignment
            assert free or one.name not in wanted or (name == "partners_kernel" and one.name == "partners"), (
                name,
                one.name,
            )


@pytest.fixture
def as_on_a_device(monkeypatch, kernels):
    """Tensors of the CPU are taken for a GPU's, whose values nobody looks at."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (checks, pipeline):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    backends._found.cache_clear()
    yield kernels
    backends._found.cache_clear()


def test_a_call_like_the_last_one_is_launched_without_a_check_and_every_difference_is_seen(as_on_a_device, monkeypatch):
    checked, prepare = [], as_on_a_device["prepare_kernel"]
    monkeypatch.setattr(pipeline, "check_images", lambda images: checked.append(1) or checks.check_images(images))
    module = RobustAugment(10, 32, (0.5,) * 3, (0.2,) * 3, backend="triton")
    images, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    keys = sample_keys(0, 0, range(8))
    module(images, labels, keys)
    assert len(checked) == 1
    first, other = prepare.arguments, torch.ones_like(images)
    out, _ = module(other, labels, keys + 1)
    assert len(checked) == 1
    assert prepare.arguments["images"] is other
    assert {k: v for k, v in prepare.arguments.items() if not isinstance(v, torch.Tensor)} == {
        k: v for k, v in first.items() if not isinstance(v, torch.Tensor)
    }
    assert out is not module(other, labels, keys + 1)[0]
    module.flip.p = 0.25
    module(images, labels, keys)
    assert prepare.arguments["FLIP_BELOW"] == 2**51
    module.crop = None
    module(images, labels, keys)
    assert prepare.arguments["PADDING"] == 0
    module.trivial = TrivialAugment(fill=7)
    module(images, labels, keys)
    assert as_on_a_device["pixels_kernel"].arguments["FILL"] == 7 * 0x010101
    module(images[1:], labels[1:], keys[1:])
    assert prepare.arguments["batch"] == 7
    assert len(checked) == 5
    for wrong, error in (
        ((images.int(), labels, keys), "images must be uint8"),
        ((images[:, :, 1:], labels, keys), "images must have shape"),
        ((images, labels.float(), keys), "labels must be integer"),
        ((images, labels[1:], keys), "labels must have shape"),
        ((images, labels, keys.int()), "keys must be torch.int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            module(*wrong)
    module.eval()
    assert torch.equal(module(images, labels, keys)[0], module.normalize(images))


def test_a_pipeline_that_was_launched_is_copied_and_pickled_without_its_records(as_on_a_device):
    module = RobustAugment(10, 8, (0.5,) * 3, (0.2,) * 3, backend="triton")
    images, labels, keys = (
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2).long(),
        sample_keys(0, 0, range(2)),
    )
    module(images, labels, keys)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other not in fused_triton._records
        assert other(images, labels, keys)[0].shape == images.shape
