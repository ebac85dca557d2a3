"""What can be neither scored nor trained is refused before anything is computed; what can be is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BioGptConfig,
    BioGptForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dualsft.errors import UserError
from dualsft.models.inspection import check_causal, check_examples, learned_positions, reason
from dualsft.models.loading import empty_model, load_model, model_folder
from tests.cases import ARCHITECTURES, gpt2, make
from tests.world.models import save_tiny_model

CPU = torch.device("cpu")
_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model folder."""
    return Path(save_tiny_model(tmp_path_factory.mktemp("sound") / "model"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change(folder: Path, **settings: Any) -> None:
    """Rewrites config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def make_adapter(folder: Path) -> None:
    """What PEFT saves."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    add_adapter(folder)


def add_adapter(folder: Path) -> None:
    """What a trainer of adapters leaves beside the model."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (make_adapter, r"adapter \(adapter_config\.json\) for someone/model; merge it"),
    "a model and an adapter": (add_adapter, "holds an adapter"),
    "bitsandbytes": (lambda f: change(f, quantization_config={"load_in_4bit": True}), "quantised by an unnamed method"),
    "gptq": (lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised by gptq"),
    "a quantised part": (
        lambda f: change(f, text_config={"quantization_config": {"quant_method": "fp8"}}),
        "quantised by fp8 .*give the model that they were quantised from",
    ),
    "a classifier": (
        lambda f: change(f, architectures=["LlamaForSequenceClassification"]),
        "not a causal language model: it is a LlamaForSequenceClassification by config.json",
    ),
    "a reward model": (lambda f: change(f, architectures=["LlamaForRewardModel"]), "it is a LlamaForRewardModel"),
    "a masked model": (lambda f: change(f, architectures=["BertForMaskedLM"]), "it is a BertForMaskedLM"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded because it holds no JSON object"),
}
"""What the JSON files alone show."""


@pytest.mark.parametrize("kind", OTHERS)
def test_a_folder_of_another_kind_is_refused(folder: Path, kind: str) -> None:
    """As soon as a folder is named, in one sentence."""
    making, sentence = OTHERS[kind]
    making(folder)
    for use in (model_folder, load_model, empty_model):
        with pytest.raises(UserError, match=sentence) as caught:
            use(str(folder))
        assert str(folder) in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attention": ({"attn_implementation": "flash_attention_2"}, "package that is not installed .*FlashAttention2"),
    "kernel": ({"_attn_implementation": "kernels-community/flash-attn3"}, "package that is not installed .*kernels"),
    "no attention": ({"attn_implementation": "nonsense"}, 'attn_implementation="nonsense"'),
    "padding": ({"pad_token_id": 300}, r"pad_token_id 300, but the embedding has 300 rows .*set pad_token_id to null"),
    "a string": ({"hidden_size": "32"}, "'hidden_size'.*expected int, got str"),
    "heads": ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple"),
    "activation": ({"hidden_act": "nonesuch"}, "KeyError 'nonesuch'"),
    "rope": ({"rope_parameters": {"rope_type": "nonesuch"}}, "KeyError 'nonesuch'"),
    "encoder-decoder": ({"model_type": "t5"}, r"encoder-decoder model \(t5\)"),
    "multimodal": ({"model_type": "llava"}, r"transformers has none for models of the type 'llava'"),
    "of images": ({"model_type": "vit"}, r"transformers has none for models of the type 'vit'"),
    "long": ({"attn_implementation": "n" * 2000}, "nnn"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_configuration_is_one_sentence(folder: Path, kind: str) -> None:
    """Whatever kind of exception the library raises, with or without weights."""
    settings, sentence = REFUSED[kind]
    change(folder, **settings)
    for use in (load_model, empty_model):
        with pytest.raises(UserError, match=sentence) as caught:
            use(str(folder))
        assert str(folder) in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not a valid JSON file"), ("[]", "no JSON object"), ('{"max_new_tokens": -1}', "must be greater than 0")],
)
def test_generation_settings_that_cannot_be_used_are_refused(folder: Path, text: str, sentence: str) -> None:
    """They would be copied beside the tuned weights."""
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=rf"generation_config\.json cannot be .*{sentence}"):
        load_model(str(folder))


def pack_weights(weights: dict[str, torch.Tensor]) -> None:
    """As GPTQ and AWQ store a layer."""
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)


def scale_weights(weights: dict[str, torch.Tensor]) -> None:
    """As bitsandbytes stores a layer in 8 bits."""
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.zeros_like(weights[name], dtype=torch.int8)
    weights["model.layers.0.mlp.up_proj.SCB"] = torch.ones(48)


def shorten_weights(weights: dict[str, torch.Tensor]) -> None:
    """All in 8 bits, without a scale."""
    weights |= {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [pack_weights, scale_weights, shorten_weights])
def test_quantised_tensors_are_seen_without_a_configuration(folder: Path, quantise: Callable[..., None]) -> None:
    """By the names that quantisers give to tensors, or by their types."""
    weights = load_file(folder / "model.safetensors")
    quantise(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if quantise is shorten_weights:
        change(folder, dtype="float8_e4m3fn")
    with pytest.raises(UserError, match=r"quantised weights|float8|Float8"):
        load_model(str(folder))


def bert() -> PreTrainedModel:
    """Attention to both sides."""
    return BertLMHeadModel(BertConfig(**_SIZES, vocab_size=61))


def gemma() -> PreTrainedModel:
    """A decoder that was turned into an encoder."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**_SIZES, vocab_size=61, head_dim=8, num_key_value_heads=1, use_bidirectional_attention=True)
    )


def xlnet() -> PreTrainedModel:
    """Each token sees all others unless it is told which."""
    return XLNetLMHeadModel(XLNetConfig(vocab_size=61, d_model=16, n_layer=1, n_head=2, d_inner=16))


@pytest.mark.parametrize("make_encoder", [bert, gemma, xlnet])
def test_a_model_that_sees_what_follows_is_refused(make_encoder: Callable[[], PreTrainedModel]) -> None:
    """Its losses would be those of a model that is shown the answers."""
    model = make_encoder().eval()
    with pytest.raises(UserError, match="its first token sees the tokens behind it"):
        check_causal(model, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_is_not_refused(architecture: str, dtype: torch.dtype) -> None:
    """Whatever its architecture, rounding and choice of experts."""
    check_causal(make(architecture).eval().to(dtype), CPU)


POSITIONS: dict[str, tuple[Callable[[], PreTrainedModel], int | None]] = {
    "gpt2": (gpt2, 64),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**_OPT, max_position_embeddings=20, ffn_dim=16)), 20),
    "biogpt": (lambda: BioGptForCausalLM(BioGptConfig(**_SIZES, vocab_size=61, max_position_embeddings=20)), 20),
    "roberta": (
        lambda: RobertaForCausalLM(
            RobertaConfig(**_SIZES, vocab_size=61, max_position_embeddings=20, is_decoder=True, pad_token_id=1)
        ),
        18,
    ),
    "gptj": (lambda: GPTJForCausalLM(GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **_GPTJ)), 20),
    "ctrl": (lambda: CTRLLMHeadModel(CTRLConfig(n_embd=16, n_layer=1, n_head=2, dff=16, **_GPTJ)), 20),
    "mpt": (lambda: MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=20, vocab_size=61)), 20),
    "roformer": (
        lambda: RoFormerForCausalLM(
            RoFormerConfig(**_SIZES, vocab_size=61, max_position_embeddings=20, is_decoder=True, embedding_size=16)
        ),
        20,
    ),
    "llama": (lambda: make("llama"), None),
    "bloom": (lambda: make("bloom"), None),
}
_OPT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
_GPTJ: dict[str, Any] = {"n_positions": 20, "vocab_size": 61}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_as_many_as_the_model_takes(kind: str) -> None:
    """It takes an example of that many tokens, and none of one more; others have no such limit."""
    making, places = POSITIONS[kind]
    model = making().eval()
    assert learned_positions(model) == places
    longest = places or 100
    ids = torch.full((1, longest + 1), 5)
    model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]), use_cache=False)
    check_examples(model, "data.train", 60, longest)
    if places:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        with pytest.raises(UserError, match=rf"data\.train has an example of {places + 1} tokens.*{places} or less"):
            check_examples(model, "data.train", 60, places + 1)


def test_ids_without_an_embedding_are_refused() -> None:
    """The first one that has none is."""
    model = make("llama")
    check_examples(model, "data.train", 60, 5)
    with pytest.raises(UserError, match="token id 61, but the model's vocabulary has 61 tokens"):
        check_examples(model, "data.train", 61, 5)


def test_a_reason_is_short() -> None:
    """One line, with the next if it is announced, and never long."""
    assert reason(ValueError("it is so:\n  for this reason\nand more")) == "it is so: for this reason"
    assert reason(KeyError("name")) == "KeyError 'name'"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 5000))) == 300
