"""An invalid count gives the same error everywhere."""

import pytest
import torch

from robust_dist import CutMix, RAdaBeliefW, RobustSchedule
from robust_dist.checkpoint import convert
from robust_dist.data.batches import Cut
from robust_dist.train.recipe import Recipe
from robust_dist.validate import real_number, whole_number


def optimizer(**settings):
    return RAdaBeliefW([torch.nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.parametrize(
    ("call", "begin"),
    [
        (lambda: RobustSchedule(optimizer(), 0), "total_steps=0 is below 1"),
        (lambda: CutMix(0), "num_classes=0 is below 1"),
        (lambda: Cut(0, seed=0), "batch_size=0 is below 1"),
        (lambda: Recipe(batch_size=0), "batch_size=0 is below 1"),
        (lambda: Recipe(batch_size=10**20), "batch_size=100000000000000000000 is above 2147483647"),
        (lambda: convert("a", "b", "ddp", 0), "world_size=0 is below 1"),
        (lambda: optimizer(seed=-1), "seed=-1 is below 0"),
    ],
)
def test_every_room_says_it_in_the_same_words(call, begin):
    with pytest.raises(ValueError, match=f"^{begin}: it must be a whole number in range$"):
        call()


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_what_is_no_whole_number_is_a_type_error_that_shows_it(value):
    with pytest.raises(
        TypeError, match=f"^n={value!r} is a {type(value).__name__}: it must be a whole number in range"
    ):
        whole_number("n", value, 0)


def test_bounds_are_taken_and_numbers_of_other_packages_too():
    assert [whole_number("n", value, 1, 3) for value in (1, 3, torch.tensor(2))] == [1, 3, 2]
    assert real_number("x", 1, 0.0, 1.0) == 1.0
    with pytest.raises(ValueError, match="x=nan is out of range"):
        real_number("x", float("nan"), 0.0)
