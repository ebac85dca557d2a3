"""Records, files of them, random batches and masks."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.world.models import VOCABULARY

LINES = [
    '{"prompt": "What is 2 + 2?",   "response": "4, of course."}',
    '{"prompt": "no answer", "response": ""}',
    '{"response": "keys in another order", "prompt": "And?"}',
    '{"prompt": "' + "very long " * 20 + '", "response": "cut away"}',
    '{"prompt": "line ends", "response": "a\u2028b\u0085c"}',
    '{"prompt": "escaped", "response": "\\u00e9\\n\\"é\\"", "extra": [1, {"a": null}]}',
    '{"prompt": "x", "response": "y"}',
    '{"prompt": "The sea?", "response": "Wide and deep, deep and wide."}',
    '{"prompt": "The sea?", "response": "Wide and deep, deep and wide."}',
    '{"prompt": "Paris", "response": "is the capital of France."}',
]
"""A pool with an empty and a truncated row, and all that lines may hold."""
STATUS = ["ok", "empty", "ok", "truncated", "ok", "ok", "ok", "ok", "ok", "ok"]
OK = [i for i, status in enumerate(STATUS) if status == "ok"]
VALIDATION = [
    '{"prompt": "What is 1 + 1?", "response": "2, of course."}',
    '{"prompt": "", "response": ""}',
    '{"prompt": "Rome", "response": "is the capital of Italy."}',
]

Row = Mapping[str, Any] | str
"""A record, or a line as it is."""


def write_jsonl(path: Path, rows: Iterable[Row]) -> str:
    """Writes records, one to a line."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return str(path)


def sums(count: int) -> list[dict[str, str]]:
    """Prompt/response records of varied length: little additions, spelt out."""
    return [{"prompt": f"{i} + {i * i}?", "response": f"{i} and {i * i} make #### {i + i * i}"} for i in range(count)]


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
