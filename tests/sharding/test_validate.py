"""Validation on ranks, each with shards of the weights, gives what one process finds."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, distributed

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Layout, keep_examples, split_rows
from dualsft.evaluation import EvaluationModule, Generation
from dualsft.evaluation.generation import generate_answers
from dualsft.finetune.samples import FILE, Samples
from dualsft.sharding.local_batch import local_rows, rows_to_read
from dualsft.sharding.strategy import DDP, FSDP2
from tests.cases import make_examples, pack
from tests.world.data import random_batch, write_jsonl
from tests.world.fits import Case, fitted
from tests.world.jobs import Workspace, make_workspace, trainer
from tests.world.models import VOCABULARY
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A base model, which ends an answer at every fourth token on average, and validation data."""
    made = make_workspace(tmp_path_factory.mktemp("workspace"))
    settings = json.dumps({"eos_token_id": list(range(0, VOCABULARY, 4))})
    (Path(made.model) / "generation_config.json").write_text(settings)
    return made


def validated(
    workspace: Workspace, folder: Path, sets: dict[str, str], strategy: Callable[..., Strategy] = FSDP2, **options: Any
) -> dict[str, float]:
    """The metrics of the base model on named sets, on all ranks that there are; first without answers."""
    found: dict[str, float] = {}
    data = workspace.data(train=None, selection=None, validation=sets)
    for words in (0, 6):
        if distributed.is_initialized():
            options |= {"strategy": strategy(), "devices": distributed.get_world_size()}
        module = EvaluationModule(workspace.model, Generation(words))
        run = trainer(folder, **options)
        run.validate(module, datamodule=data, verbose=False)
        found |= {f"{name}, {words} words": float(value) for name, value in run.callback_metrics.items()}
    return found


def sets_of(workspace: Workspace, folder: Path) -> dict[str, str]:
    """The validation set, and another whose answers are those that the model gives, but for one of five."""
    rows = [{"prompt": f"{k} + {k}? " + "and " * k} for k in range(5)]
    given = [{**row, "response": "?"} for row in rows]
    source = write_jsonl(folder / "asked.jsonl", given)
    data = workspace.data(train=None, selection=None, validation=source)
    module = EvaluationModule(workspace.model)
    module.configure_model()
    right = []
    for batch in data.validation_loader():
        answers = generate_answers(module.model, data.tokenizer, batch, 6)
        right += [{**rows[k], "response": a.text} for k, a in zip(batch["example_id"].tolist(), answers, strict=True)]
    assert len({len(row["response"]) for row in right}) > 2
    right[0]["response"] = "another"
    return {"sums": workspace.validation, "right": write_jsonl(folder / "right.jsonl", right)}


@pytest.mark.parametrize(("count", "strategy"), [(1, FSDP2), (4, FSDP2), (2, DDP)])
def test_metrics_are_those_of_one_process(
    workspace: Workspace, tmp_path: Path, count: int, strategy: Callable[..., Strategy]
) -> None:
    """Of each set and their mean, with batches of fewer rows than ranks, and generated answers."""
    sets = sets_of(workspace, tmp_path)
    expected = validated(workspace, tmp_path, sets)
    assert 0 < expected["exact_match/right, 6 words"] < 1
    for found in run_on_ranks(count, validated, workspace, tmp_path, sets, strategy):
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5)


def test_samples_are_those_of_one_process(workspace: Workspace, tmp_path: Path) -> None:
    """A fit on ranks logs the answers of one process, once."""
    texts = []
    for count in (None, 2):
        folder = tmp_path / str(count)
        case = Case(module={"samples": Samples(3, 8)}, trainer={"logger": CSVLogger(folder), "log_every_n_steps": 1})
        if count is None:
            fitted(workspace, folder, case)
        else:
            run_on_ranks(count, fitted, workspace, folder, case)
        texts.append((folder / FILE).read_text())
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 9  # before training, and after each of two epochs


def dealt(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """This rank's rows of each batch."""
    return [local_rows(batch) for batch in batches]


def supervised(batch: dict[str, Tensor]) -> dict[int, tuple[list[int], list[int]]]:
    """Tokens and labels of each example that has any label."""
    found = {}
    for example_id, (row, first, length) in zip(batch["example_id"].tolist(), Layout.of(batch).spans, strict=True):
        ids, labels = (batch[name][row, first : first + length].tolist() for name in ("input_ids", "labels"))
        if any(label != -100 for label in labels):
            found[example_id] = (ids, labels)
    return found


def test_rows_are_dealt_out_once() -> None:
    """Each example is one rank's, whole; padding that a rank's rows do not need is gone; some rank stands in."""
    packed = pack([[0, 3], [1], [2, 4]], make_examples())
    emptied = keep_examples(packed, torch.tensor([i != 1 for i in packed["example_id"].tolist()]))
    batches = [random_batch(5, 9), random_batch(2, 6), packed, split_rows(packed, 3)[0], emptied]
    answers = run_on_ranks(3, dealt, batches)
    for k, batch in enumerate(batches):
        parts = [answer[k] for answer in answers]
        found = [supervised(part) for part in parts]
        assert sum(map(len, found)) == len(supervised(batch))
        assert {i: example for part in found for i, example in part.items()} == supervised(batch)
        assert all(part.keys() == batch.keys() for part in parts)
        for part in parts:
            longest = max((first + length for _, first, length in Layout.of(part).spans), default=1)
            assert part["input_ids"].shape[1] == longest
    assert supervised(answers[2][1]) == {}
    assert len(answers[2][1]["input_ids"]) == 1


def read_apart(workspace: Workspace, **options: Any) -> list[tuple[dict[str, Tensor], dict[str, Tensor], bool]]:
    """Of each training batch this rank's rows as they are read alone, and cut out; whether the same is known of it."""
    data = workspace.data(selection=None, **options)
    ids = data.training_ids()
    parts, batches = data.training_loader(ids, 1, part=rows_to_read()), data.training_loader(ids, 1)
    return [
        (dict(part), local_rows(batch), extent_of(part) == extent_of(batch))
        for part, batch in zip(parts, batches, strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"batch_size": 2}], ids=["padded", "packed", "few rows"])
def test_rows_that_are_read_alone_are_those_of_the_batch(workspace: Workspace, options: dict[str, Any]) -> None:
    """To the bit, in the same order, and with its counts; a rank without a row stands in with the same one."""
    for answer in run_on_ranks(3, partial(read_apart, **options), workspace):
        assert len(answer) > 3
        for part, expected, same_extent in answer:
            assert same_extent
            assert part.keys() == expected.keys()
            assert all(part[name].equal(expected[name]) for name in part)
