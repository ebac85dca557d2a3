from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dualsft.compact import CompactParameters
from dualsft.errors import UserError
from dualsft.finetune.delta import apply_delta, write_delta
from tests.cases import random_mask, tiny_llama


def changed_llama(dtype: torch.dtype, tied: bool) -> tuple[torch.nn.Module, CompactParameters]:
    """A model whose selected weights have been moved; one tensor is wholly selected, one not at all."""
    model = tiny_llama(tied, dtype)
    mask = random_mask(model, 0.2)
    mask["model.norm.weight"][:] = True
    mask["model.layers.1.self_attn.k_proj.weight"][:] = False
    compact = CompactParameters(model, mask)
    with torch.no_grad():
        for master in compact.masters:
            master.add_(0.25)
    compact.write_back()
    return model, compact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_base_and_delta_make_the_tuned_model(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Writing a delta and applying it to the base gives every bit of the tuned weights."""
    tuned, compact = changed_llama(dtype, tied)
    write_delta(tmp_path / "delta.safetensors", tuned, compact, "abc")
    model = tiny_llama(tied, dtype)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    apply_delta(tmp_path / "delta.safetensors", model, "abc")
    for found, expected in zip(model.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_delta_for_other_base_weights_is_refused(tmp_path: Path) -> None:
    """The message names both weights' hashes, and the model is left as it was."""
    tuned, compact = changed_llama(torch.float32, tied=True)
    write_delta(tmp_path / "delta.safetensors", tuned, compact, "a" * 64)
    model = tiny_llama()
    with pytest.raises(UserError, match=r"base weights aaaaaaaaaaaa, the model has bbbbbbbbbbbb"):
        apply_delta(tmp_path / "delta.safetensors", model, "b" * 64)
    for found, expected in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_file_that_is_no_delta_is_refused(tmp_path: Path) -> None:
    """Any other safetensors file is named as such."""
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not a delta"):
        apply_delta(tmp_path / "model.safetensors", tiny_llama(), "abc")
