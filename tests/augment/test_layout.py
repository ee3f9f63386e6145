"""Choosing by bits equals `torch.where`, whatever the layout; the uint8 grid is exact."""

import pytest
import torch
from torch import nn

from robust_dist.augment.layout import bits_of, choose, from_grid, keep_bits, memory_format, to_grid

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def views(images):
    """The same images contiguous, channels_last, transposed, and starting at an odd place of their storage."""
    yield images.contiguous()
    yield images.contiguous(memory_format=torch.channels_last)
    yield images.transpose(2, 3).contiguous().transpose(2, 3)
    storage = torch.empty(images.numel() + 3, dtype=images.dtype)
    yield storage[3:].view(images.shape).copy_(images)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4, 7, 8, 16])
def test_choose_equals_where_for_every_layout_and_width(dtype, width):
    on, off = (torch.rand(5, 3, 6, width).mul(200).to(dtype) for _ in range(2))
    rows, columns, samples = (
        torch.rand(5, 1, 6, 1) > 0.5,
        torch.rand(5, 1, 1, width) > 0.5,
        torch.rand(5, 1, 1, 1) > 0.5,
    )
    for masks, mask in (((rows, columns), rows & columns), ((samples,), samples), ((columns,), columns)):
        for first in views(on):
            for second in views(off):
                before = second.clone()
                assert torch.equal(choose(masks, first.clone(), second), torch.where(mask, on, off))
                assert torch.equal(second, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_levels_survive_the_way_to_floating_and_back(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_grid(from_grid(levels, dtype)), levels)


def test_tables_keep_their_precision_when_a_module_is_cast():
    module, table = nn.Module(), torch.rand(7, dtype=torch.float64)
    keep_bits(module, "table", table)
    assert torch.equal(bits_of(module.half(), "table", torch.float64, torch.device("cpu")), table)
    assert module.state_dict() == {}


def test_memory_format_is_channels_last_only_where_it_must_be():
    last = torch.channels_last
    assert memory_format(torch.zeros(2, 3, 4, 5)) == torch.contiguous_format
    assert memory_format(torch.zeros(2, 3, 4, 5).contiguous(memory_format=last)) == last
    assert memory_format(torch.zeros(2, 1, 4, 5).contiguous(memory_format=last)) == torch.contiguous_format
    assert memory_format(torch.zeros(2, 3, 5, 4).transpose(2, 3)) == torch.contiguous_format


@pytest.mark.parametrize("size", [0, 1])
def test_strides_that_no_element_follows_do_not_matter(size):
    row = (torch.arange(9) % 3 == 0).expand(size, 1, 1, 9).contiguous()[..., :8]
    on, off = (torch.arange(size * 8).to(torch.uint8).view(size, 1, 1, 8) + k for k in (1, 2))
    assert torch.equal(choose((row,), on.clone(), off), torch.where(row, on, off))
    odd = off.repeat(1, 1, 1, 2)[..., :9].contiguous()[..., :8]
    assert torch.equal(choose((row,), on.clone(), odd), torch.where(row, on, odd))
    assert torch.equal(choose((row,), odd.clone(), off), torch.where(row, odd, off))


def test_an_empty_batch_of_every_second_column_is_chosen_from():
    images = torch.empty(0, 1, 9, 16, dtype=torch.uint8)[..., ::2]
    mask = torch.ones(0, 1, 1, 1, dtype=torch.bool)
    assert choose((mask,), images.flip(3), images).shape == images.shape
