import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualsft.errors import UserError
from dualsft.export import checkpoints
from dualsft.export.checkpoints import prepare_apply, prepare_extract, prepare_revert
from dualsft.export.delta import open_delta
from dualsft.models.loading import load_model, model_fingerprint
from tests.world.data import random_mask
from tests.world.models import save_tiny_model, tiny_llama, tiny_tokenizer

GENERATION = '{"max_new_tokens": 7, "eos_token_id": 2, "temperature": 0.6, "do_sample": true}\n'
KINDS = ("tied", "untied", "bfloat16", "sharded", "unprefixed", "tied twice")
LOADED = ("unprefixed", "tied twice")


def save_base(folder: Path, kind: str) -> str:
    """A base model whose files are of some kind, with generation settings of its own."""
    model = tiny_llama(tied=kind != "untied", dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "unprefixed":
        model.model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind == "tied twice":
        stored = load_file(folder / "model.safetensors")
        twice = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}
        save_file(twice, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(GENERATION)
    return str(folder)


def save_tuned(folder: Path, base: str, dtype: Any = "auto") -> str:
    """The base with one weight in ten moved, as a fit would save it."""
    model = load_model(base, dtype)
    with torch.no_grad():
        for name, moved in random_mask(model, 0.1).items():
            weight = model.get_parameter(name)
            weight.add_(moved, alpha=0.25)
    model.generation_config.temperature = None
    model.generation_config.do_sample = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def written(folder: Path, write: checkpoints.Writer) -> Path:
    """What a writer leaves in a fresh folder."""
    folder.mkdir()
    write(folder)
    return folder


def never(*_: object, **__: object) -> None:
    """Stands for what must not be called."""
    raise AssertionError("the model was loaded")


def assert_same_model(found: Path, expected: str) -> None:
    """Plain transformers loads both, to the same bits, and they write the same text."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (found, expected)]
    for (name, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    prompt = AutoTokenizer.from_pretrained(found)("3 + 9? ", return_tensors="pt")
    texts = [model.generate(**prompt, do_sample=False, max_new_tokens=7).tolist() for model in models]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extract, apply and revert: the tuned model to the bit, then the base to the bit; in the base's own files.

    Whatever holds the parameters under their own names is never loaded as a model.
    """
    base = save_base(tmp_path / "base", kind)
    tuned = save_tuned(tmp_path / "tuned", base)
    if kind not in LOADED:
        monkeypatch.setattr(checkpoints, "load_model", never)
        monkeypatch.setattr("dualsft.models.stored.load_model", never)
    delta = written(tmp_path / "delta", prepare_extract(base, tuned)) / "delta.safetensors"
    applied = written(tmp_path / "applied", prepare_apply(base, str(delta)))
    assert_same_model(applied, tuned)
    assert (applied / "generation_config.json").read_text() == GENERATION
    if kind in LOADED:
        assert model_fingerprint(str(applied)) == model_fingerprint(tuned)
    else:
        assert [p.name for p in sorted(applied.glob("model*"))] == [p.name for p in sorted(Path(base).glob("model*"))]
    for number, model in enumerate((tuned, str(applied))):
        reverted = written(tmp_path / f"reverted-{number}", prepare_revert(model, base, str(delta)))
        assert model_fingerprint(str(reverted)) == model_fingerprint(base)
        for file in Path(base).glob("*"):
            if file.name != "README.md" and not file.name.startswith("tokenizer"):
                assert (reverted / file.name).read_bytes() == file.read_bytes(), file.name


def test_extract_finds_what_a_loop_finds(tmp_path: Path) -> None:
    """Every changed entry, and no other, with its new value."""
    base = save_base(tmp_path / "base", "tied")
    tuned = save_tuned(tmp_path / "tuned", base)
    delta = open_delta(written(tmp_path / "delta", prepare_extract(base, tuned)) / "delta.safetensors")
    before, after = (load_file(Path(path) / "model.safetensors") for path in (base, tuned))
    assert delta.base_fingerprint == model_fingerprint(base)
    for name, weight in after.items():
        pairs = enumerate(zip(before[name].flatten().tolist(), weight.flatten().tolist(), strict=True))
        expected = {k: new for k, (old, new) in pairs if old != new}
        index, value = delta.change(name)
        assert dict(zip(index.tolist(), value.tolist(), strict=True)) == expected


@pytest.mark.parametrize(("stored", "tuned_in"), [("bfloat16", "float32"), ("tied", "bfloat16")])
def test_a_base_that_was_loaded_in_another_type(tmp_path: Path, stored: str, tuned_in: str) -> None:
    """Apply loads the base in the tuned model's type; from a wider type the base comes back to the bit."""
    base = save_base(tmp_path / "base", stored)
    tuned = save_tuned(tmp_path / "tuned", base, tuned_in)
    delta = written(tmp_path / "delta", prepare_extract(base, tuned)) / "delta.safetensors"
    share = sum(open_delta(delta).counts.values()) / sum(w.numel() for w in load_model(base).parameters())
    assert 0.05 < share < 0.15
    applied = written(tmp_path / "applied", prepare_apply(base, str(delta)))
    assert_same_model(applied, tuned)
    if tuned_in == "float32":
        reverted = written(tmp_path / "reverted", prepare_revert(tuned, base, str(delta)))
        assert model_fingerprint(str(reverted)) == model_fingerprint(base)
    else:
        with pytest.raises(UserError, match="rounded to a narrower type"):
            prepare_revert(tuned, base, str(delta))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    """Another base, another tuned model, other tensors or shapes, no change, no tokenizer: each in a sentence."""
    base, tuned = save_base(tmp_path / "base", "tied"), ""
    tuned = save_tuned(tmp_path / "tuned", base)
    delta = str(written(tmp_path / "delta", prepare_extract(base, tuned)) / "delta.safetensors")
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"belongs to base weights \w{12}, .*other has \w{12}; give the model"):
        prepare_apply(other, delta)
    with pytest.raises(UserError, match="belongs to base weights"):
        prepare_revert(tuned, other, delta)
    with pytest.raises(UserError, match="was made from another model"):
        prepare_revert(other, base, delta)
    with pytest.raises(UserError, match="there is no change to extract"):
        prepare_extract(base, base)
    with pytest.raises(UserError, match=r"has lm_head.weight and .*base has not"):
        prepare_extract(base, save_tiny_model(tmp_path / "untied", tied=False))
    wide = tiny_llama()
    wide.resize_token_embeddings(310)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"model.embed_tokens.weight has shape \(300, 32\)"):
        prepare_extract(base, str(tmp_path / "wide"))
    for file in Path(base).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        prepare_apply(base, delta)


def test_a_delta_without_a_record_is_applied_too(tmp_path: Path) -> None:
    """`base_fingerprint` is all that the metadata need; the card says what the delta itself shows."""
    base = save_base(tmp_path / "base", "tied")
    path = tmp_path / "delta.safetensors"
    name = "model.norm.weight"
    tensors = {f"{name}.index": torch.tensor([1, 3]), f"{name}.value": torch.tensor([5.0, 6.0])}
    save_file(tensors, path, {"base_fingerprint": model_fingerprint(base)})
    applied = written(tmp_path / "applied", prepare_apply(base, str(path)))
    assert load_file(applied / "model.safetensors")[name][:4].tolist() == [1.0, 5.0, 1.0, 6.0]
    assert "with 2 of its" in (applied / "README.md").read_text()
    assert json.loads((applied / "config.json").read_text()) == json.loads((Path(base) / "config.json").read_text())


def test_a_checkpoint_of_mixed_types_keeps_them(tmp_path: Path) -> None:
    """Every tensor comes out in the type that it was stored in, changed or not."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    save_base(base, "bfloat16")
    stored = load_file(base / "model.safetensors")
    stored = {name: value.float() if "norm" in name else value for name, value in stored.items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    save_base(tuned, "bfloat16")
    moved = {**stored, "model.norm.weight": stored["model.norm.weight"] + 0.1}
    moved["model.layers.0.mlp.up_proj.weight"] = moved["model.layers.0.mlp.up_proj.weight"] + 0.25
    save_file(moved, tuned / "model.safetensors", {"format": "pt"})
    written(tmp_path / "delta", prepare_extract(str(base), str(tuned)))
    made = written(tmp_path / "made", prepare_apply(str(base), str(tmp_path / "delta" / "delta.safetensors")))
    found = load_file(made / "model.safetensors")
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in moved.items())


def test_shards_in_a_folder_of_their_own_stay_there(tmp_path: Path) -> None:
    """The index names them, and plain transformers finds them."""
    base, tuned = (
        save_base(tmp_path / "base", "sharded"),
        save_tuned(tmp_path / "tuned", save_base(tmp_path / "b", "tied")),
    )
    index = Path(base, "model.safetensors.index.json")
    told = json.loads(index.read_text())
    Path(base, "w").mkdir()
    for shard in set(told["weight_map"].values()):
        Path(base, shard).rename(Path(base, "w", shard))
    told["weight_map"] = {name: f"w/{shard}" for name, shard in told["weight_map"].items()}
    index.write_text(json.dumps(told))
    written(tmp_path / "delta", prepare_extract(base, tuned))
    made = written(tmp_path / "made", prepare_apply(base, str(tmp_path / "delta" / "delta.safetensors")))
    expected = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    found = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
