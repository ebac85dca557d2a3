from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from dualsft.data.batches import collate
from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.evaluation import Generation
from dualsft.evaluation.generation import generate_answers, last_turn
from tests.world.models import tiny_llama, tiny_tokenizer

GSM8K = r"#### (-?[\d.,]+)"
NEW_TOKENS = 12


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (GSM8K, "She sold 48 + 24.\n#### 72", "72"),
        (GSM8K, "so\n#### 1,234", "1234"),
        (GSM8K, "#### -1,234,567.5", "-1234567.5"),
        (GSM8K, "#### 3\nno:\n#### 4", "4"),
        (GSM8K, "72", None),
        (r"\d+", "3 and 4", "4"),
        (r"(a)|b", "b", ""),
        (r"[\d, ]+", "1, 2", "1, 2"),
        ("", "  the sea\n", "the sea"),
    ],
)
def test_extract(pattern: str, text: str, answer: str | None) -> None:
    """The last match's group 1, or all of it, without thousands separators; without a pattern the stripped text."""
    assert Generation(10, pattern).extract(text) == answer


def test_settings_that_make_no_sense_are_refused() -> None:
    """Each names the option and its value."""
    with pytest.raises(UserError, match=r"max_new_tokens is -1"):
        Generation(-1)
    with pytest.raises(UserError, match=r"answer_pattern '\(' is not a regular expression"):
        Generation(1, "(")


@pytest.mark.parametrize(
    ("supervised", "prompt", "reference"),
    [
        ("0011", [10, 11], [12, 13]),
        ("0110100", [10, 11, 12, 13], [14]),
        ("0100110", [10, 11, 12, 13], [14, 15]),
        ("11", [], [10, 11]),
    ],
)
def test_last_turn(supervised: str, prompt: list[int], reference: list[int]) -> None:
    """The last supervised stretch is what is asked for; all before it, earlier answers too, is the prompt."""
    ids = torch.arange(10, 10 + len(supervised))
    labels = ids.where(torch.tensor([mark == "1" for mark in supervised]), -100)
    assert last_turn(ids, labels) == (prompt, reference)


def batch_of(prompts: list[str], responses: list[str]) -> Batch:
    """A right-padded batch, as the loaders make it."""
    tokenizer = tiny_tokenizer()
    rows: list[dict[str, Any]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        row = {"input_ids": before + after, "labels": [-100] * len(before) + after}
        rows.append({"example_id": len(rows), **row})
    return dict(collate(rows, tokenizer.pad_token_id))


def alone(prompt: str, eos: int | None) -> Tensor:
    """Greedy continuation of one unpadded prompt by transformers alone."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=0)
    made = tiny_llama().generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return made[0, ids.shape[1] :]


PROMPTS = ["1 + 1?", "What is the sea, and how deep is it in April and May?", "Paris", "think deep"]


def test_answers_equal_those_of_single_prompts() -> None:
    """Batching and left padding change nothing: each answer is what the prompt alone gives."""
    tokenizer = tiny_tokenizer()
    responses = ["2", "deep", "the sea is wide", "so"]
    answers = generate_answers(tiny_llama(), tokenizer, batch_of(PROMPTS, responses), NEW_TOKENS)
    expected = [alone(prompt, tokenizer.eos_token_id) for prompt in PROMPTS]
    texts = [answer.text for answer in answers]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(texts)) == len(texts)
    assert [answer.reference for answer in answers] == responses
    assert [answer.prompt for answer in answers] == [tokenizer.decode(tokenizer(p)["input_ids"]) for p in PROMPTS]


@pytest.mark.parametrize("own", [True, False])
def test_answers_end_where_the_model_or_else_the_tokenizer_says(own: bool) -> None:
    """A model with end tokens of its own uses those, one without them the tokenizer's."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    free = alone(PROMPTS[1], None)
    stop = int(free[3])
    assert stop not in free[:3]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [stop] if own else None
    tokenizer.eos_token = "<eos>" if own else tokenizer.convert_ids_to_tokens(stop)
    [answer] = generate_answers(model, tokenizer, batch_of([PROMPTS[1]], ["x"]), NEW_TOKENS)
    assert answer.text in {tokenizer.decode(free[:4]), tokenizer.decode(free[:3])}


@pytest.mark.parametrize(("most", "is_cut"), [(3, True), (4, False), (5, False)])
def test_an_answer_without_an_end_is_cut(most: int, is_cut: bool) -> None:
    """An answer is cut if the longest one is reached before its end token, and not if that is the last one allowed."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    free = alone(PROMPTS[1], None)
    other = alone(PROMPTS[0], None)
    stop = int(free[3])
    assert stop not in free[:3]
    assert stop not in other[:5]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = stop
    made = generate_answers(model, tokenizer, batch_of([PROMPTS[1], PROMPTS[0]], ["x", "y"]), most)
    assert [answer.is_cut for answer in made] == [is_cut, True]


def test_an_example_without_a_prompt_is_refused() -> None:
    """Plain text has nothing to answer; the message says how to go on."""
    batch = batch_of(["1 + 1?", "2 + 2?"], ["2", "4"])
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(UserError, match=r"Example 0 of data.validation has no prompt.*max_new_tokens to 0"):
        generate_answers(tiny_llama(), tiny_tokenizer(), batch, NEW_TOKENS)
