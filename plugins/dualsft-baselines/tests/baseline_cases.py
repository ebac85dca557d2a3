"""What the tests share: scores made by hand, and a tiny model with a pool to run `dualsft select` on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dualsft_baselines.sampling import random_entries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dualsft import ScoredExamples, ScoredParameters, load_examples
from dualsft.cli import run

RESPONSES = [
    "4, of course.",
    "",
    "Wide and deep, deep and wide.",
    "y",
    "is the capital of France.",
    "48 clips",
    "no",
    "the sea, the sea",
]
"""Of the pool; the second has nothing to train on."""
OK = [i for i, response in enumerate(RESPONSES) if response]


def examples(score: Sequence[float], num_tokens: Sequence[int] | None = None, **statistics: Tensor) -> ScoredExamples:
    """Scored examples whose ids are 10, 12, 14, ..., so that ids and places differ."""
    ids = torch.arange(len(score)) * 2 + 10
    tokens = torch.ones(len(score), dtype=torch.int64) if num_tokens is None else torch.tensor(num_tokens)
    return ScoredExamples(ids, torch.tensor(score, dtype=torch.float64), tokens, [{} for _ in score], **statistics)


def doubles(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def parameters(weights: Mapping[str, Tensor]) -> ScoredParameters:
    """Scored parameters with these weights; their scores are not what is asked for."""
    return ScoredParameters({name: torch.full(w.shape, -1.0) for name, w in weights.items()}, weights)


def chosen(mask: Mapping[str, Tensor]) -> set[tuple[str, int]]:
    """Names and flat indices."""
    return {(name, k) for name, part in mask.items() for k in part.flatten().nonzero().flatten().tolist()}


def is_mask_of(mask: Mapping[str, Tensor], scores: Mapping[str, Tensor], budget: int) -> bool:
    """Whether a mask is bool, of every parameter's shape, and of exactly so many entries."""
    shapes = {name: score.shape for name, score in scores.items()}
    return (
        {name: part.shape for name, part in mask.items()} == shapes
        and all(part.dtype == torch.bool for part in mask.values())
        and sum(int(part.sum()) for part in mask.values()) == budget
    )


@dataclass(frozen=True)
class Job:
    """What a selection is made from.

    Attributes:
        model: Folder of a tiny untied Llama, float32.
        train: The pool's file.
        validation: The validation set's file.
    """

    model: str
    train: str
    validation: str

    def select(self, folder: Path, *options: str) -> Path:
        """Run `dualsft select` and give its output folder; no warm-up and P = 1 unless the options say otherwise."""
        sources = ["--data.train", self.train, "--data.validation", self.validation]
        plain = ["--model.preconditioner", "none", "--model.warmup.fraction", "0", "--model.dtype", "float32"]
        quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
        given = ["--model.model_name_or_path", self.model, *sources, *plain, *quiet, *options]
        run(["select", *given, "--output_dir", str(folder)])
        return folder


def write_job(folder: Path) -> Job:
    """The model and both files; no two examples are alike, and no weight is at a special point."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder / "model")
    pool = [{"prompt": f"Question {i}?", "response": response} for i, response in enumerate(RESPONSES)]
    target = [{"prompt": "What is 1 + 1?", "response": "2."}, {"prompt": "Rome", "response": "is in Italy, of course."}]
    for name, rows in (("train", pool), ("validation", target)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return Job(str(folder / "model"), str(folder / "train.jsonl"), str(folder / "validation.jsonl"))


def differentiate(model: LlamaForCausalLM, path: str) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of each example of a file that has labels."""
    losses, gradients = [], []
    for row in load_examples(path, AutoTokenizer.from_pretrained(model.name_or_path)):
        labels = torch.tensor(row["labels"])
        if bool((labels != -100).any()):
            logits = model(torch.tensor(row["input_ids"])[None]).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:])
            gradients.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
            losses.append(loss.detach())
    return torch.stack(losses), torch.stack(gradients)


def flat(tensors: Any) -> Tensor:
    """One vector, float64."""
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: k for k, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=1000
    )


def subset(size: int, count: int, seed: int) -> tuple[int, ...]:
    """One draw of `random_entries`, as indices."""
    drawn = random_entries(size, count, torch.Generator().manual_seed(seed))
    return tuple(drawn.nonzero().flatten().tolist())
