"""A base that is more than its language model comes out whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dualsft.errors import UserError
from dualsft.export import whole as module
from dualsft.export.checkpoints import copy_companions, prepare_apply, prepare_extract, save_weights
from dualsft.export.whole import whole_of
from dualsft.models.loading import load_model
from tests.world.models import save_tiny_model, tiny_tokenizer
from tests.world.multimodal import WHOLE, save_whole

REST = re.compile("visual|vision|multi_modal|mtp")


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return found


def tuned(base: str, target: Path, dtype: str = "auto") -> Path:
    """What a fit writes that adds a number of its own to each weight of the model."""
    model = load_model(base, dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for k, weight in enumerate(model.parameters()):
            weight.add_(0.125 + k / 64)
    save_weights(model, target, whole_of(base))
    copy_companions(base, target)
    return target


@pytest.mark.parametrize(("kind", "file_size"), [*((kind, "1GB") for kind in WHOLE), ("qwen3_5 tied", "20KB")])
def test_nothing_is_lost(tmp_path: Path, kind: str, file_size: str) -> None:
    """Every tensor is there under its name and in its file, new if it is the language model's, otherwise as before."""
    base = save_whole(tmp_path / "base", kind, file_size)
    found = tuned(base, tmp_path / "tuned")
    before, after = tensors(tmp_path / "base"), tensors(found)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == bool(REST.search(name)), name
    for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        assert (found / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert {p.name for p in found.glob("*.safe*")} == {p.name for p in (tmp_path / "base").glob("*.safe*")}


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5 tied"])
def test_its_own_class_loads_it(tmp_path: Path, kind: str) -> None:
    """The multimodal class computes on text what the tuned language model does."""
    found = tuned(save_whole(tmp_path / "base", kind), tmp_path / "tuned")
    whole, text = (auto.from_pretrained(found).eval() for auto in (AutoModelForImageTextToText, AutoModelForCausalLM))
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, text(input_ids=ids).logits)
    assert type(whole).__name__ in json.loads((found / "config.json").read_text())["architectures"]


def test_another_type_of_weights_is_told_in_the_configuration(tmp_path: Path) -> None:
    """The language model is stored as it was trained, the rest as it was."""
    base = save_whole(tmp_path / "base", "qwen3_5")
    found = tuned(base, tmp_path / "tuned", "bfloat16")
    types = {"visual" in name: tensor.dtype for name, tensor in tensors(found).items()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert json.loads((found / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(found).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", WHOLE)
def test_export_gives_the_same_files(tmp_path: Path, kind: str) -> None:
    """Extract and apply lead to the tuned checkpoint, bit by bit."""
    base = save_whole(tmp_path / "base", kind)
    found = tuned(base, tmp_path / "tuned")
    for folder, write in (
        ("delta", lambda: prepare_extract(base, str(found))),
        ("applied", lambda: prepare_apply(base, str(tmp_path / "delta" / "delta.safetensors"))),
    ):
        (tmp_path / folder).mkdir()
        write()(tmp_path / folder)
    for path in found.iterdir():
        assert (tmp_path / "applied" / path.name).read_bytes() == path.read_bytes(), path.name


def test_extract_refuses_what_a_delta_cannot_hold(tmp_path: Path) -> None:
    """A vision tower that differs is no change of the language model."""
    base, other = save_whole(tmp_path / "base", "qwen3_5"), Path(save_whole(tmp_path / "other", "qwen3_5"))
    changed = tensors(other)
    for name in ("model.visual.merger.norm.weight", "lm_head.weight"):
        changed[name] += 1
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"differs .* in model\.visual\.merger\.norm\.weight, which is no part"):
        prepare_extract(base, str(other))


def test_a_language_model_is_all_there_is(tmp_path: Path) -> None:
    """A plain base, and one that stores buffers that models compute, are saved as ever."""
    base = save_tiny_model(tmp_path / "base")
    assert whole_of(base) is None
    stored = load_file(tmp_path / "base" / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**stored, **old}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert whole_of(base) is None


def test_a_form_that_cannot_be_restored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, if a weight has no place in the base's files."""
    base = save_whole(tmp_path / "base", "qwen3_5")
    monkeypatch.setattr(module, "_places", lambda *_: {})
    with pytest.raises(UserError, match=r"more than a causal language model \(model\.visual.*language model alone"):
        whole_of(base)


def test_the_processor_of_a_base_is_kept(tmp_path: Path) -> None:
    """Its files are copied beside the tokenizer; the tokenizer's own are written by it."""
    base = Path(save_tiny_model(tmp_path / "base"))
    (base / "chat_template.json").write_text('{"chat_template": "x"}')
    (base / "preprocessor_config.json").write_text("{}")
    (base / "notes.json").write_text("{}")
    (tmp_path / "out").mkdir()
    copy_companions(str(base), tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    added = {p.name for p in (tmp_path / "out").iterdir()} - {p.name for p in (tmp_path / "plain").iterdir()}
    assert added == {"chat_template.json", "preprocessor_config.json", "generation_config.json"}
