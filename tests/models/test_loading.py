import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from dualsft.errors import UserError
from dualsft.models import loading as models
from dualsft.models.loading import (
    checkpoint_activations,
    load_model,
    model_fingerprint,
    model_folder,
    parameter_shapes,
    tokenizer_fingerprint,
)
from tests.world.models import save_tiny_model, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model folder."""
    return Path(save_tiny_model(tmp_path_factory.mktemp("sound") / "model"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def test_a_model_comes_back_as_it_was_saved(sound: Path) -> None:
    """Weights are bit-identical, in the stored type unless another is asked for."""
    saved = tiny_llama().state_dict()
    loaded = load_model(str(sound)).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())
    assert load_model(str(sound), "bfloat16").dtype == torch.bfloat16


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrites config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> None:
    """Stores the same weights in several files."""
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="8KB")


def lose_shard(folder: Path) -> None:
    """Loses one of several files."""
    shard(folder)
    min(folder.glob("*.safetensors")).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "is not a model folder: it has no config.json"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no weights; give a folder with model.safetensors",
    ),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"has only pickled weights \(\*\.bin\), which are not read",
    ),
    "an adapter": (lambda f: (f / "model.safetensors").rename(f / "adapter_model.safetensors"), "has no weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded .*: .*header too small"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "cannot be loaded .*header"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:20_000]),
        "cannot be loaded .*: .*incomplete",
    ),
    "a tensor missing": (
        lambda f: change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        r"lacks 1 of the model's weights \(model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a wrong shape": (
        lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(7)})),
        r"has model\.norm\.weight of shape \(7,\) where its config\.json asks for \(32,\)",
    ),
    "a shard missing": (lose_shard, r"names model-\S+, which is no safetensors file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded .* not a valid JSON file"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded .*Unrecognized model"),
    "unknown model type": (lambda f: change_config(f, model_type="nonesuch"), "cannot be loaded .*nonesuch"),
    "no causal model": (lambda f: change_config(f, model_type="t5"), r"is an encoder-decoder model \(t5\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: str) -> None:
    """The message names the folder and the reason, on one line."""
    damaging, reason = DAMAGES[damage]
    damaging(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no/such/model", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can only be a path is never asked of the hub."""
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such folder"):
        model_folder(name)


def test_a_hub_id_is_downloaded_without_pickles(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub repository only configuration, tokenizer and safetensors files are fetched."""
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(sound)

    monkeypatch.setattr(models, "snapshot_download", download)
    assert model_folder("someone/model") == sound
    assert asked["name"] == "someone/model"
    assert not any("model.bin".endswith(pattern.lstrip("*")) for pattern in asked["allow_patterns"])


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line of the client's page of advice is enough."""

    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a page of advice")

    monkeypatch.setattr(models, "snapshot_download", download)
    monkeypatch.setattr("dualsft.storage.hub.is_reachable", lambda: True)
    with pytest.raises(UserError, match=r"^someone/model is neither a local folder nor .* \(no connection\)\.$"):
        load_model("someone/model")


def test_fingerprint_is_independent_of_sharding(sound: Path, folder: Path) -> None:
    """The same weights in one file or in many have one fingerprint; other files in the folder have no part in it."""
    shard(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    save_file({"model.norm.weight": torch.zeros(1)}, folder / "second_moment.safetensors")
    assert model_fingerprint(str(folder)) == model_fingerprint(str(sound))


@pytest.mark.parametrize("bit", [0, 31])
def test_fingerprint_sees_one_bit(sound: Path, folder: Path, bit: int) -> None:
    """One bit of one weight changes it, also beside a file with tensors of the same names."""
    save_file(load_file(folder / "model.safetensors"), folder / "zz.safetensors")
    assert model_fingerprint(str(folder)) == model_fingerprint(str(sound))

    def flip(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"].view(torch.int32)[5] ^= 1 << bit if bit < 31 else -(2**31)

    change_weights(folder, flip)
    assert model_fingerprint(str(folder)) != model_fingerprint(str(sound))


def test_fingerprint_sees_names_shapes_and_types(folder: Path) -> None:
    """The same bytes under another name, in another shape or type are another model."""
    zeros = torch.zeros(4, dtype=torch.int32)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 2)}, {"a": zeros.view(torch.float32)}, {}]
    found = set()
    for variant in variants:
        save_file(variant, folder / "model.safetensors")
        found.add(model_fingerprint(str(folder)))
    assert len(found) == len(variants)


@pytest.mark.parametrize("damage", ["half the weights", "no safetensors", "a shard missing", "no weights", "no config"])
def test_fingerprint_of_a_damaged_folder_is_refused(folder: Path, damage: str) -> None:
    """A base model that is not loaded, only fingerprinted, is told to be broken just as well."""
    DAMAGES[damage][0](folder)
    with pytest.raises(UserError, match=str(folder)):
        model_fingerprint(str(folder))


def test_parameter_shapes_need_no_weights(sound: Path, folder: Path) -> None:
    """The configuration alone gives the shapes of the loaded model's parameters, tied ones once."""
    (folder / "model.safetensors").write_bytes(b"")
    expected = {name: tuple(p.shape) for name, p in load_model(str(sound)).named_parameters()}
    assert parameter_shapes(str(folder)) == expected
    assert "lm_head.weight" not in expected


def test_tokenizer_fingerprint_sees_vocabulary_and_template() -> None:
    """Equal tokenizers have one fingerprint; another chat template or one more token gives another."""
    plain, more = tiny_tokenizer(), tiny_tokenizer()
    assert tokenizer_fingerprint(plain) == tokenizer_fingerprint(more)
    more.add_tokens("<more>")
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(more)
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(tiny_tokenizer("{{ messages }}"))


def test_activations_are_recomputed_while_training() -> None:
    """With checkpointing each block's inside runs twice per step: forward and, again, for backward."""
    model, calls = tiny_llama(), []
    checkpoint_activations(model)
    model.train()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert len(calls) == 2


def test_a_model_that_cannot_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with the option to change."""
    model = tiny_llama()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot .*model\.gradient_checkpointing"):
        checkpoint_activations(model)


def test_a_model_is_loaded_onto_the_host(tmp_path: Path) -> None:
    """Under a device context, as a trainer sets one, the loader does not place the weights by itself."""
    path = save_tiny_model(tmp_path / "model")
    with torch.device("meta"):
        model = load_model(str(path))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
