"""Keys and draws are pure functions of seed, epoch and index, and look random."""

import itertools

import pytest
import torch

from robust_dist.augment import Stream, permutation, random_keys, sample_keys
from robust_dist.augment.keys import bits, bits_of_each, randint, to_uniform, uniform, uniforms
from tests.augment.chance import assert_flat


def _mix(x):
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _reference(seed, epoch, index):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    run = _mix((seed + golden) & mask)
    turn = _mix((run + epoch * golden) & mask)
    key = _mix((turn + index * golden) & mask)
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 299), (-1, 5), (2**63 + 17, 2**40), (2**80 + 3, -2)])
def test_keys_equal_splitmix64_written_with_python_integers(seed, epoch):
    indices = [0, 1, 2, 49_999, 2**40, -7]
    assert sample_keys(seed, epoch, indices).tolist() == [_reference(seed, epoch, i) for i in indices]


def test_seeds_count_modulo_two_to_the_64():
    assert torch.equal(sample_keys(-1, 0, range(9)), sample_keys(2**64 - 1, 0, range(9)))


@pytest.mark.parametrize("indices", [range(3, 30, 3), list(range(3, 30, 3)), torch.arange(3, 30, 3).int()])
def test_ranges_lists_and_tensors_name_the_same_samples(indices):
    assert torch.equal(sample_keys(7, 2, indices), sample_keys(7, 2, torch.arange(3, 30, 3)))


def test_tensors_and_ints_give_the_same_seed_and_epoch():
    assert torch.equal(sample_keys(torch.tensor(7), torch.tensor(2), range(9)), sample_keys(7, 2, range(9)))


def test_a_key_does_not_depend_on_the_other_samples():
    keys = sample_keys(7, 2, range(100))
    order = torch.randperm(100)
    assert torch.equal(sample_keys(7, 2, order), keys[order])
    assert torch.equal(torch.cat([sample_keys(7, 2, [i]) for i in range(100)]), keys)


def test_keys_of_many_samples_epochs_and_seeds_are_all_different():
    keys = torch.cat([sample_keys(s, e, range(20_000)) for s in range(5) for e in range(5)])
    assert keys.unique().numel() == keys.numel()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 0, [1]), "seed must be an int"),
        ((True, 0, [1]), "seed must be an int"),
        ((0, "1", [1]), "epoch must be an int"),
        ((torch.tensor([1]), 0, [1]), "0-d integer tensor"),
        ((torch.tensor(1.0), 0, [1]), "0-d integer tensor"),
        ((0, 0, [1.5]), "indices must be integers"),
    ],
)
def test_wrong_types_are_refused_by_name(arguments, words):
    with pytest.raises(TypeError, match=words):
        sample_keys(*arguments)


def test_indices_have_one_dimension():
    with pytest.raises(ValueError, match="one dimension"):
        sample_keys(0, 0, torch.zeros(2, 2, dtype=torch.long))


def test_no_indices_give_no_keys():
    assert sample_keys(0, 0, []).shape == (0,)
    assert sample_keys(0, 0, []).dtype == torch.int64


@pytest.mark.parametrize("high", [1, 2, 7, 14, 31, 2**31 - 1])
def test_randint_stays_in_range(high):
    drawn = randint(sample_keys(3, 1, range(10_000)), Stream.OPERATION, high)
    assert drawn.min() >= 0
    assert drawn.max() < high


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("seed", [0, 7])
def test_every_stream_is_uniform(stream, seed):
    keys = sample_keys(seed, 0, range(100_000))
    assert_flat(randint(keys, stream, 31), 31)
    assert_flat((uniform(keys, stream) * 100).long(), 100)


def test_uniform_lies_in_the_half_open_unit_interval():
    drawn = uniform(sample_keys(0, 0, range(100_000)), Stream.FLIP)
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert float(uniform(torch.tensor([-1]), Stream.FLIP)) < 1


def test_the_bits_of_several_streams_are_those_of_each():
    keys = sample_keys(0, 0, range(9))
    together = bits_of_each(keys, Stream.CROP_TOP, Stream.CUTMIX_Y)
    assert torch.equal(
        together, torch.stack([bits(keys, Stream(s)) for s in range(Stream.CROP_TOP, Stream.CUTMIX_Y + 1)])
    )


def test_two_streams_of_one_key_are_independent():
    keys = sample_keys(7, 0, range(200_000))
    for first in Stream:
        second = Stream((first + 1) % len(Stream))
        assert_flat(randint(keys, first, 16) * 16 + randint(keys, second, 16), 256)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, 0), (0, 0, 1)),
        ((0, 0, 0), (0, 1, 0)),
        ((0, 0, 0), (1, 0, 0)),
        ((0, 1, 0), (1, 0, 0)),
        ((7, 0, 0), (7, 0, 8)),
    ],
    ids=["samples", "epochs", "seeds", "seed and epoch exchanged", "samples of a block"],
)
def test_draws_of_different_samples_epochs_and_seeds_are_independent(first, second):
    one, two = (randint(sample_keys(s, e, range(i, i + 200_000)), Stream.OPERATION, 14) for s, e, i in (first, second))
    assert_flat(one * 14 + two, 196)


def test_every_bit_is_fair():
    drawn = bits(sample_keys(1, 1, range(100_000)), Stream.SIGN)
    shares = torch.stack([(drawn >> place & 1).double().mean() for place in range(64)])
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 100_000**0.5


def test_random_keys_follow_the_generator():
    one, two = (random_keys(6, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, random_keys(6, torch.Generator().manual_seed(4)))
    torch.manual_seed(5)
    drawn = random_keys(6)
    torch.manual_seed(5)
    assert torch.equal(drawn, random_keys(6))


@pytest.mark.parametrize("n", [0, 1, 2, 1797])
def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_choose(n):
    order = permutation(3, 1, n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(3, 1, n))
    if n > 2:
        assert not torch.equal(order, permutation(3, 2, n))
        assert not torch.equal(order, permutation(4, 1, n))


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="n=-1 is below 0"):
        permutation(0, 0, -1)


def test_first_places_of_many_epochs_are_uniform():
    assert_flat(torch.stack([permutation(0, e, 10)[0] for e in range(3000)]), 10)


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_a_workers_row_of_draws_equals_the_tensors_ones(key):
    start = bits(torch.tensor([key]), Stream.RESIZED_CROP)
    row = [to_uniform(bits(start, number)).item() for number in range(50)]
    assert list(itertools.islice(uniforms(key, Stream.RESIZED_CROP), 50)) == row
