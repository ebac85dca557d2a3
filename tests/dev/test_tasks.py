"""The generator of general tasks, the shipped data and the shipped base model."""

import csv
import hashlib
import json
import re
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dev.quickstart import make_data, pretrain, tasks

ASSETS = Path(pretrain.__file__).parents[2] / "dualsft" / "quickstart" / "assets"
FILES = ("gsm8k_pretrain", "pool", "validation", "test_target", "test_general")


def shipped(name: str) -> list[dict[str, str]]:
    """Read a shipped data file."""
    return make_data.read_jsonl(ASSETS / "data" / f"{name}.jsonl")


def examples(name: str, count: int = 200) -> list[tuple[str, str]]:
    """Draw prompts and answers of one task, from all splits."""
    rng = Random(7)
    return [tasks.TASKS[name](rng) for _ in range(count)]


# the generator


def test_same_seed_same_rows() -> None:
    """The generator depends on its seed alone."""
    first = list(islice(tasks.stream("pretrain", 3), 500))
    assert first == list(islice(tasks.stream("pretrain", 3), 500))
    assert first != list(islice(tasks.stream("pretrain", 4), 500))


def test_known_rows_do_not_drift() -> None:
    """The weights were trained on these rows: a changed word list makes them unreproducible."""
    text = json.dumps(list(islice(tasks.stream("pretrain", 0), 2000)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "96009c9a75f77609690e703a61be3ea12ad7de7fd63ecc757f54e8998fe5ec1a"


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_are_unique_and_short(name: str) -> None:
    """A prompt never has two answers, and rows stay short and clean."""
    answers: dict[str, str] = {}
    for prompt, answer in examples(name, 2000):
        assert answers.setdefault(prompt, answer) == answer
        assert 0 < len(answer) <= 60
        assert len(prompt) <= 160
        assert answer == answer.strip()
        assert prompt == prompt.strip()
        assert "{" not in prompt + answer
    assert len(answers) >= 30  # varied
    assert len(set(answers.values())) > 1


def test_splits_are_disjoint_and_cover_every_task() -> None:
    """No prompt is in two splits."""
    prompts = {}
    for split in tasks.SPLITS:
        rows = list(islice(tasks.stream(split, 0), 3000))
        assert {row["task"] for row in rows} == set(tasks.TASKS)
        assert {tasks.split_of(row["prompt"]) for row in rows} == {split}
        prompts[split] = {row["prompt"] for row in rows}
    assert not prompts["pretrain"] & prompts["pool"]
    assert not prompts["pretrain"] & prompts["test"]
    assert not prompts["pool"] & prompts["test"]
    with pytest.raises(ValueError, match="unknown split"):
        next(tasks.stream("train", 0))


def test_generate_never_repeats_a_prompt() -> None:
    """Shipped rows are distinct."""
    rows = tasks.generate("pool", 1500, seed=5)
    assert len({row["prompt"] for row in rows}) == len(rows) == 1500


def test_word_lists_are_unambiguous() -> None:
    """No word has two categories, two opposites or two sentiments."""
    listed = [word for words in tasks.CATEGORIES.values() for word in words]
    assert len(listed) == len(set(listed))
    both = [*tasks.OPPOSITES, *tasks.OPPOSITES.values()]
    assert len(both) == len(set(both))
    assert not set(tasks.GOOD) & set(tasks.BAD)


# answers found again by other means, from the prompt alone


def test_sorted_lists() -> None:
    """Sorted answers hold what was given, in the order asked for."""
    for prompt, answer in examples("sort_numbers"):
        given = [int(n) for n in re.findall(r"\d+", prompt)]
        got = [int(n) for n in answer.split(", ")]
        assert Counter(given) == Counter(got)
        downwards = "largest to" in prompt or "descending" in prompt
        assert all((a > b) == downwards for a, b in pairwise(got))
    for prompt, answer in examples("sort_words"):
        words = answer.split(", ")
        assert all(a < b for a, b in pairwise(words))
        assert all(re.search(rf"\b{word}\b", prompt) for word in words)
        assert len(words) == prompt.count(",") + 1


def test_letters() -> None:
    """Letter tasks, counted by other means."""
    for prompt, answer in examples("count_letter"):
        short, long = sorted(re.findall(r'"(\w+)"', prompt), key=len)
        assert int(answer) == sum(1 for letter in long if letter == short) >= 1
    for prompt, answer in examples("reverse_word"):
        word = answer.replace("-", "")[::-1]
        assert word in re.findall(r"\w+", prompt)
        assert word in tasks.WORDS
    for prompt, answer in examples("spell"):
        assert answer.replace("-", "") in re.findall(r"\w+", prompt)
    for prompt, answer in examples("has_letter"):
        short, long = sorted(re.findall(r'"(\w+)"', prompt), key=len)
        assert answer == ("yes" if long.find(short) >= 0 else "no")


def test_numbers() -> None:
    """Conversions by way of seconds, and comparisons."""
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
    checked = 0
    for prompt, answer in examples("convert_units", 500):
        units = [unit for unit in re.findall(r"[a-z]+", prompt) if unit in seconds]
        if len(units) == 2:
            amount, unit = answer.split()
            other = next(name for name in units if name != unit)
            (number,) = re.findall(r"\d+", prompt)
            assert int(number) * seconds[other] == int(amount) * seconds[unit]
            checked += 1
    assert checked > 50
    for prompt, answer in examples("compare_numbers"):
        a, b = map(int, re.findall(r"\d+", prompt))
        assert int(answer) == (max(a, b) if "larger" in prompt else min(a, b))


def test_sentences() -> None:
    """Answers stand in the sentence and fit the question."""
    for prompt, answer in examples("extract"):
        assert answer.lower() in prompt.lower()
        assert (answer in tasks.NAMES) == ("Who" in prompt)
        assert answer.startswith("at the") == ("Where" in prompt)
        assert answer.startswith("on ") == ("When" in prompt)
    for prompt, answer in examples("sentiment"):
        words = set(re.findall(r"\w+", prompt))
        assert bool(words & set(tasks.GOOD)) == (answer == "positive")
        assert bool(words & set(tasks.BAD)) == (answer == "negative")
    for prompt, answer in examples("odd_one_out"):
        counts = Counter(tasks.CATEGORY_OF[w] for w in re.findall(r"\w+", prompt.lower()) if w in tasks.CATEGORY_OF)
        assert counts[tasks.CATEGORY_OF[answer]] == 1
        assert sorted(counts.values()) == [1, 3]


# the shipped data


def test_shipped_counts_and_fields() -> None:
    """The files hold the promised rows and stay small."""
    counts = {name: Counter(row["source"] for row in shipped(name)) for name in FILES}
    assert counts["gsm8k_pretrain"] == {"target": 600}
    assert counts["pool"] == {"target": 128, "shuffled": 128, "general": 1024}
    assert counts["validation"] == {"target": 64}
    assert counts["test_target"] == {"target": 192}
    assert counts["test_general"] == {"general": 256}
    for name in FILES:
        for row in shipped(name):
            assert row.keys() == {"source", "prompt", "response"} | ({"task"} if row["source"] == "general" else set())
    assert sum(path.stat().st_size for path in (ASSETS / "data").iterdir()) < 2_000_000


def test_shipped_files_are_disjoint() -> None:
    """No prompt stands in two files."""
    prompts = [row["prompt"] for name in FILES for row in shipped(name)]
    assert len(prompts) == len(set(prompts))
    splits = {name: {tasks.split_of(r["prompt"]) for r in shipped(name) if r["source"] == "general"} for name in FILES}
    assert splits["pool"] == {"pool"}
    assert splits["test_general"] == {"test"}


def test_shuffled_answers_keep_their_words_only() -> None:
    """Shuffling permutes words and nothing else."""
    sources = {source: [r for r in shipped("pool") if r["source"] == source] for source in ("target", "shuffled")}
    assert all(re.search(r"\n#### \S+$", row["response"]) for row in sources["target"])
    assert sum(bool(re.search(r"\n#### \S+$", row["response"])) for row in sources["shuffled"]) <= 5
    text = "a b  c\nd e f"
    mixed = make_data.shuffle_words(text, Random(0))
    assert mixed != text
    assert sorted(mixed.split()) == sorted(text.split())
    assert re.findall(r"\s+", mixed) == re.findall(r"\s+", text)


def test_data_files_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    """Without GSM8K's own files, the script reproduces what is shipped."""
    make_data.main(["--output_dir", str(tmp_path)])
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (ASSETS / "data" / f"{name}.jsonl").read_bytes()


def test_excerpts_are_drawn_from_a_folder(tmp_path: Path) -> None:
    """With GSM8K's own files, the parts are disjoint and deterministic."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i} + 1.\n#### {i + 1}"} for i in range(2000)]
    make_data.write_jsonl(tmp_path / "train.jsonl", rows)
    make_data.write_jsonl(tmp_path / "test.jsonl", [{**row, "question": "Say: " + row["question"]} for row in rows])
    parts = make_data.draw_parts(tmp_path)
    prompts = [row["prompt"] for part in parts.values() for row in part]
    assert len(prompts) == len(set(prompts)) == 600 + 128 + 128 + 64 + 192
    assert parts == make_data.draw_parts(tmp_path)
    with pytest.raises(FileNotFoundError, match="gsm8k_train"):
        make_data.draw_parts(tmp_path / "nowhere")


# the shipped model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Load the shipped tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "model")


def test_tokenizer_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompt and response encoded apart equal the whole text encoded at once; any text survives."""
    row = {"prompt": 'How long is "cat"?', "response": "3"}
    example = pretrain.encode(row, tokenizer)
    whole = tokenizer(f"{row['prompt']}\n{row['response']}{tokenizer.eos_token}")["input_ids"]
    assert example.ids == whole
    assert whole[0] == tokenizer.bos_token_id
    assert whole.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(whole[example.prompt_length :]) == f"3{tokenizer.eos_token}"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    text = "Émile paid 1234€ — 好 <<5*3=15>>15\n\n  end"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template gives what pre-training saw, and marks the answers."""
    row = {"prompt": "Spell the word cat.", "response": "c-a-t"}
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    out: Any = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    example = pretrain.encode(row, tokenizer, chat=True)
    assert out["input_ids"] == example.ids
    assert out["assistant_masks"].index(1) == example.prompt_length
    assert sum(out["assistant_masks"]) == len(example.ids) - example.prompt_length
    opening: Any = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)
    assert opening["input_ids"] == example.ids[: example.prompt_length]


def test_model_has_the_recorded_losses(tokenizer: PreTrainedTokenizerFast) -> None:
    """The shipped weights are those of the shipped record."""
    record = json.loads((ASSETS / "pretrain.json").read_text())
    model = LlamaForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == record["parameters"] < 4_000_000
    assert model.config.tie_word_embeddings
    assert (ASSETS / "model" / "model.safetensors").stat().st_size <= 8_000_000
    for name, rows in (("general", "test_general"), ("gsm8k", "test_target")):
        loss = pretrain.response_loss(model, tokenizer, shipped(rows)[: record["check"]["rows"]])
        assert loss == pytest.approx(record["check"][name], abs=2e-3)
    with (ASSETS / "pretrain_log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["step"]) == record["settings"]["steps"]
    assert float(last["held_out_general_loss"]) == pytest.approx(record["held_out_loss"]["general"], abs=5e-3)
    assert float(last["held_out_gsm8k_loss"]) == pytest.approx(record["held_out_loss"]["gsm8k"], abs=5e-3)


def test_response_loss_is_that_of_the_library(tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss on packed batches equals the library's, row by row."""
    model = LlamaForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
    rows = shipped("test_general")[:3]
    total, count = 0.0, 0
    for row in rows:
        example = pretrain.encode(row, tokenizer)
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.prompt_length] = -100
        tokens = len(example.ids) - example.prompt_length
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * tokens, count + tokens
    assert pretrain.response_loss(model, tokenizer, rows) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_pretraining_runs_and_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A miniature run writes everything, the same twice, with the shipped tokenizer."""
    monkeypatch.setattr(pretrain, "held_out_rows", lambda: {"general": shipped("test_general")[:20]})
    options = "--steps 2 --warmup_steps 1 --hidden_size 32 --intermediate_size 32 --layers 1 --heads 2"
    pretrain.main(["--output_dir", str(tmp_path), *options.split()])
    record = json.loads((tmp_path / "pretrain.json").read_text())
    assert record["command"].startswith("python -m dev.quickstart.pretrain --output_dir DIR --steps 2")
    assert not [p for p in tmp_path.rglob("*.json*") if str(tmp_path) in p.read_text()]
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (ASSETS / "model" / "tokenizer.json").read_bytes()
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    torch.manual_seed(0)
    args = pretrain.parse_args(["--output_dir", str(again), *options.split()])
    pretrain.train(args, PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"))
    assert (again / "model" / "model.safetensors").read_bytes() == weights
