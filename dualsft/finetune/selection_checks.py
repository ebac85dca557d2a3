"""Whether a selection belongs to the base model and the tokenizer of a fit, and its mask is as it was written."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from dualsft.data.module import InstructionDataModule
from dualsft.data.options import TRAIN, FormatOptions
from dualsft.data.sources import Given, sources_of
from dualsft.errors import UserError, clipped
from dualsft.models import PreTrainedModel
from dualsft.models.configuration import changed_settings, stored_configuration
from dualsft.models.loading import model_folder, special_tokens, tokenizer_fingerprint
from dualsft.runs.progress import say
from dualsft.selection import Selection
from dualsft.selection.artifact import MASK
from dualsft.selection.mask import refusing_damage
from dualsft.sharding.collectives import on_rank_zero
from dualsft.training.compact import CompactParameters


def check_base(selection: Selection, name_or_path: str, fingerprint: str) -> None:
    """Refuse a base model of other weights, or of other settings in its ``config.json``; every rank calls this."""
    made_for = selection.about.model
    if made_for.fingerprint != fingerprint:
        raise UserError(
            f"The selection in {selection.folder} was made for another model ({made_for.name_or_path}, weights "
            f"{made_for.fingerprint[:12]}) than {name_or_path} ({fingerprint[:12]}); give that model, or select again."
        )
    now = on_rank_zero(lambda: stored_configuration(model_folder(name_or_path)))
    before = selection.about.configuration
    if before is not None and (changed := changed_settings(before, now)):
        raise UserError(
            f"The selection in {selection.folder} was made with other settings in the config.json of {name_or_path} "
            f"({', '.join(changed[:5])}); restore them, or select again."
        )


def check_tokenizer(selection: Selection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse another tokenizer, chat template, or special tokens other than those that were written into the texts."""
    before, now = selection.about.tokenizer.get("fingerprint"), tokenizer_fingerprint(tokenizer)
    if before != now:
        raise UserError(
            f"The selection in {selection.folder} was made with another tokenizer or chat template "
            f"({str(before)[:12]}) than {tokenizer.name_or_path} ({now[:12]}); give that one, or select again."
        )
    then, current = selection.about.special_tokens, special_tokens(tokenizer)
    if then is not None and (changed := sorted(name for name, _ in then.items() ^ current.items())):
        raise UserError(
            f"The selection in {selection.folder} was made with another {changed[0]} ({then.get(changed[0])}) than "
            f"{tokenizer.name_or_path} has now ({current.get(changed[0])}); restore it, or select again."
        )


def tell_of_reading(selection: Selection, data: InstructionDataModule) -> None:
    """Tell that records are read otherwise than they were scored, as by another template or from other columns."""
    made_from = selection.about.data
    before, now = _ways(made_from.train.path, made_from.format), _ways(data.train, data.options)
    changed = {
        f"data.{name} {then[name]!r}, now {value!r}": None
        for then, way in zip(before, now, strict=False)
        for name, value in way.items()
        if then[name] != value
    }
    if changed:
        values = ", ".join(changed)
        say(f"the examples were scored as read with {clipped(values)}; they are trained on as read now.")


def _ways(given: Given | None, options: FormatOptions) -> list[dict[str, Any]]:
    """How each of the sources is read."""
    sources = sources_of(given, TRAIN) if given is not None else ()
    return [asdict(options.within(source.reading)) for source in sources]


def chosen_weights(selection: Selection, model: PreTrainedModel) -> CompactParameters:
    """The masters of the weights that the mask chooses; refuses a mask that is not as it was written."""
    path, due = selection.folder / MASK, selection.about.counts.parameters.selected
    with refusing_damage(path):
        compact = CompactParameters(model, selection.stored_masks())
    if compact.num_selected != due:
        raise UserError(
            f"{path} is damaged: it chooses {compact.num_selected:,} weights, the manifest tells of {due:,}; make the "
            "selection again."
        )
    return compact
