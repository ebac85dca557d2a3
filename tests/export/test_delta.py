import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dualsft.errors import UserError
from dualsft.export.delta import apply_delta, changed_entries, find_changes, open_delta, write_delta
from dualsft.export.model_card import write_card
from dualsft.plans.live import LiveBytes
from dualsft.training.compact import CompactParameters
from tests.world.damage import flipped
from tests.world.data import random_mask
from tests.world.models import tiny_llama


def changed_llama(dtype: torch.dtype, tied: bool) -> torch.nn.Module:
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
    return model


def write(path: Path, base: torch.nn.Module, tuned: torch.nn.Module, fingerprint: str) -> None:
    """Write the delta between two models."""
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    detached = {name: weight.detach() for name, weight in after.items()}
    found = find_changes(lambda name: before[name].detach(), detached.__getitem__, detached)
    write_delta(path, found, fingerprint, {"why": "a test"})


def test_a_delta_of_all_weights_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """With all weights trained, indices and values of all of them would take thrice the memory of the weights."""
    size, names = 1000, [f"w{k}" for k in range(8)]
    with LiveBytes(vocabulary=0) as live:
        found = find_changes(lambda _: torch.zeros(size), lambda _: torch.ones(size), names)
        write_delta(tmp_path / "delta", found, "abc")
    assert open_delta(tmp_path / "delta").counts == dict.fromkeys(names, size)
    of_tensor = size * (8 + 4)
    assert of_tensor <= live.peaks[-1].size <= 2 * of_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_base_and_delta_make_the_tuned_model(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Writing a delta and applying it to the base gives every bit of the tuned weights."""
    tuned = changed_llama(dtype, tied)
    write(tmp_path / "delta.safetensors", tiny_llama(tied, dtype), tuned, "abc")
    model = tiny_llama(tied, dtype)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    apply_delta(tmp_path / "delta.safetensors", model, "abc")
    for found, expected in zip(model.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(found, expected)
    delta = open_delta(tmp_path / "delta.safetensors")
    assert delta.about == {"why": "a test"}
    assert set(delta.value_types.values()) == {dtype}
    assert "model.layers.1.self_attn.k_proj.weight" not in delta.counts
    assert delta.counts == {name: len(delta.change(name)[0]) for name in delta.counts}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_changes_are_those_of_the_bits(dtype: torch.dtype) -> None:
    """0 and -0 differ, a NaN and itself do not, and NaNs of other payloads do: as a loop over their bytes says."""
    before = torch.tensor([[0.0, 1.0, float("nan")], [2.0, float("inf"), float("nan")]], dtype=dtype)
    after = before.clone()
    after[0, 0], after[1, 0] = -0.0, 2.5
    payload = after.view(torch.uint8).flatten()
    payload[5 * dtype.itemsize] ^= 1  # another NaN
    size = dtype.itemsize
    raw = [bytes(tensor.view(torch.uint8).flatten().tolist()) for tensor in (before, after)]
    expected = [k for k in range(6) if raw[0][k * size : (k + 1) * size] != raw[1][k * size : (k + 1) * size]]
    index, value = changed_entries(before, after)
    assert index.tolist() == expected == [0, 3, 5]
    assert bytes(value.view(torch.uint8).tolist()) == b"".join(raw[1][k * size : (k + 1) * size] for k in expected)


def test_delta_for_other_base_weights_is_refused(tmp_path: Path) -> None:
    """The message names both weights' hashes, and the model is left as it was."""
    write(tmp_path / "delta.safetensors", tiny_llama(), changed_llama(torch.float32, tied=True), "a" * 64)
    model = tiny_llama()
    with pytest.raises(UserError, match=r"base weights aaaaaaaaaaaa, the model has bbbbbbbbbbbb"):
        apply_delta(tmp_path / "delta.safetensors", model, "b" * 64)
    for found, expected in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(found, expected)


def test_delta_is_not_rounded(tmp_path: Path) -> None:
    """A model that is loaded in another type than the values is refused, rather than given other values."""
    write(tmp_path / "delta.safetensors", tiny_llama(), changed_llama(torch.float32, tied=True), "abc")
    with pytest.raises(UserError, match=r"load the base model in float32"):
        apply_delta(tmp_path / "delta.safetensors", tiny_llama(dtype=torch.bfloat16), "abc")


NAME = "model.norm.weight"
DAMAGES: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None, str]] = {
    "no metadata": ({"x": torch.zeros(1)}, {}, r"is not a delta"),
    "no value": ({f"{NAME}.index": torch.arange(2)}, None, r"model.norm.weight.value only one of index and value"),
    "no index": ({f"{NAME}.value": torch.zeros(2)}, None, r"only one of index and value is there"),
    "out of range": ({f"{NAME}.index": torch.tensor([0, 32]), f"{NAME}.value": torch.zeros(2)}, None, "has 32 entries"),
    "negative": ({f"{NAME}.index": torch.tensor([-1, 3]), f"{NAME}.value": torch.zeros(2)}, None, "has 32 entries"),
    "twice": ({f"{NAME}.index": torch.tensor([3, 3]), f"{NAME}.value": torch.zeros(2)}, None, "ascending"),
    "lengths": ({f"{NAME}.index": torch.arange(3), f"{NAME}.value": torch.zeros(2)}, None, "do not belong together"),
    "index type": ({f"{NAME}.index": torch.zeros(2), f"{NAME}.value": torch.zeros(2)}, None, "do not belong together"),
    "value type": (
        {f"{NAME}.index": torch.arange(2), f"{NAME}.value": torch.arange(2)},
        None,
        "as int64, which weights",
    ),
    "unknown parameter": ({"x.index": torch.arange(2), "x.value": torch.zeros(2)}, None, "x, which the model does not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_deltas_are_refused(tmp_path: Path, damage: str) -> None:
    """What is wrong is named, and the model stays as it was."""
    tensors, metadata, words = DAMAGES[damage]
    path = tmp_path / "delta.safetensors"
    save_file(tensors, path, {"base_fingerprint": "abc"} if metadata is None else metadata)
    model = tiny_llama()
    with pytest.raises(UserError, match=words):
        apply_delta(path, model, "abc")
    assert torch.equal(model.get_parameter(NAME), tiny_llama().get_parameter(NAME))


ABOUT: dict[str, dict[str, Any]] = {
    "base": {"name": "b", "dtype": "float32"},
    "counts": {"trained": 3},
    "selection": {"scorer": {"class_path": "a.B", "options": {}}, "data": {"train": []}},
    "training": {"optimizer": [{"name": "SGD"}], "lr_scheduler": [], "data": []},
}


@pytest.mark.parametrize("wrong", [None, [], {}, "x", -1, 1.5, True, [[]]], ids=str)
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("base", "dtype"),
        ("counts", "trained"),
        ("selection", "scorer"),
        ("selection", "data"),
        ("training", "optimizer"),
    ],
)
def test_a_record_that_was_edited_still_makes_a_card(tmp_path: Path, section: str, key: str, wrong: Any) -> None:
    """What is of a wrong type is left out of it; the values themselves are sound."""
    path = tmp_path / "delta.safetensors"
    about = {**ABOUT, section: {**ABOUT[section], key: wrong}}
    tensors = {f"{NAME}.index": torch.arange(2), f"{NAME}.value": torch.zeros(2)}
    save_file(tensors, path, {"base_fingerprint": "abc", "about": json.dumps(about)})
    found = open_delta(path).about
    base = {"local": True, "fingerprint": "abc", "dtype": "auto", **found["base"]}
    write_card(tmp_path, {**found, "base": base, "counts": {"changed": 2, "all": 4, **found["counts"]}})
    assert "**" not in (tmp_path / "README.md").read_text()
    assert found["base"].get("dtype", "auto") in ("auto", "float32", None)


def test_a_record_of_endless_depth_is_refused(tmp_path: Path) -> None:
    """It would end in a RecursionError."""
    save_file({}, tmp_path / "d", {"base_fingerprint": "abc", "about": "[" * 100_000})
    with pytest.raises(UserError, match="is damaged, or no delta"):
        open_delta(tmp_path / "d")


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    """A file that was cut short, or is not there, is told as such."""
    path = tmp_path / "delta.safetensors"
    with pytest.raises(UserError, match="no such file"):
        open_delta(path)
    write(path, tiny_llama(), changed_llama(torch.float32, tied=True), "abc")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        open_delta(path)


def test_a_flipped_bit_of_a_value_is_noticed(tmp_path: Path) -> None:
    """It would be a weight of another value; a delta of an earlier version, without a checksum, is read."""
    path = tmp_path / "delta.safetensors"
    write(path, tiny_llama(), changed_llama(torch.float32, tied=True), "abc")
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) // 2, whole.index(b"base_fingerprint") + 20):
        path.write_bytes(flipped(whole, place))
        with pytest.raises(UserError, match=r"delta\.safetensors is damaged.*it holds other bytes than were written"):
            open_delta(path)
    save_file(load_file(path), path, {"base_fingerprint": "abc"})
    assert open_delta(path).counts


def test_the_file_is_the_same_on_every_run_and_any_reader_s(tmp_path: Path) -> None:
    """Header and data are those of the format: little-endian length, JSON, tensors; metadata in a fixed order."""
    tuned = changed_llama(torch.bfloat16, tied=True)
    for name in ("a", "b"):
        write(tmp_path / name, tiny_llama(dtype=torch.bfloat16), tuned, "abc")
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert raw[8 : 8 + length].startswith(b'{"__metadata__":{"about":')
    with safe_open(tmp_path / "a", framework="pt") as stored:
        metadata = stored.metadata()
    assert {**metadata, "crc32": ""} == {"base_fingerprint": "abc", "about": '{"why": "a test"}', "crc32": ""}
