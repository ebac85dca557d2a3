from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.evaluation import EvaluationModule, Generation
from dualsft.models.loading import load_model
from tests.world.data import sums, write_jsonl
from tests.world.jobs import trainer
from tests.world.models import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model's folder."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


Rows = list[dict[str, Any]]


def validate(
    module: EvaluationModule, rows: Rows | dict[str, Rows], tmp_path: Path, **options: Any
) -> dict[str, float]:
    """The metrics that Trainer.validate gives; of several sets, if they have names."""
    settings = {"tokenizer": module.model_name_or_path, "batch_tokens": 150, "max_length": 100, **options}
    validation = (
        {name: write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in rows.items()}
        if isinstance(rows, dict)
        else write_jsonl(tmp_path / "validation.jsonl", rows)
    )
    data = InstructionDataModule(validation=validation, **settings)
    metrics = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert all(of_loader == metrics[0] for of_loader in metrics)
    return dict(metrics[0])


@pytest.mark.parametrize("batch_tokens", [100, 1000])
def test_loss_equals_a_direct_computation(model: str, tmp_path: Path, batch_tokens: int) -> None:
    """Trainer.validate gives the mean over all response tokens, one example at a time or in padded batches."""
    rows = sums(9)
    found = validate(EvaluationModule(model), rows, tmp_path, batch_tokens=batch_tokens)
    tokenizer, net = tiny_tokenizer(), load_model(model)
    total, hits, count = 0.0, 0, 0
    for row in rows:
        prompt = tokenizer(f"{row['prompt']}\n")["input_ids"]
        answer = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = net(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        hits += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        count += len(answer)
    assert found.keys() == {"loss", "perplexity", "token_accuracy"}
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits / count)


def half_right(model: str, count: int) -> Rows:
    """Rows whose responses are what the model generates in six tokens, but for every other one."""
    net, rows = load_model(model), sums(count)
    for number, row in enumerate(rows):
        ids = torch.tensor([tiny_tokenizer()(f"{row['prompt']}\n")["input_ids"]])
        made = net.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        answer = tiny_tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert isinstance(answer, str)
        row["response"] = answer if number % 2 else "something else"
    return rows


def test_exact_match_of_generated_answers(model: str, tmp_path: Path) -> None:
    """Answers are generated, extracted and compared over all batches: here the model answers half the rows rightly."""
    module, rows = EvaluationModule(model, Generation(max_new_tokens=6)), half_right(model, 8)
    assert validate(module, rows, tmp_path)["exact_match"] == 0.5
    assert validate(module, rows[1::2], tmp_path)["exact_match"] == 1.0  # nothing is left of the first run


def test_predictions_are_kept(model: str, tmp_path: Path) -> None:
    """Every example's prompt, answer and reference are kept as they were judged, those of the last run alone."""
    module, rows = EvaluationModule(model, Generation(max_new_tokens=6)), half_right(model, 8)
    validate(module, {"a": rows[:5], "b": rows}, tmp_path)
    assert validate(module, rows, tmp_path)["exact_match"] == 0.5
    made = sorted(module.predictions, key=lambda one: one.example_id)
    assert [(one.set, one.example_id, one.correct) for one in made] == [(None, k, bool(k % 2)) for k in range(8)]
    assert all(row["prompt"] in one.prompt for one, row in zip(made, rows, strict=True))
    assert [one.reference.strip() for one in made] == [row["response"].strip() for row in rows]


def test_metrics_of_a_second_run_stand_alone(model: str, tmp_path: Path) -> None:
    """Nothing is carried over from one validation to the next."""
    module = EvaluationModule(model)
    validate(module, sums(9), tmp_path)
    assert validate(module, sums(3), tmp_path) == validate(EvaluationModule(model), sums(3), tmp_path)


def test_metrics_by_set(model: str, tmp_path: Path) -> None:
    """Named sets are each reported as if alone, and beside them their mean, in which each set weighs the same."""
    rows, generation = half_right(model, 12), Generation(max_new_tokens=6)
    sets = {"zeta": rows[:7], "b-2": rows[7::2], "alpha": rows[10:11]}
    found = validate(EvaluationModule(model, generation), sets, tmp_path)
    alone = {name: validate(EvaluationModule(model, generation), part, tmp_path) for name, part in sets.items()}
    metrics = ("loss", "perplexity", "token_accuracy", "exact_match")
    assert list(found) == [f"{metric}{suffix}" for metric in metrics for suffix in ("", "/zeta", "/b-2", "/alpha")]
    for metric in metrics:
        assert [found[f"{metric}/{name}"] for name in sets] == [alone[name][metric] for name in sets]
        assert found[metric] == pytest.approx(sum(part[metric] for part in alone.values()) / 3, rel=1e-6)
    assert [found[f"exact_match/{name}"] for name in sets] == [pytest.approx(3 / 7), 1, 0]


def test_a_single_named_set(model: str, tmp_path: Path) -> None:
    """One set in a mapping is reported under its name too."""
    found, alone = (validate(EvaluationModule(model), rows, tmp_path) for rows in ({"a": sums(3)}, sums(3)))
    assert found == {**alone, **{f"{metric}/a": value for metric, value in alone.items()}}


def test_sets_of_a_second_run_stand_alone(model: str, tmp_path: Path) -> None:
    """A module evaluates other sets afterwards, with nothing left of the first ones."""
    module = EvaluationModule(model)
    validate(module, {"a": sums(9), "b": sums(2)}, tmp_path)
    for rows in (sums(3), {"b": sums(3), "c": sums(4), "d": sums(5)}):
        assert validate(module, rows, tmp_path) == validate(EvaluationModule(model), rows, tmp_path)


def test_data_without_responses_are_refused(model: str, tmp_path: Path) -> None:
    """An empty evaluation is an error that says why and of which set, not an empty table."""
    rows = [{"prompt": "1 + 1?", "response": ""}, {"prompt": "x" * 200, "response": "2"}]
    sets = {"sound": sums(2), "blank": rows}
    for given, key in ((rows, "data.validation"), (sets, r"data\.validation\.blank")):
        counts = r"\(0 ok, 1 empty, 1 truncated\)"
        with pytest.raises(UserError, match=rf"No example of {key} has .*max_length=100 tokens {counts}"):
            validate(EvaluationModule(model), given, tmp_path)
