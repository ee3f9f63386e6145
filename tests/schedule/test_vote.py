"""Votes through a store: what a rank that waits for the others has seen."""

import threading
import time

import pytest
import torch.distributed as dist

from robust_dist.schedule.peers import Vote


class SlowStore(dist.HashStore):
    """A store that is slow to take a wish, or a decision."""

    def __init__(self, slow):
        super().__init__()
        self.slow = slow

    def add(self, key, amount):
        time.sleep(0.3 * (self.slow == "wish"))
        return super().add(key, amount)

    def compare_set(self, key, expected, value):
        time.sleep(0.3 * (self.slow == "decision"))
        return super().compare_set(key, expected, value)


@pytest.mark.parametrize("slow", ["wish", "decision"])
def test_a_rank_that_waits_for_the_voters_knows_a_decision_that_was_on_its_way(slow):
    store, ours, theirs = SlowStore(slow), Vote(), Vote()
    ours.calls = theirs.calls = 1
    assert ours.cast(False, 1, 0, store) is None
    other = threading.Thread(target=theirs.cast, args=(True, 1, 1, store))
    other.start()
    ours.wait_for_voters(store, 2)
    assert ours.decided(store) == 2
    other.join()
