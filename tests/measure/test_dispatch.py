"""Operations, bytes, waits and memory are counted as they are."""

import pytest
import torch

from robust_dist.measure.dispatch import LiveBytes, count
from robust_dist.measure.memory import peak_extra_bytes

CPU = torch.device("cpu")


def made_up(x):
    doubled = x * 2
    doubled.view(10, 10).add_(1)
    room = torch.empty(5)
    room.copy_(x[:5])
    return doubled.sum().item()


def test_operations_that_are_no_views_are_counted_with_their_bytes_and_the_hosts_waits():
    counts = count(lambda: made_up(torch_input), CPU)
    # mul, add_, copy_ and sum of 4-byte numbers: 100 to 100, 100 to 100, 5 to 5, 100 to 1
    assert (counts.operations, counts.waits) == (4, 1)
    assert counts.bytes == 4 * (200 + 200 + 10 + 101)


torch_input = torch.arange(100.0)


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda: torch_input * 1, 0),
        (lambda: bool(torch_input[0] > 1), 1),
        (lambda: torch_input[torch_input > 50], 1),
        (lambda: torch.where(torch_input > 50, torch_input, 0), 0),
        (lambda: [float(x) for x in torch_input[:3]], 3),
    ],
)
def test_what_the_host_must_know_is_a_wait(call, waits):
    assert count(call, CPU).waits == waits


def test_an_output_that_is_given_is_not_read_and_an_expanded_tensor_has_its_storages_bytes():
    out = torch.empty(100)
    assert count(lambda: torch.mul(torch_input, 2, out=out), CPU).bytes == 800
    one = torch.ones(1).expand(100)
    assert count(lambda: torch_input + one, CPU).bytes == 400 + 4 + 400


def test_calls_that_differ_are_averaged():
    turns = iter(range(4))
    assert count(lambda: [torch_input * 1 for _ in range(next(turns))], CPU).operations == 1.5


def test_memory_that_a_call_gives_back_is_seen():
    def temporary():
        torch.ones(10_000_000).sum()

    temporary()
    found = peak_extra_bytes(temporary, CPU)
    if found is None:
        pytest.skip("the kernel does not tell")
    assert 39_000_000 < found < 44_000_000
    assert peak_extra_bytes(lambda: None, CPU) < 2_000_000


def test_live_bytes_forget_what_is_gone_and_count_a_storage_once():
    with LiveBytes() as tracker:
        one = torch.zeros(100)
        view = one.view(10, 10)
        two = torch.ones(50)
        del two
        three = view + 1
        assert tracker.live == 800
        del one, view, three
    assert (tracker.live, tracker.peak) == (0, 800)


@pytest.mark.gpu
def test_kernels_are_counted_on_a_gpu():
    x = torch.ones(1000, device="cuda")
    counts = count(lambda: (x * 2).sum().item(), x.device)
    # Two kernels and the copy of the value; of a sum some releases make two, or fill something first.
    assert 3 <= counts.operations <= 5
    assert counts.waits == 1
    # The allocator rounds a tensor up to 512 bytes.
    assert peak_extra_bytes(lambda: x * 2, x.device) == 4096
