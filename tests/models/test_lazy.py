"""Tensors by name, made when they are read."""

import pytest
import torch
from torch import Tensor

from dualsft.models.lazy import LazyTensors


def test_tensors_are_made_when_read_and_not_before() -> None:
    """Names, length and membership make nothing; each reading makes one tensor, anew."""
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.ones(2)

    tensors = LazyTensors(["b", "a"], make)
    assert (list(tensors), len(tensors), "a" in tensors, "c" in tensors, made) == (["b", "a"], 2, True, False, [])
    assert tensors["a"] is not tensors["a"]
    assert made == ["a", "a"]


def test_an_unknown_name_is_a_key_error() -> None:
    """As with any mapping, `get` included."""
    tensors = LazyTensors(["a"], lambda name: torch.ones(1))
    assert tensors.get("b") is None
    with pytest.raises(KeyError):
        tensors["b"]
