"""Triton's kernels compile for GPUs that are not here, with the arguments of their launches, and round as meant."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from robust_dist.augment import RobustAugment, TrivialAugment, fused_triton, sample_keys

triton = pytest.importorskip("triton")
KERNELS = {"partners_kernel": "draws", "prepare_kernel": "prepare", "luts_kernel": "prepare", "pixels_kernel": "pixels"}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *args, **options):
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, args, strict=False))
        self.arguments |= {name: options.pop(name) for name in names if name in options}
        self.options = options

    def compile(self, capability):
        """To PTX and machine code for a compute capability, as the just-in-time compiler would."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        kinds = {n: "constexpr" if n in constants else mangle_type(a) for n, a in self.arguments.items()}
        source = ASTSource(self.kernel, kinds, {name: self.arguments[name] for name in constants})
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Recorders in the kernels' places, by the kernels' names."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorders = {}
    for name, file in KERNELS.items():
        module = importlib.import_module(f"robust_dist.augment.fused_triton_{file}")
        recorders[name] = Recorder(getattr(module, name).jit)
        monkeypatch.setattr(module, name, recorders[name])
    return recorders


def launch(shape=(4, 3, 32, 32), **settings):
    """Augment a batch that is gathered from a set."""
    module = RobustAugment(10, shape[2:], (0.5,) * shape[1], (0.2,) * shape[1], **settings)
    keys, images = sample_keys(0, 0, range(shape[0])), torch.zeros(shape, dtype=torch.uint8)
    fused_triton.augment(module, images, torch.zeros(shape[0], dtype=torch.int64), keys, keys.abs() % shape[0])


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


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)])
def test_the_pixels_compile(capability, dtype, kernels):
    launch(dtype=dtype, cutmix_mode="batch")
    assert kernels["pixels_kernel"].grid == (4 * 2,)
    ptx = kernels["pixels_kernel"].compile(capability).asm["ptx"]
    assert_rounds_as_written(ptx)
    assert len(places(ptx, r"fma\.rn\.f32")) == 4  # the luma's two, Color, Sharpness


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": (4, 1, 33, 47), "interpolation": "bilinear", "dtype": torch.float64},
        {"interpolation": "bilinear", "channels_last": True, "dtype": torch.float16},
        {"shape": (2, 3, 224, 224), "trivial": False, "crop": None},
    ],
)
def test_other_pixels_compile(settings, kernels):
    launch(**settings)
    assert_rounds_as_written(kernels["pixels_kernel"].compile(90).asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
def test_draws_and_statistics_compile(capability, kernels):
    launch(cutmix_mode="batch", cutmix_alpha=0.5, cutmix_p=0.5)
    ptx = kernels["prepare_kernel"].compile(capability).asm["ptx"]
    assert_rounds_as_written(ptx)
    assert len(places(ptx, r"fma\.rn\.f32")) == 3  # the luma's two, Contrast
    assert "sqrt.rn.f64" in ptx
    assert_rounds_as_written(kernels["partners_kernel"].compile(capability).asm["ptx"])


def test_statistics_of_large_images_compile(kernels):
    images, stage = torch.zeros(2, 1, 224, 224, dtype=torch.uint8), TrivialAugment()
    fused_triton.trivial(stage, images, stage.plan(sample_keys(0, 0, range(2))))
    assert kernels["luts_kernel"].options["num_warps"] == 8
    assert_rounds_as_written(kernels["luts_kernel"].compile(90).asm["ptx"])


def test_a_slice_at_an_odd_place_compiles_nothing_anew():
    """Pointers into a set are specialised on nothing, so that a batch may start anywhere."""
    from robust_dist.augment.fused_triton_draws import partners_kernel
    from robust_dist.augment.fused_triton_prepare import prepare_kernel

    for kernel, names in (
        (prepare_kernel, {"images", "labels", "keys", "index", "partners", "beta"}),
        (partners_kernel, {"keys"}),
    ):
        free = {one.name for one in kernel.params if one.do_not_specialize or one.do_not_specialize_on_alignment}
        assert names <= free
