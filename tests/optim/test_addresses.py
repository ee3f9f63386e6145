"""Where tensors lie is what each of them says itself, and dicts that hold something else are found out."""

import pytest
import torch
from torch import Tensor, nn

from robust_dist.optim import addresses
from robust_dist.optim.addresses import Contents


@pytest.fixture(params=["in C", "one by one"])
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(addresses, "_native", lambda: None)
    elif addresses._native() is None:
        pytest.skip("the C library is not built, or this torch has no such function")


def test_the_addresses_are_those_that_the_tensors_say(way):
    base = torch.zeros(20)
    tensors = [base, base[3:], base.view(4, 5).t(), torch.empty(0), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    assert addresses.addresses(tensors).tolist() == list(map(Tensor.data_ptr, tensors))
    assert addresses.addresses([]).tolist() == []
    tensors[1].data = torch.ones(4)
    torch.utils.swap_tensors(tensors[4], nn.Parameter(torch.ones(5)))
    assert addresses.addresses(tensors).tolist() == list(map(Tensor.data_ptr, tensors))


CHANGES = {
    "nothing": lambda one, other: None,
    "an equal tensor": lambda one, other: one.update(b=one["b"].clone()),
    "an equal key": lambda one, other: other.update({True: other.pop(1)}),
    "one more": lambda one, other: one.update(c=0),
    "one less": lambda one, other: other.pop("d"),
    "none": lambda one, other: one.clear(),
    "another order": lambda one, other: one.update(a=one.pop("a")),
    "moved to the other": lambda one, other: other.update(b=one.pop("b")),
}


@pytest.mark.parametrize("same_length", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_contents_are_the_same_only_where_every_key_and_value_is_the_same_object(way, change, same_length):
    one, other = {"a": torch.zeros(2), "b": torch.ones(2)}, {1: torch.ones(2), "d": None}
    if not same_length:
        other["e"] = 5
    contents = Contents([one, other])
    CHANGES[change](one, other)
    assert contents.are_in([one, other]) == (change == "nothing")


def test_what_is_no_tensor_with_memory_has_no_address(way):
    sparse = torch.eye(3).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        addresses.addresses([torch.zeros(2), sparse])
