"""The part of the page about one selection."""

from dualsft.reports.blocks import Section
from dualsft.reports.selections.budgets import budgets
from dualsft.reports.selections.checks import checks, costs, stability
from dualsft.reports.selections.examples import examples
from dualsft.reports.selections.origins import origins
from dualsft.reports.selections.relations import relations
from dualsft.reports.selections.scores import scores
from dualsft.reports.selections.story import story
from dualsft.reports.selections.subject import Subject
from dualsft.reports.selections.suspects import suspects
from dualsft.reports.selections.weights import weights


def selection_section(subject: Subject) -> Section:
    """All about one selection; a part with nothing in it is left out."""
    parts = [
        Section("Where the weights are", weights(subject)),
        Section("Scores and the cut", scores(subject)),
        examples(subject),
        Section("Examples that look wrong", suspects(subject)),
        Section("Score against length and loss", relations(subject)),
        Section("Sources", origins(subject)),
        Section("Other budgets", budgets(subject)),
        Section("Stability", stability(subject)),
        Section("Checks and costs", [*checks(subject), *costs(subject)]),
    ]
    return Section(
        f"Selection: {subject.name}", story(subject), [part for part in parts if part.blocks or part.sections]
    )
