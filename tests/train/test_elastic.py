"""The global batch is the same on any number of ranks; a launcher that restarts a stopped run achieves nothing."""

import pytest

from robust_dist.train.build import accumulation_for, largest_part
from robust_dist.train.recipe import DataConfig, Recipe, conflicts, recipe_dict
from robust_dist.train.stop import Stopped, check_not_stopped, launcher


def recipe(micro_batch_size, batch_size=256, block=8, accumulation=1):
    data = DataConfig(block=block)
    return Recipe(data=data, batch_size=batch_size, micro_batch_size=micro_batch_size, accumulation=accumulation)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("micro_batch_size", "block"), [(64, 8), (40, 8), (8, 8), (12, 8), (1, 1), (1000, 8)])
def test_the_fewest_parts_are_made_of_which_none_is_too_large(ranks, micro_batch_size, block):
    asked = recipe(micro_batch_size, block=block)
    parts = accumulation_for(asked, ranks)
    assert largest_part(recipe(micro_batch_size, block=block, accumulation=parts), ranks) <= micro_batch_size
    if parts > 1:
        fewer = recipe(micro_batch_size, block=block, accumulation=parts - 1)
        assert largest_part(fewer, ranks) > micro_batch_size


@pytest.mark.parametrize(("ranks", "parts"), [(4, 1), (2, 2), (1, 4)])
def test_the_readme_s_example_holds(ranks, parts):
    assert accumulation_for(recipe(64), ranks) == parts


def test_a_micro_batch_without_room_for_a_block_is_refused():
    with pytest.raises(ValueError, match=r"micro_batch_size=4 is smaller than data\.block=8.*data\.block to 4"):
        accumulation_for(recipe(4), 1)


def test_how_a_batch_is_cut_may_change_between_the_starts_of_a_run():
    assert conflicts(recipe_dict(recipe(64)), recipe_dict(recipe(None, accumulation=4))) == []
    assert conflicts(recipe_dict(recipe(64)), recipe_dict(recipe(64, batch_size=128))) != []


@pytest.mark.parametrize(("restarts", "mine", "leaves"), [("1", True, True), ("0", True, False), ("1", False, False)])
def test_only_ranks_that_the_same_launcher_starts_once_more_leave_again(monkeypatch, restarts, mine, leaves):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    note = {"signal": "SIGUSR1", "step": 4, "total_steps": 9, "checkpoint": "runs/a/checkpoints/step-00000004"}
    note["launchers"] = [launcher() if mine else ["elsewhere/1", 1]]
    if leaves:
        with pytest.raises(Stopped, match="stopped by SIGUSR1 at step 4 of 9"):
            check_not_stopped(note)
    else:
        check_not_stopped(note)
    check_not_stopped({})
