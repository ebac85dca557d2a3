"""Tiny models, tokenizers and data files that the tests share."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.data.tiny_tokenizers import byte_level

VOCABULARY = 300  # 256 bytes, 5 special tokens, and a few merges


def tiny_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """A fast byte-level BPE tokenizer with <pad>, <bos> and <eos>."""
    return byte_level(template, vocabulary=VOCABULARY)


def tiny_llama(tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 2 layers and 32 channels over the tokens of `tiny_tokenizer`; no dropout, random weights."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    made: LlamaForCausalLM = model.to(dtype).eval()
    return made


def save_tiny_model(
    path: Path,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    template: str | None = None,
) -> str:
    """Writes a Hugging Face folder: `tiny_llama` in safetensors, and `tiny_tokenizer`."""
    tiny_llama(tied, dtype, seed).save_pretrained(path)
    tiny_tokenizer(template).save_pretrained(path)
    return str(path)


def random_batch(examples: int, tokens: int, seed: int = 0, ragged: bool = True) -> dict[str, Tensor]:
    """Random tokens, right-padded: example i is up to i tokens shorter; its first third is unsupervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (examples, tokens), generator=generator)
    lengths = torch.tensor([max(3, tokens - i * ragged) for i in range(examples)])
    where = torch.arange(tokens).expand(examples, tokens)
    inside = where < lengths[:, None]
    return {
        "example_id": torch.arange(examples),
        "input_ids": ids.where(inside, 0),
        "attention_mask": inside.long(),
        "labels": ids.where(inside & (where >= lengths[:, None] // 3), -100),
    }


def random_mask(model: torch.nn.Module, fraction: float, seed: int = 0) -> dict[str, Tensor]:
    """Parameter name -> bool: each weight with this probability, independently."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < fraction for n, p in model.named_parameters()}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Writes records, one to a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, str]]:
    """Prompt/response records of varied length: little additions, spelt out."""
    return [{"prompt": f"{i} + {i * i}?", "response": f"{i} and {i * i} make #### {i + i * i}"} for i in range(count)]
