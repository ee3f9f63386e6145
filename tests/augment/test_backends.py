"""One name chooses the code; what is demanded is had or refused, and an index is a gather before."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robust_dist.augment import CutMix, RobustAugment, TrivialAugment, backends, sample_keys
from tests.augment.reference import pictures

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CPU = torch.device("cpu")


def make(**settings):
    return RobustAugment(10, (12, 16), MEAN, STD, **settings)


def whole_set(size=40):
    return pictures("noise", (size, 3, 12, 16)), torch.arange(size) % 10


# Run by a copy of the package without its C library, where torch sees no GPU.
WITHOUT_KERNELS = """
import warnings, torch
from robust_dist.augment import CutMix, RobustAugment, TrivialAugment
def make(**settings):
    return RobustAugment(10, 8, [0.5], [0.2], **settings)
assert make().backend_for("cpu") == "torch"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert [make().backend_for("cuda") for _ in range(3)] == ["torch"] * 3
    assert make(backend="torch").backend_for("cuda") == "torch"
print(*(one.message for one in told if "augmented by torch" in str(one.message)), sep=" AND ")
for module in (make, TrivialAugment, lambda **settings: CutMix(10, **settings)):
    for backend in ("native", "triton"):
        try:
            module(backend=backend)
        except RuntimeError as error:
            print(error)
images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
print(make()(images, torch.arange(4))[0].shape)
"""


@pytest.mark.parametrize("form", ["uint8", "floating", "channels_last", "strided"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_index_gives_the_numbers_of_indexing_before(form, training, backend):
    images, labels = whole_set()
    images = {
        "uint8": lambda: images,
        "floating": lambda: images / 255,
        "channels_last": lambda: images.contiguous(memory_format=torch.channels_last),
        "strided": lambda: images.repeat_interleave(2, 3)[..., ::2],
    }[form]()
    index = torch.tensor([3, 39, 0, 3, 17, 5, 5, 21, 38])
    keys, module = sample_keys(0, 0, index), make(backend=backend).train(training)
    ours = module(images, labels, keys, index=index)
    for one, other in zip(ours, module(images[index], labels[index], keys), strict=True):
        assert torch.equal(one, other)
    assert ours[0].is_contiguous(memory_format=torch.channels_last) == (form == "channels_last")


def test_an_empty_index_gives_an_empty_batch():
    images, labels = whole_set()
    out, targets = make()(images, labels, index=torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 3, 12, 16)
    assert targets.shape == (0, 10)


def test_keys_drawn_for_an_index_are_one_a_sample_of_the_batch():
    images, labels = whole_set()
    index = torch.tensor([1, 2, 3])
    one, two = (
        make()(*batch, generator=torch.Generator().manual_seed(3), index=place)[0]
        for batch, place in (((images, labels), index), ((images[index], labels[index]), None))
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (torch.tensor([0, 40]), ValueError, r"index must lie in \[0, 40\), got 0 to 40"),
        (torch.tensor([-1, 3]), ValueError, r"index must lie in \[0, 40\), got -1 to 3"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "index must be torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "index must have one dimension"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_index_is_refused(index, error, words, training):
    with pytest.raises(error, match=words):
        make().train(training)(*whole_set(), index=index)


def test_keys_must_be_as_many_as_the_index():
    with pytest.raises(ValueError, match=r"keys must have shape \[2\]"):
        make()(*whole_set(), sample_keys(0, 0, range(40)), index=torch.tensor([1, 2]))


def test_without_any_kernel_torch_does_it_and_the_others_say_what_is_missing(tmp_path):
    folder = Path(backends.__file__).parents[1]
    shutil.copytree(folder, tmp_path / "robust_dist", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.md"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told, *refused, shape = done.stdout.splitlines()
    assert told.startswith("images on a GPU are augmented by torch's operations, which are slower: ")
    assert " AND " not in told
    native, triton = 'backend="native" cannot be used: it was not built', 'backend="triton" cannot be used: '
    assert len(refused) == 6
    assert all(line.startswith((native, triton)[i % 2]) for i, line in enumerate(refused))
    assert shape == "torch.Size([4, 1, 8, 8])"


@pytest.mark.parametrize("module", [make, TrivialAugment, lambda **s: CutMix(10, **s)])
def test_an_unknown_backend_is_refused_by_name(module):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, native, triton, got 'cuda'"):
        module(backend="cuda")


def test_other_devices_are_left_to_torch():
    assert make().backend_for("meta") == "torch"


def test_a_backend_without_a_pass_for_a_stage_alone_leaves_it_to_torch_or_is_refused(monkeypatch):
    whole = type("Module", (), {"runs_on": lambda device: True, "missing": lambda: None})
    monkeypatch.setattr(backends, "_found", lambda name: whole)
    for make_stage in (TrivialAugment, lambda **s: CutMix(10, **s)):
        assert make_stage().backend_for("cpu") == "torch"
        with pytest.raises(RuntimeError, match='backend="triton" supports only whole pipelines'):
            make_stage(backend="triton").backend_for("cpu")
    module = make(backend="triton")
    assert module.backend_for("cpu") == "triton"
    assert module.trivial.backend_for("cpu") == "torch"


def test_a_stage_of_another_type_is_left_to_torch():
    class Own(TrivialAugment):
        pass

    module = make()
    module.trivial = Own()
    assert module.backend_for("cpu") == "torch"
    module.backend = "native"
    with pytest.raises(RuntimeError, match="does not support a stage of type Own"):
        module.backend_for("cpu")
