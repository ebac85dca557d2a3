"""Sample generations: the model's answers to a few validation prompts, at each validation of a fit."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dualsft.data.batches import collate
from dualsft.data.layout import to_device
from dualsft.data.module import InstructionDataModule
from dualsft.data.tokenizer import pad_id
from dualsft.errors import UserError
from dualsft.evaluation.generation import generate_answers, last_turn
from dualsft.models import PreTrainedModel
from dualsft.models.inspection import learned_positions
from dualsft.runs.progress import say
from dualsft.sharding.groups import rank
from dualsft.storage.json_lines import json_lines
from dualsft.storage.writing import write_atomically

_SHOWN = 60
FILE = "samples.jsonl"

Sample = dict[str, Any]
"""``step``, ``epoch``, ``set`` (the validation set's name), ``example_id``, ``prompt``, ``answer``, ``reference``."""


@dataclass(frozen=True)
class Samples:
    """Which generations are logged.

    Args:
        number: How many of the first prompts of each validation set to answer, greedily, before training and at each
            validation of a fit that has a logger; they go to samples.jsonl in trainer.default_root_dir; 0 for none.
        max_new_tokens: Longest answer.
    """

    number: int = 3
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"model.samples.number is {self.number}; give 0 (off) or more.")
        if self.max_new_tokens < 1:
            raise UserError(f"model.samples.max_new_tokens is {self.max_new_tokens}; give at least 1.")


class LogSamples(Callback):
    """Answers a few prompts at each validation, writes the answers to a file and shows one of each set.

    The file has one JSON object a line, in order of steps. A resumed run that repeats a step replaces the samples from
    that step on, so that the file ends as in an unbroken run.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Answer before the first batch, when the model is sure to hold the weights that are validated."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        fitting = trainer.state.fn == TrainerFn.FITTING and trainer.logger is not None
        resumed = trainer.sanity_checking and trainer.global_step > 0  # no validation of that step
        if batch_idx or dataloader_idx or not fitting or resumed or not isinstance(data, InstructionDataModule):
            return
        position = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        of_set = partial(self._answer, pl_module.model, pl_module.device, data)
        samples = [position | sample for name in data.validation_sets for sample in of_set(name)]
        if rank() == 0:
            _write(Path(trainer.default_root_dir) / FILE, samples)

    def _answer(self, model: Any, device: torch.device, data: InstructionDataModule, name: str) -> Iterator[Sample]:
        """The samples of one validation set."""
        assert isinstance(model, PreTrainedModel)
        examples, tokenizer = data.validation_sets[name], data.tokenizer
        rows = [examples.dataset[i] for i in examples.ok_ids()[: self._samples.number]]
        turns = [last_turn(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
        prompts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt, _ in turns]
        with_prompt = [k for k, prompt in enumerate(prompts) if prompt.strip()]  # plain text has none
        if not with_prompt:
            return
        batch = to_device(collate([rows[k] for k in with_prompt], pad_id(tokenizer)), device)
        room = (learned_positions(model) or sys.maxsize) - max(len(turns[k][0]) for k in with_prompt)
        if room < 1:
            return
        longest = min(self._samples.max_new_tokens, room)
        for k, answer in zip(with_prompt, generate_answers(model, tokenizer, batch, longest), strict=True):
            example = {"set": name, "example_id": rows[k]["example_id"], "prompt": prompts[k]}
            yield {**example, "answer": answer.text, "reference": answer.reference}


def _write(path: Path, samples: list[Sample]) -> None:
    if not samples:
        return
    step = samples[0]["step"]
    lines = json_lines(path)
    earlier = [line for line in lines if _step_of(line) < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*earlier, *(json.dumps(sample, ensure_ascii=False) for sample in samples)]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    for _, of_set in groupby(samples, key=lambda sample: sample["set"]):
        sample = next(of_set)
        prompt, answer, reference = (_cut(sample[key]) for key in ("prompt", "answer", "reference"))
        where = f"step {sample['step']:,}, {sample['set']} example {sample['example_id']}"
        say(f"{where}: {prompt!r} -> {answer!r} (reference: {reference!r})")


def _step_of(line: str) -> float:
    """The step of a stored sample; infinite if the line is not as it was written, so that it is dropped."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _SHOWN else f"{plain[: _SHOWN - 3]}..."
