"""`dualsft validate`: any checkpoint, any data."""

from lightning import LightningModule, Trainer
from torch import Tensor

from dualsft.data import InstructionDataModule, load_tokenizer
from dualsft.errors import UserError
from dualsft.evaluation.generation import Generation, generate_answers
from dualsft.evaluation.metrics import ExactMatch, LanguageModelMetrics
from dualsft.layout import Batch
from dualsft.models import Dtype, load_model


class EvaluationModule(LightningModule):
    """Evaluates a checkpoint on ``data.validation``: loss, perplexity, token accuracy, exact match.

    Args:
        model_name_or_path: The checkpoint: a Hugging Face folder or hub id with safetensors weights.
        generation: How answers are generated and compared.
        dtype: Type that the weights are stored and computed in.
    """

    def __init__(
        self,
        model_name_or_path: str,
        generation: Generation = Generation(),  # noqa: B008 (frozen)
        dtype: Dtype = "auto",
    ) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.generation = generation
        self.dtype_name: Dtype = dtype
        self.metrics = LanguageModelMetrics()
        self.exact_match = ExactMatch()

    def setup(self, stage: str) -> None:
        """Look at the data before anything is loaded.

        Raises:
            UserError: if the validation data hold nothing to evaluate on.
        """
        check_validation_data(self.trainer)

    def configure_model(self) -> None:
        """Load the checkpoint."""
        self.model = load_model(self.model_name_or_path, self.dtype_name)
        self.tokenizer = load_tokenizer(self.model_name_or_path)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take in one batch."""
        logits: Tensor = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        self.metrics.update(logits, batch["labels"])
        if self.generation.max_new_tokens:
            answers, references = generate_answers(self.model, self.tokenizer, batch, self.generation.max_new_tokens)
            extract = self.generation.extract
            self.exact_match.update([extract(a) for a in answers], [extract(r) for r in references])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict(self.metrics.compute())
        self.metrics.reset()
        if self.generation.max_new_tokens:
            self.log("exact_match", self.exact_match.compute())
            self.exact_match.reset()


def check_validation_data(trainer: Trainer) -> None:
    """Lightning passes over an empty validation set without a word, and would report no metrics.

    Raises:
        UserError: if a validation set is given and none of its examples has labels.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, InstructionDataModule) or data.validation is None or data.validation_examples.ok_ids():
        return
    counts = ", ".join(f"{count} {status}" for status, count in data.validation_examples.counts().items())
    raise UserError(
        f"No example of data.validation has a response within data.max_length={data.max_length} tokens ({counts})."
    )
