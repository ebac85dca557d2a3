"""What is checked of a selection's input once model and data are loaded, before anything is written."""

import torch

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.matrix.curvature import check_differences
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.spot_check import check_packing
from dualsft.models import PreTrainedModel
from dualsft.models.loading import check_vocabulary
from dualsft.selection.scoring_checkpoint import second_moment_file
from dualsft.selection.settings import SelectionSettings


def check_input(model: PreTrainedModel, settings: SelectionSettings, data: InstructionDataModule) -> None:
    """Refuse input that cannot be scored.

    Raises:
        UserError: if there is no example to score or to validate on, the scorer's statistics cannot be computed, the
            gradients would be float16, or the model mixes packed examples.
    """
    sets = {f"validation.{n}" if data.named_validation else n: of for n, of in data.validation_sets.items()}
    for name, examples in {"train": data.train_examples, **sets}.items():
        if not examples.ok_ids():
            counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
            raise UserError(f"No example of data.{name} has a response to score by ({counts}).")
        check_vocabulary(model, examples.largest_id())
    if settings.warmup.checkpoint is not None and settings.needs_second_moment:
        second_moment_file(settings.warmup.checkpoint)
    if "hessian_vector_difference" in settings.scorer.needs:
        check_differences(model)
    if compute_dtype(model) == torch.float16:
        raise UserError(
            "Scores underflow in float16; set model.dtype to float32 or bfloat16, and trainer.precision to 32-true "
            "or bf16-mixed."
        )
    if data.packing:
        few = data.pool_loader(batch_tokens=min(data.max_length, data.batch_tokens))
        check_packing(model, next(iter(few)), compute_dtype(model))
