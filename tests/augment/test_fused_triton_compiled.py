"""Triton's kernels compile for GPUs that are not here, with the arguments of their launches, and round as meant."""

import re
from pathlib import Path

import pytest
import torch

from tests.augment.kernels import CAPABILITIES, KERNELS, Machine, launch, launch_alone, recorders

triton = pytest.importorskip("triton")


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
