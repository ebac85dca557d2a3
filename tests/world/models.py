"""A tiny Llama, its tokenizer and its folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.world.tokenizers import byte_level

VOCABULARY = 300  # 256 bytes, 5 special tokens, and a few merges
DENSE: dict[str, Any] = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "pad_token_id": None,
}
"""Sizes of a Llama of some 1,500 weights, small enough for its Hessian."""


def tiny_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """A fast byte-level BPE tokenizer with <pad>, <bos> and <eos>."""
    return byte_level(template, vocabulary=VOCABULARY)


def tiny_llama(
    tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, noise: float = 0.0, **sizes: Any
) -> LlamaForCausalLM:
    """A Llama of 2 layers and 32 channels over the tokens of `tiny_tokenizer`; no dropout, random weights.

    Args:
        tied: Whether the head is the embedding.
        dtype: Of the weights.
        seed: Of the weights.
        noise: Standard deviation of what is added to each weight, so that norms and padding are not special.
        **sizes: Other fields of its configuration.
    """
    tokenizer = tiny_tokenizer()
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**{**usual, **sizes}))
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    made: LlamaForCausalLM = model.to(dtype).eval()
    return made


def save_tiny_model(path: Path, template: str | None = None, **options: Any) -> str:
    """Writes a Hugging Face folder: `tiny_llama` with these options in safetensors, and `tiny_tokenizer`."""
    tiny_llama(**options).save_pretrained(path)
    tiny_tokenizer(template).save_pretrained(path)
    return str(path)
