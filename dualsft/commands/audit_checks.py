"""Whether a selection belongs to the model, the tokenizer and the validation records that an audit measures with."""

from collections.abc import Sequence

from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.data.records import read_records
from dualsft.data.sources import described
from dualsft.errors import UserError
from dualsft.experiments.audit_plan import Side
from dualsft.finetune import MaskedFinetuneModule
from dualsft.finetune.selection_checks import check_base, check_tokenizer
from dualsft.models.loading import model_fingerprint
from dualsft.selection import Selection


def check_belongs(
    selection: Selection, module: MaskedFinetuneModule, data: InstructionDataModule, validation_split: str
) -> None:
    """Refuse what a selection was not made for: its predictions would be compared with gains of something else.

    Args:
        selection: The selection to audit.
        module: The fit's.
        data: The fit's.
        validation_split: The split that is read of its validation sources.

    Raises:
        UserError: if the model, the tokenizer or the validation records are others.
    """
    check_base(selection, module.model_name_or_path, model_fingerprint(module.model_name_or_path))
    check_tokenizer(selection, data.tokenizer)
    of = selection.about.data.validation
    made_for = {"validation": of} if not isinstance(of, dict) else of
    given = [read_records(path, validation_split).fingerprint for path in validation_sources(data.validation).values()]
    if given and sorted(given) != sorted(source.fingerprint for source in made_for.values()):
        raise UserError(
            f"data.validation has other records than those that the selection in {selection.folder} was made for ("
            f"{', '.join(described(source.path) for source in made_for.values())}); give these, and others as "
            "audit.held_out."
        )


def check_scores(selection: Selection, sides: Sequence[Side]) -> None:
    """Refuse to rank the weights of a selection that keeps no scores of them."""
    if selection.about.settings["parameter_scores"] == "none" and {*sides} - {"data"}:
        raise UserError(
            f"{selection.folder} was made with model.parameter_scores none, so its weights cannot be ranked; give "
            "--audit.sides [data], or select again."
        )
