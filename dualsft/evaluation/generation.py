"""Greedy answers to the prompts of a batch, and the part of an answer that is compared."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dualsft.data.examples import Examples
from dualsft.data.layout import Batch
from dualsft.data.tokenizer import pad_id
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.inspection import embedding_rows, learned_positions
from dualsft.models.rope import has_separate_frequencies
from dualsft.sharding.collectives import all_gather
from dualsft.sharding.groups import calls_alone, rank_slice, world_size
from dualsft.training.compilation import uncompiled


@dataclass(frozen=True)
class Generation:
    """How answers are generated and compared.

    Args:
        max_new_tokens: Longest answer to generate, greedily; 0 generates nothing and reports no exact match.
        answer_pattern: Regular expression that finds the answer in generated text and reference alike: its last match
            counts, or the last group 1 if it has one, commas in numbers aside; empty compares the whole stripped text.
    """

    max_new_tokens: int = 0
    answer_pattern: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"model.generation.max_new_tokens is {self.max_new_tokens}; give 0 (off) or more.")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise UserError(
                f"model.generation.answer_pattern {self.answer_pattern!r} is not a regular expression: {error}."
            ) from error

    def extract(self, text: str) -> str | None:
        """The part of a text that is compared; None if the pattern is not in it."""
        if not self.answer_pattern:
            return text.strip()
        matches = list(re.finditer(self.answer_pattern, text))
        if not matches:
            return None
        answer = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
        return re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip())


class Answer(NamedTuple):
    """A model's answer to the last prompt of an example.

    Attributes:
        prompt: The prompt, special tokens included.
        text: The answer, without special tokens.
        reference: The example's own answer, without special tokens.
        is_cut: Whether the longest answer was reached before its end.
    """

    prompt: str
    text: str
    reference: str
    is_cut: bool


def last_turn(input_ids: Int[Tensor, " token"], labels: Int[Tensor, " token"]) -> tuple[list[int], list[int]]:
    """One example's tokens before its last supervised stretch, and that stretch; at least one token is supervised."""
    supervised = (labels != -100).nonzero().squeeze(1)
    end = int(supervised[-1]) + 1
    gaps = (labels[:end] == -100).nonzero().squeeze(1)
    start = int(gaps[-1]) + 1 if len(gaps) else 0
    return input_ids[:start].tolist(), input_ids[start:end].tolist()


def check_room(model: PreTrainedModel, source: str, examples: Examples, max_new_tokens: int) -> None:
    """Check that the model has positions for the prompts of some examples and for an answer to each."""
    if (places := learned_positions(model)) is None:
        return
    rows = (examples.dataset[i] for i in examples.ok_ids())
    turns = (last_turn(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows)
    longest = max((len(prompt) for prompt, _ in turns), default=0)
    if longest + max_new_tokens > places:
        raise UserError(
            f"{source} has a prompt of {longest:,} tokens, which with an answer of {max_new_tokens:,} is more than the "
            f"model's {places:,} positions; lower model.generation.max_new_tokens or data.max_length."
        )


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int
) -> list[Answer]:
    """Greedy continuations of each example's last prompt.

    Every rank calls this with the same batch and answers its share of the prompts, at least one; all get all answers.

    Raises:
        UserError: if an example has nothing before its supervised tokens.
    """
    turns = [last_turn(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    for example_id, (prompt, _) in zip(batch["example_id"].tolist(), turns, strict=True):
        if not prompt:
            raise UserError(
                f"Example {example_id} of data.validation has no prompt to answer; set model.generation.max_new_tokens "
                "to 0."
            )
    prompts = [prompt for prompt, _ in turns]
    own = _continuations(
        model, tokenizer, prompts[rank_slice()] or prompts[:1], batch["input_ids"].device, max_new_tokens
    )
    answers = [("", False)] * len(turns)
    for number, of_rank in enumerate(all_gather(own)):
        answers[number :: world_size()] = of_rank[: len(answers[number :: world_size()])]
    references = tokenizer.batch_decode([reference for _, reference in turns], skip_special_tokens=True)
    spelt = tokenizer.batch_decode(prompts)
    parts = zip(spelt, answers, references, strict=True)
    return [Answer(prompt, text, reference, is_cut) for prompt, (text, is_cut), reference in parts]


def _continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    device: torch.device,
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """Greedy continuations as texts, each with whether it has no end.

    Every rank calls the model as often as the rank that finishes last.
    """
    pad, rows = min(pad_id(tokenizer), embedding_rows(model) - 1), [torch.tensor(prompt) for prompt in prompts]
    # on the left, so that every prompt ends in the last column
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(device)
    configured = model.generation_config.eos_token_id if model.generation_config else None
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        use_cache=not has_separate_frequencies(model),
        eos_token_id=tokenizer.eos_token_id if configured is None else configured,
    )
    generate: Any = model.generate  # not part of the base class's type
    with uncompiled(model):  # every block and every length of its cache would be compiled by itself
        tokens = generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=not calls_alone())
    made = tokens[:, ids.shape[1] :]
    known = [] if config.eos_token_id is None else config.eos_token_id
    ends = torch.tensor(known, dtype=made.dtype, device=made.device)
    has_end = torch.isin(made, ends).any(1).tolist()
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [(text, not ended) for text, ended in zip(texts, has_end, strict=True)]
