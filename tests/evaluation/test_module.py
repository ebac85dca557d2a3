from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dualsft.data import InstructionDataModule
from dualsft.errors import UserError
from dualsft.evaluation import EvaluationModule, Generation
from dualsft.models import load_model
from dualsft.trainer import Trainer
from tests.cases import save_tiny_model, sums, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model's folder."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


def validate(module: EvaluationModule, rows: list[dict[str, Any]], tmp_path: Path, **options: Any) -> dict[str, float]:
    """The metrics that Trainer.validate gives."""
    run = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    settings = {"tokenizer": module.model_name_or_path, "batch_tokens": 150, "max_length": 100, **options}
    data = InstructionDataModule(validation=write_jsonl(tmp_path / "validation.jsonl", rows), **settings)
    (metrics,) = run.validate(module, datamodule=data, verbose=False)
    return dict(metrics)


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


def test_exact_match_of_generated_answers(model: str, tmp_path: Path) -> None:
    """Answers are generated, extracted and compared over all batches: here the model answers half the rows rightly."""
    module = EvaluationModule(model, Generation(max_new_tokens=6))
    module.configure_model()
    prompts = [f"{row['prompt']}\n" for row in sums(8)]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
        made = module.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        answers.append(tiny_tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    rows = [
        {"prompt": row["prompt"], "response": answer if number % 2 else "something else"}
        for number, (row, answer) in enumerate(zip(sums(8), answers, strict=True))
    ]
    assert validate(module, rows, tmp_path)["exact_match"] == 0.5
    assert validate(module, rows[1::2], tmp_path)["exact_match"] == 1.0  # nothing is left of the first run


def test_metrics_of_a_second_run_stand_alone(model: str, tmp_path: Path) -> None:
    """Nothing is carried over from one validation to the next."""
    module = EvaluationModule(model)
    validate(module, sums(9), tmp_path)
    assert validate(module, sums(3), tmp_path) == validate(EvaluationModule(model), sums(3), tmp_path)


def test_data_without_responses_are_refused(model: str, tmp_path: Path) -> None:
    """An empty evaluation is an error that says why, not an empty table."""
    rows = [{"prompt": "1 + 1?", "response": ""}, {"prompt": "x" * 200, "response": "2"}]
    with pytest.raises(UserError, match=r"data.validation.*max_length=100 tokens \(0 ok, 1 empty, 1 truncated\)"):
        validate(EvaluationModule(model), rows, tmp_path)
