"""What ranks exchange: values, decisions, errors, and their origin."""

import threading

import pytest
import torch.distributed as dist

from robust_dist.ranks.talk import (
    agree,
    attempt,
    by_rank,
    gather,
    on_rank_0,
    origin_of,
    raise_problems,
    raise_together,
    rank,
    ranks_text,
    world_size,
)
from tests.ranks import run_ranks


class Unportable(Exception):
    """An error that cannot be rebuilt from its message, like some libraries'."""

    def __init__(self, message, *, response):
        super().__init__(message)


def fail():
    raise ValueError("the file is torn")


def fail_unportably():
    raise Unportable("no way back", response=404)


def said(call):
    """The error's class, text, and rank of origin (None: every rank's own)."""
    with pytest.raises(Exception) as caught:
        call()
    origin = origin_of(caught.value)
    return type(caught.value).__name__, str(caught.value), origin and origin.rank


def talk():
    me = dist.get_rank()
    last = dist.new_group([1, 2])
    problem = "torn" if me == 0 else None
    found = {
        "gathered": gather(10 * me),
        "main": on_rank_0(lambda: ("of", me)),
        "attempted": attempt(lambda: me, here=me > 0),
        "agreed": agree({"lr": 0.1, "ranks": [1, 2]}, "they differ"),
        "no error": raise_together(None),
        "no problem": raise_problems(ValueError, None),
        "one differs": said(lambda: agree({"lr": 0.1, "seed": me == 1}, "they differ", kind=RuntimeError)),
        "the last fails": said(lambda: attempt(fail, here=me == 2)),
        "two fail": said(lambda: raise_together(KeyError(me) if me else None)),
        "main fails": said(lambda: on_rank_0(fail)),
        "unportable": said(lambda: attempt(fail_unportably, here=me == 1)),
        "unportable value": said(lambda: on_rank_0(threading.Lock)),
        "one has a problem": said(lambda: raise_problems(OSError, problem)),
        "all have the same": said(lambda: raise_problems(OSError, "torn")),
        "all have problems": said(lambda: raise_problems(OSError, "torn" if me != 1 else "gone")),
        "of the group": (rank(last), world_size(last), gather(me, last)),
    }
    if me > 0:
        found["main of the group"] = on_rank_0(lambda: me, last)
        found["main of the group fails"] = said(lambda: on_rank_0(fail, last))
    return found


@pytest.fixture(scope="module")
def three():
    return run_ranks(talk, 3)


def on_every_rank(three, what):
    first, *others = (result[what] for result in three)
    assert all(other == first for other in others)
    return first


def test_every_rank_has_all_values_and_rank_0_s_decision(three):
    assert on_every_rank(three, "gathered") == [0, 10, 20]
    assert on_every_rank(three, "main") == ("of", 0)
    assert [result["attempted"] for result in three] == [None, 1, 2]
    assert [result["of the group"] for result in three] == [(0, 1, [0]), (0, 2, [1, 2]), (1, 2, [1, 2])]
    assert [result["main of the group"] for result in three[1:]] == [1, 1]


def test_settings_that_differ_are_named_with_the_ranks_that_have_them(three):
    assert on_every_rank(three, "agreed") is None
    wanted = "they differ:\n  seed: ranks 0 and 2: False; rank 1: True"
    assert on_every_rank(three, "one differs") == ("RuntimeError", wanted, None)


def test_an_error_on_any_rank_is_raised_on_all_and_known_to_come_from_there(three):
    assert on_every_rank(three, "no error") is None
    assert on_every_rank(three, "the last fails") == ("ValueError", "the file is torn", 2)
    assert on_every_rank(three, "two fail") == ("KeyError", "1", 1)
    assert on_every_rank(three, "main fails") == ("ValueError", "the file is torn", 0)
    assert [result["main of the group fails"] for result in three[1:]] == [("ValueError", "the file is torn", 1)] * 2


def test_what_cannot_be_sent_to_the_others_is_an_error_on_all_ranks_too(three):
    assert on_every_rank(three, "unportable") == ("RuntimeError", "Unportable: no way back", 1)
    kind, text, origin = on_every_rank(three, "unportable value")
    assert (kind, origin) == ("TypeError", 0)
    assert "lock" in text


def test_problems_name_their_ranks_where_these_do_not_all_have_the_same(three):
    assert on_every_rank(three, "no problem") is None
    assert on_every_rank(three, "one has a problem")[:2] == ("OSError", "rank 0: torn")
    assert on_every_rank(three, "all have the same")[:2] == ("OSError", "torn")
    assert on_every_rank(three, "all have problems")[:2] == ("OSError", "ranks 0 and 2: torn\nrank 1: gone")


def test_one_process_without_a_group_talks_with_itself():
    assert not dist.is_initialized()
    assert (rank(), world_size(), gather("value")) == (0, 1, ["value"])
    lock = threading.Lock()
    assert on_rank_0(lambda: lock) is lock
    assert said(lambda: on_rank_0(fail)) == ("ValueError", "the file is torn", 0)
    assert said(lambda: raise_problems(OSError, "torn"))[:2] == ("OSError", "torn")
    agree({"lr": 0.1}, "they differ")


def test_many_ranks_are_named_in_runs():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([0, 1]) == "ranks 0-1"
    assert ranks_text([5, 0, 2, 1]) == "ranks 0-2 and 5"
    assert ranks_text([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5 and 7-8"
    assert by_rank({3: "that", 0: "this", 1: "that"}) == ["rank 0: this", "ranks 1 and 3: that"]
