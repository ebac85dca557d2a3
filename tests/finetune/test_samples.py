"""Sample generations during a fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from dualsft.errors import UserError
from dualsft.evaluation.generation import last_turn
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.finetune.samples import Samples
from tests.world.data import write_jsonl
from tests.world.fits import weights
from tests.world.jobs import SaveOften, Workspace, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def logged(
    workspace: Workspace, folder: Path, samples: Samples, resume: Path | None = None, **data: Any
) -> tuple[MaskedFinetuneModule, list[dict[str, Any]]]:
    """The module after a fit with a logger, and what samples.jsonl holds."""
    module = workspace.module(samples=samples)
    run = trainer(folder, logger=CSVLogger(folder), log_every_n_steps=1, callbacks=[SaveOften(folder / "saved")])
    run.fit(module, datamodule=workspace.data(**data), ckpt_path=resume, weights_only=True)
    path = folder / "samples.jsonl"
    return module, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_samples_are_greedy_answers_to_validation_prompts(
    workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start and at each validation, of each example alone what the model generates; one is shown of each set."""
    data = workspace.data()
    module, found = logged(workspace, folder, Samples(2, 6))
    assert [(row["step"], row["epoch"], row["example_id"]) for row in found] == [
        (step, epoch, example) for step, epoch in ((0, 0), (5, 0), (10, 1)) for example in (0, 1)
    ]
    examples, tokenizer = data.validation_sets["validation"], data.tokenizer
    for row in found[-2:]:
        example = examples.dataset[row["example_id"]]
        ids = [torch.tensor(example[column]) for column in ("input_ids", "labels")]
        prompt, reference = last_turn(*ids)
        made = module.model.eval().generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert row["answer"] == tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
        assert (row["prompt"], row["reference"]) == (tokenizer.decode(prompt, True), tokenizer.decode(reference, True))
    assert found[0]["answer"] != found[-2]["answer"]
    shown = [line for line in capsys.readouterr().err.splitlines() if "validation example" in line]
    assert [line.split(",")[0] for line in shown] == ["dualsft: step 0", "dualsft: step 5", "dualsft: step 10"]


def test_samples_leave_the_training_alone(workspace: Workspace, folder: Path) -> None:
    """The weights are, to the bit, those of a run without samples; zero is none."""
    with_samples, _ = logged(workspace, folder / "a", Samples(2, 6))
    without, found = logged(workspace, folder / "b", Samples(0))
    assert found == []
    expected = weights(without)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(with_samples).items())


def test_a_resumed_run_neither_repeats_nor_loses_samples(workspace: Workspace, folder: Path) -> None:
    """Whatever an earlier run wrote after the checkpoint is written anew: the file is that of an unbroken run."""
    _, unbroken = logged(workspace, folder, Samples(1, 6))
    for checkpoint in ("0-2", "0-4", "1-0"):
        _, found = logged(workspace, folder, Samples(1, 6), folder / "saved" / f"{checkpoint}.ckpt")
        assert found == unbroken


def test_samples_by_set(workspace: Workspace, folder: Path) -> None:
    """Each named set has its own; a set of plain text, which asks nothing, has none."""
    text = write_jsonl(folder.parent / "text.jsonl", [{"text": "one and one make two"}])
    pairs = write_jsonl(folder.parent / "pairs.jsonl", [{"prompt": "1 + 1?", "response": "2"}])
    _, found = logged(workspace, folder, Samples(2, 2), validation={"told": text, "asked": pairs})
    assert {row["set"] for row in found} == {"asked"}
    assert len(found) == 3


@pytest.mark.parametrize(("options", "words"), [({"number": -1}, "give 0"), ({"max_new_tokens": 0}, "give at least 1")])
def test_numbers_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    """The key is named, and what it takes."""
    with pytest.raises(UserError, match=rf"model\.samples\.{next(iter(options))} is .*{words}"):
        Samples(**options)
