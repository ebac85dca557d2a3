"""A selection for the terminal: what was chosen in plain words, what is odd about it, then rows, checks and costs.

In: a finished selection, and where at hand its tokenizer and the records of its pool. Out: lines of text.
"""

from transformers import PreTrainedTokenizerBase

from dualsft.data.records import Records
from dualsft.selection.artifact import Selection
from dualsft.selection.summary.cautions import cautions
from dualsft.selection.summary.choice import described_choice
from dualsft.selection.summary.costs import checks, phase_table, telling_tokens
from dualsft.selection.summary.rows import shown_rows


def summary(
    selection: Selection, tokenizer: PreTrainedTokenizerBase | None = None, records: Records | None = None
) -> str:
    """Summarise what was scored, chosen and left out, what is odd about it, the costs, and the files.

    Args:
        selection: A finished selection.
        tokenizer: Spells the tokens, where the selection has scores by token.
        records: The records of its pool, some of which are shown.
    """
    chosen_by_scores = "control" not in selection.manifest
    lines = [
        *described_choice(selection),
        *(f"warning     {caution}" for caution in cautions(selection) if chosen_by_scores),
        *(shown_rows(selection, records) if records is not None else []),
        *checks(selection),
        *phase_table(selection.about),
        *(telling_tokens(selection, tokenizer) if tokenizer is not None else []),
        f"wrote       {selection.folder}",
    ]
    return "\n".join(lines)
