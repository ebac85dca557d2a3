"""The selections by which a scorer predicts gains of an audit's variants: each side scored by what the other holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualsft.commands.experiment_jobs import Jobs
from dualsft.errors import UserError
from dualsft.experiments.audit_plan import Variation
from dualsft.experiments.bank import Bank
from dualsft.experiments.jobs import Job
from dualsft.experiments.predictions import Scored, key_of
from dualsft.experiments.variants import examples_of
from dualsft.registry import class_path, registered_name
from dualsft.selection import Selection, load_selection

_GIVEN = "dualsft.experiments.given"
_ROWS = "rows"


class ScoreJobs:
    """The jobs by which one scorer scores what an audit varies.

    Args:
        audited: The selection to audit.
        scorer: Its registered name or class path; None for the selection's own.
        drawn: What is varied.
        step_size: The length of the step whose gain a second-order scorer is to predict: Σ_t lr_t of the fits.
        read: Where the selection's model and records lie now, by key; otherwise where they lay when it was made.
    """

    def __init__(
        self,
        audited: Selection,
        scorer: str | None,
        drawn: Sequence[Variation],
        step_size: float,
        read: Mapping[str, Any] | None = None,
    ) -> None:
        self._audited = audited
        self.jobs: dict[str, Job] = {}
        if is_along_a_path(audited):
            if scorer is not None:
                raise UserError(
                    f"{audited.folder} was scored along a path, where no scorer takes part; leave out audit.scorers."
                )
            return
        self._make = Jobs(["--config", str(select_config(audited))])
        self._common: dict[str, Any] = {
            "model.rounds": 1,
            "model.near_duplicates.threshold": None,
            "model.parameter_scores": "full",
            **(read or {}),
        }
        if scorer is not None:
            path = class_path("dualsft.scorers", scorer)
            self._common |= {"model.scorer": {"class_path": path}, "model.step_size": step_size}
        name = scorer or own_scorer(audited)
        sides = {one.side for one in drawn}
        if "data" in sides:
            self.jobs[_ROWS] = self._rows(name)
        for draw in {key_of(one.variant["examples"]): one for one in drawn if one.side != "data"}.values():
            examples = draw.variant["examples"]
            self.jobs[key_of(examples)] = self._columns(name, examples_of(audited, examples))

    def scored(self, bank: Bank) -> Scored:
        """The scores, once the jobs are done.

        Raises:
            UserError: if one failed.
        """
        if not self.jobs:
            every = _Always(self._audited)
            return Scored(rows=self._audited, columns=every, exact=False)
        made = {key: self._made(bank, job) for key, job in self.jobs.items()}
        rows = made.get(_ROWS) or next(iter(made.values()))
        return Scored(rows=rows, columns=made, exact=True)

    def _made(self, bank: Bank, job: Job) -> Selection:
        result = bank.result(job)
        if result is None or result.error is not None:
            raise UserError(f"The scores for the audit could not be made: {result.error if result else 'not done'}")
        return load_selection(bank.place(job) / "selection")

    def _rows(self, name: str) -> Job:
        """The examples, scored by the chosen weights alone."""
        checksum = (self._audited.about.checksums or {}).get("mask.safetensors", "")
        given = {"selection": str(self._audited.folder.resolve()), "checksum": checksum}
        overrides = {
            "model.order": "parameters_then_data",
            "model.parameter_budget": self._audited.about.counts.parameters.selected,
            "model.parameter_allocator": {"class_path": f"{_GIVEN}.GivenWeights", "init_args": given},
            "model.data_budget": None,
            "model.data_allocator": None,
        }
        return self._make.select(f"{name}: examples by the chosen weights", self._common | overrides)

    def _columns(self, name: str, ids: list[int]) -> Job:
        """The weights, scored by these examples alone."""
        overrides = {
            "model.order": "data_then_parameters",
            "model.data_budget": len(ids),
            "model.data_allocator": {"class_path": f"{_GIVEN}.GivenExamples", "init_args": {"ids": ids}},
            "model.parameter_budget": self._audited.about.counts.parameters.selected,
            "model.parameter_allocator": None,
        }
        return self._make.select(f"{name}: weights by {len(ids)} examples", self._common | overrides)


class _Always(Mapping[str, Selection]):
    """One selection under every key."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    def __getitem__(self, key: str) -> Selection:
        return self._selection

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def own_scorer(selection: Selection) -> str:
    """The name of what scored a selection: its path, or its scorer."""
    settings = selection.about.settings
    group, part = (
        ("dualsft.paths", settings["path"].along)
        if is_along_a_path(selection)
        else ("dualsft.scorers", settings["scorer"])
    )
    return registered_name(group, part.class_path)


def is_first_order(scorer: str) -> bool:
    """Whether a scorer's scores are in proportion to the length of the step."""
    return class_path("dualsft.scorers", scorer) == class_path("dualsft.scorers", "first_order")


def is_along_a_path(selection: Selection) -> bool:
    """Whether the selection was scored along a path."""
    return bool(selection.about.path_walked)


def select_config(selection: Selection) -> Path:
    """The configuration that the scores of a selection were made with.

    Raises:
        UserError: if it lies with another selection that is no more.
    """
    origin, seen = selection.folder, selection.manifest
    while "allocated_from" in seen:
        origin = Path(seen["allocated_from"]["folder"])
        if not (origin / "manifest.json").is_file():
            raise UserError(
                f"{selection.folder} was allocated from {origin}, which is no more, and whose configuration the audit "
                "needs; make the selection again with `dualsft select`."
            )
        seen = load_selection(origin).manifest
    return origin / "config.yaml"
