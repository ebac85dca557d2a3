"""Compact masters of a sharded model: in pieces they are those of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.objectives import example_losses
from dualsft.sharding.collectives import all_gather
from dualsft.sharding.groups import rank, shard_mesh, world_size
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import full_tensor, local_shard
from dualsft.sharding.vectors import gather_vectors, split_vectors
from dualsft.training.compact import CompactParameters
from tests.world.data import random_batch, random_mask
from tests.world.models import tiny_llama
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

BATCH = random_batch(3, 8)
Mask = dict[str, Tensor]


def mask_of(dtype: torch.dtype) -> Mask:
    """A third of the weights, all of one tensor, none of another, and the last row alone of a third."""
    mask = random_mask(tiny_llama(dtype=dtype), 0.3)
    mask["model.layers.0.mlp.up_proj.weight"][:] = True
    mask["model.norm.weight"][:] = False
    mask["model.layers.1.mlp.up_proj.weight"][:-1] = False
    return mask


def trained(dtype: torch.dtype, mask: Mask | None) -> dict[str, Any]:
    """What two steps of Adam leave, and a backward pass after them; in shards where there are ranks."""
    model = tiny_llama(dtype=dtype)
    if world_size() > 1:
        shard_model(model, shard_mesh("cpu"))
    compact = CompactParameters(model, mask)
    compact.attach()
    optimizer = torch.optim.Adam(compact.parameters(), lr=1e-2)
    compact.write_back_after(optimizer)
    for step in range(3):
        (example_losses(model, BATCH).sum() * 2 ** rank() / (2 ** world_size() - 1)).backward()
        if step < 2:
            compact.add_up_gradients()
            optimizer.step()
    named = dict(model.named_parameters())
    return {
        "names": compact.names,
        "requires_grad": [weight.requires_grad for weight in named.values()],
        "fingerprint": compact.fingerprint,
        "selected": compact.num_selected,
        "gradients": compact.pending_gradients(),
        "dense": [name for name, weight in named.items() if weight.grad is not None],
        "state": compact.state_dict(),
        "weights": {name: full_tensor(local_shard(weight.detach()), weight).clone() for name, weight in named.items()},
        "lengths": all_gather([len(master) for master in compact.masters]),
    }


def assert_close(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float) -> None:
    """The same tensors, but for rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


KINDS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "everything": torch.float64}


def all_trained(masks: dict[str, Mask | None]) -> dict[str, dict[str, Any]]:
    """Of every kind."""
    return {kind: trained(KINDS[kind], mask) for kind, mask in masks.items()}


@pytest.mark.parametrize("count", [2, 5])
def test_masters_in_pieces_are_those_of_one_process(count: int) -> None:
    """Which weights are trained, their gradients summed over ranks, the state after steps, and the model's weights."""
    masks = {kind: None if kind == "everything" else mask_of(dtype) for kind, dtype in KINDS.items()}
    for kind, found in run_on_ranks(count, all_trained, masks)[0].items():
        mask, dtype = masks[kind], KINDS[kind]
        expected = trained(dtype, mask)
        for key in ("names", "requires_grad", "fingerprint", "selected"):
            assert found[key] == expected[key], key
        assert found["dense"] == []
        tolerance = 5e-2 if kind == "bfloat16" else 1e-6  # norms compute in float32 whatever the weights are
        for key in ("gradients", "state", "weights"):
            assert_close(found[key], expected[key], tolerance)
        if mask is not None:
            base = dict(tiny_llama(dtype=dtype).named_parameters())
            assert all(torch.equal(found["weights"][name][~mask[name]], base[name][~mask[name]]) for name in mask)
            assert any(0 in lengths for lengths in found["lengths"])


def loaded(state: dict[str, Tensor], gradients: dict[int, Tensor], mask: Mask) -> list[dict[Any, Tensor]]:
    """What a state and gradients become that are loaded here and saved again, and the model's weights."""
    model = tiny_llama(dtype=torch.float64)
    shard_model(model, shard_mesh("cpu"))
    compact = CompactParameters(model, mask)
    compact.load_state_dict(state)
    compact.restore_gradients(gradients)
    weights = {
        name: full_tensor(local_shard(weight.detach()), weight).clone() for name, weight in model.named_parameters()
    }
    return [dict(compact.state_dict()), compact.pending_gradients(), weights]


def test_a_state_of_one_process_is_taken_apart() -> None:
    """Every rank takes its piece of it, and puts it into its shards; joined again it has the same bits."""
    mask = mask_of(torch.float64)
    expected = trained(torch.float64, mask)
    answers = run_on_ranks(3, loaded, expected["state"], expected["gradients"], mask)
    for found, key in zip(answers[0], ("state", "gradients", "weights"), strict=True):
        assert_close(found, dict(expected[key]), 0)
    assert all(len(tensor) == 0 for tensor in answers[1][0].values())


def nothing_selected() -> str:
    """What a mask without an entry is refused with."""
    model = tiny_llama()
    mask = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in model.named_parameters()}
    shard_model(model, shard_mesh("cpu"))
    with pytest.raises(ValueError, match="no weight is selected") as error:
        CompactParameters(model, mask)
    return str(error.value)


def test_a_mask_of_one_rank_s_rows() -> None:
    """That a rank has no selected weight is no mistake, and that all have none is one on every rank."""
    assert len(run_on_ranks(2, nothing_selected)) == 2
    mask = {name: torch.zeros_like(chosen) for name, chosen in mask_of(torch.float64).items()}
    mask["model.embed_tokens.weight"][0, :5] = True
    found, expected = run_on_ranks(2, trained, torch.float64, mask)[0], trained(torch.float64, mask)
    assert found["lengths"] == [[5], [0]]
    assert_close(found["weights"], expected["weights"], 1e-6)


def pieces(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors of which rank r has r entries, and their number, joined; and this rank's pieces of two others."""
    own = [torch.full((rank(),), rank(), dtype=dtype), torch.empty(0, dtype=dtype)]
    taken = split_vectors([torch.arange(3).to(dtype), torch.arange(6).to(dtype)], [rank(), 2])
    with pytest.raises(ValueError, match="a vector of 4 entries for pieces of 3 in all"):
        split_vectors([torch.arange(4)], [rank()])
    return gather_vectors(own), taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_pieces(dtype: torch.dtype) -> None:
    """They are joined in the order of ranks on the first, and taken apart again."""
    answers = run_on_ranks(3, pieces, dtype)
    whole_ones, _ = answers[0]
    assert [vector.tolist() for vector in whole_ones] == [[1, 2, 2], []]
    assert all(vector.dtype == dtype for joined_ones, taken in answers for vector in joined_ones + taken)
    assert [[vector.tolist() for vector in taken] for _, taken in answers] == [
        [[], [0, 1]],
        [[0], [2, 3]],
        [[1, 2], [4, 5]],
    ]
