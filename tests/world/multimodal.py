"""Tiny bases that are more than a causal language model, as they are released."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from tests.world.models import VOCABULARY, tiny_llama, tiny_tokenizer

_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}


def qwen3_5(tied: bool = False) -> PreTrainedModel:
    """The text part has a further part in its names, ``model.language_model``."""
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 1}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
    vision = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 4}
    tokens: dict[str, Any] = {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }
    text = {**_TEXT, **linear, **kinds, "tie_word_embeddings": tied}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return Qwen3_5ForConditionalGeneration(config)


def llama4() -> PreTrainedModel:
    """The text part is a whole model in its names, ``language_model.model``, and the head too."""
    experts = {"intermediate_size_mlp": 24, "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    joins = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = Llama4Config(text_config={**_TEXT, **experts}, vision_config={**_VISION, **sizes, **joins})
    return Llama4ForConditionalGeneration(config)


def drafting_llama() -> PreTrainedModel:
    """A language model alone, to whose files `save_whole` adds a layer that drafts tokens."""
    return tiny_llama(tied=False)


WHOLE = {"qwen3_5": qwen3_5, "qwen3_5 tied": lambda: qwen3_5(tied=True), "llama4": llama4, "drafting": drafting_llama}


def save_whole(path: Path, kind: str, file_size: str = "1GB") -> str:
    """Writes the folder of a base of this kind, with its processor's files, and returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WHOLE[kind]().save_pretrained(path, max_shard_size=file_size)
        if kind == "drafting":
            stored = load_file(path / "model.safetensors")
            draft = {"mtp.layers.0.weight": torch.randn(3, 4), "mtp.norm.weight": torch.randn(4)}
            save_file({**stored, **draft}, path / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(path)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (path / name).write_text(json.dumps({"of": name}))
    return str(path)
