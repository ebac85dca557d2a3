"""`dualsft validate`: any checkpoint, any data."""

from typing import Any

from lightning import LightningModule, Trainer

from dualsft.data.layout import Batch
from dualsft.data.module import InstructionDataModule
from dualsft.data.tokenizer import load_tokenizer
from dualsft.evaluation.generation import Generation, check_room, generate_answers
from dualsft.evaluation.metrics import ValidationMetrics, check_validation_data, validation_names
from dualsft.evaluation.predictions import Prediction, judged
from dualsft.evaluation.tasks import TaskOptions, evaluate_tasks
from dualsft.models.inspection import check_examples
from dualsft.models.loading import Dtype
from dualsft.objectives.inputs import settle_mask
from dualsft.runs.model_dtype import settle_dtype
from dualsft.sharding.groups import rank_slice
from dualsft.sharding.local_batch import rows_to_read
from dualsft.sharding.strategy import load_for


class EvaluationModule(LightningModule):
    """Evaluates a checkpoint on ``data.validation``: loss, perplexity, token accuracy, exact match.

    Of several validation sets it reports each (``loss/NAME``) and the mean over the sets (``loss``).

    Args:
        model_name_or_path: The checkpoint: a Hugging Face folder or hub id with safetensors weights.
        generation: How answers are generated and compared.
        dtype: Type that the weights are stored and computed in.
        example_loss: Also measure the mean over the examples of each one's mean loss, which selections lower.

    Attributes:
        predictions: The answers of the last evaluation; none where none are generated.
    """

    def __init__(
        self,
        model_name_or_path: str,
        generation: Generation = Generation(),  # noqa: B008 (frozen)
        dtype: Dtype = "auto",
        example_loss: bool = False,
    ) -> None:
        super().__init__()
        self.model_name_or_path, self.generation, self.example_loss = model_name_or_path, generation, example_loss
        self.dtype_name: Dtype = dtype
        self.predictions: list[Prediction] = []

    def setup(self, stage: str) -> None:
        """Check the data before anything is loaded."""
        check_validation_data(self.trainer)
        exact_match = self.generation.max_new_tokens > 0
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, InstructionDataModule):
            data.part = None if exact_match else rows_to_read()  # answers are generated for whole batches
        self._names = validation_names(self.trainer)
        self.metrics = ValidationMetrics(self._names, exact_match, self.example_loss)
        self.predictions = []

    def configure_model(self) -> None:
        """Load the checkpoint, in shards if the trainer says so."""
        self.dtype_name = settle_dtype(self, self.model_name_or_path, self.dtype_name)
        self.model = load_for(self, self.model_name_or_path, self.dtype_name)
        self.tokenizer = load_tokenizer(self.model_name_or_path)

    def on_validation_start(self) -> None:
        """Look at checkpoint and data before the first batch.

        Raises:
            UserError: if the checkpoint has no embedding for an id or a position.
        """
        settle_mask(self.model)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, InstructionDataModule):
            return
        for key, examples in data.encoded.items():
            check_examples(self.model, key, examples.largest_id, examples.longest())
            if self.generation.max_new_tokens:
                check_room(self.model, key, examples, self.generation.max_new_tokens)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of the validation set of this index with one batch."""
        self.metrics.tokens(dataloader_idx).measure(self.model, batch)
        if self.generation.max_new_tokens:
            answers = generate_answers(self.model, self.tokenizer, batch, self.generation.max_new_tokens)
            name, ids = self._names[dataloader_idx], batch["example_id"].tolist()
            made = [judged(name, i, answer, self.generation) for i, answer in zip(ids, answers, strict=True)]
            self.predictions += made
            own = made[rank_slice()]  # every rank has all answers, and counts are summed
            self.metrics.answers(dataloader_idx).update(
                [one.answer for one in own], [one.reference_answer for one in own]
            )

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, under names without a loader's number, which Lightning adds in a step."""
        self.log_dict(self.metrics.finish(), sync_dist=True)  # the same on every rank already

    def evaluate_tasks(
        self, trainer: Trainer, tasks: dict[str, Any], options: TaskOptions, batch_size: int, seed: int
    ) -> dict[str, Any]:
        """Evaluate the checkpoint, which `configure_model` has loaded, on tasks; see `evaluate_tasks`."""
        return evaluate_tasks(trainer, tasks, self.model, self.tokenizer, options, batch_size, seed)
