"""The jobs of a comparison: a grid's runs, the selections that they need, and the scores that these share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualsft.allocators import count_of
from dualsft.commands.compare_checks import check_order, check_tasks_can_be_run, chosen_count, telling, weight_counts
from dualsft.commands.experiment_jobs import MODEL, SEED, TRAIN, VALIDATION, Evaluations, Jobs, Pool, record_count
from dualsft.commands.resolved import at, put
from dualsft.commands.shared_scores import choice_of, sources
from dualsft.errors import UserError
from dualsft.experiments.bank import Bank
from dualsft.experiments.grid import BASE, Evaluation, Grid
from dualsft.experiments.jobs import Job
from dualsft.experiments.methods import Choice, Recipe, recipes
from dualsft.finetune.adapter import with_rank


@dataclass(frozen=True)
class Made:
    """A selection of a comparison.

    Attributes:
        folder: Where it will be.
        key: What identifies its scores and choice.
        needs: The jobs that make it, in their order.
        count: How many examples it chooses, about.
    """

    folder: str
    key: str
    needs: tuple[Job, ...]
    count: int

    @property
    def as_pool(self) -> Pool:
        """What it chooses, as the pool of another one."""
        return Pool(self.folder, self.key, self.count)


@dataclass(frozen=True)
class Trial:
    """A run of a comparison, with its job.

    Attributes:
        recipe: What it is.
        job: The training and its evaluations.
        needs: The jobs of the selection that it trains, in their order.
        selection: The selection directory that these make, if any.
        pool: Another one, whose chosen examples are all that it trains on, if that one chose weights alone.
    """

    recipe: Recipe
    job: Job
    needs: tuple[Job, ...]
    selection: str | None
    pool: str | None


class CompareJobs:
    """Makes the jobs of a grid; whatever is wrong with a method or an evaluation is told here.

    Args:
        grid: The grid.
        bank: Where the jobs' results will be.

    Attributes:
        base: The evaluations of the base model; None if nothing is trained and measured.
        trials: The runs.

    Raises:
        UserError: naming the place in the grid.
    """

    def __init__(self, grid: Grid, bank: Bank) -> None:
        self._jobs = Jobs([part for file in grid.config for part in ("--config", file)])
        self._bank = bank
        self._check_configuration()
        evaluations = self._evaluations(grid.evaluations)
        self.base = self._jobs.evaluate(BASE, evaluations) if grid.evaluations else None
        runs = recipes(grid, at(self._jobs.settings("select", {}), "model.order"))
        made = self._selections(runs)
        self.trials = [self._trial(recipe, made, evaluations) for recipe in runs]

    def needs_of(self, selection: Job) -> tuple[Job, ...]:
        """The jobs that the job of a selection needs."""
        found = next(trial.needs for trial in self.trials if selection.key in {job.key for job in trial.needs})
        return found[: [job.key for job in found].index(selection.key)]

    @property
    def stages(self) -> list[list[Job]]:
        """The jobs of all selections, in groups of which each needs only those before it; each job once."""
        depths: dict[str, tuple[int, Job]] = {}
        for trial in self.trials:
            for depth, job in enumerate(trial.needs):
                known = depths.get(job.key, (0, job))[0]
                depths[job.key] = (max(depth, known), job)
        last = max((depth for depth, _ in depths.values()), default=-1)
        return [[job for depth, job in depths.values() if depth == k] for k in range(last + 1)]

    @property
    def all(self) -> list[Job]:
        """All jobs, in the order in which they are done."""
        selections = [job for stage in self.stages for job in stage]
        return [self.base, *selections, *(trial.job for trial in self.trials)] if self.base else selections

    def _check_configuration(self) -> None:
        """Refuse what is wrong whatever the method."""
        settings = self._jobs.settings("select", {})
        for key in (TRAIN, VALIDATION):
            if at(settings, key) is None:
                raise UserError(f"{key} is not given; name it in the configuration that the grid's config names.")
        record_count(settings)
        self._jobs.settings("fit", {})

    def _evaluations(self, given: Mapping[str, Evaluation]) -> Evaluations:
        for name, evaluation in given.items():
            with telling(f"evaluations.{name}"):
                check_tasks_can_be_run(evaluation)
                self._jobs.evaluations({name: _of_validate(evaluation)})
        return self._jobs.evaluations({name: _of_validate(evaluation) for name, evaluation in given.items()})

    def _selections(self, runs: Sequence[Recipe]) -> dict[int, Made]:
        """The selection of each choice, by its id: those that others choose from first."""
        made: dict[int, Made] = {}
        with_choice = [(run.place, run.choice) for run in runs if run.choice is not None]
        firsts = [(place, choice.of) for place, choice in with_choice if choice.of is not None]
        alone = [(place, choice) for place, choice in with_choice if choice.of is None]
        self._make([*alone, *firsts], made)
        seconds = [(place, choice) for place, choice in with_choice if choice.of is not None]
        for place, choice in seconds:
            for part, of in (("data", choice.of), ("parameters", choice)):
                assert of is not None
                check_order(place, part, self._settings(place, of, made))
        self._make(seconds, made)
        return made

    def _make(self, choices: Sequence[tuple[str, Choice]], made: dict[int, Made]) -> None:
        """Add the selections of some choices: one for each kind of scores, and the others allocated from it."""
        settings = [self._settings(place, choice, made) for place, choice in choices]
        owns = [self._select(place, choice, made) for place, choice in choices]
        found = sources(settings, [self._is_done(job) for job in owns])
        for k, (place, choice) in enumerate(choices):
            parent = made[id(choice.of)] if choice.of else None
            job = owns[found[k]]
            needs = (*(parent.needs if parent else ()), job)
            with telling(place):
                count = chosen_count(settings[k], parent.count if parent else record_count(settings[k]))
            if choice_of(settings[k]) != choice_of(settings[found[k]]):
                name = _name("choice", place, choice)
                job = self._jobs.allocate(name, job, self._folder(job), choice_of(settings[k]))
                needs = (*needs, job)
            # known by its own settings, so that it is the same one whichever selection has its scores
            made[id(choice)] = Made(self._folder(job), owns[k].key, needs, count)

    def _select(self, place: str, choice: Choice, made: Mapping[int, Made]) -> Job:
        """The job that makes a selection with scores of its own."""
        pool = made[id(choice.of)].as_pool if choice.of else None
        with telling(place):
            return self._jobs.select(_name("weights" if pool else "selection", place, choice), choice.settings, pool)

    def _is_done(self, job: Job) -> bool:
        found = self._bank.result(job)
        return found is not None and found.error is None

    def _settings(self, place: str, choice: Choice, made: Mapping[int, Made]) -> dict[str, Any]:
        """The settings of a selection, with its pool."""
        with telling(place):
            settings = self._jobs.settings("select", choice.settings)
        if choice.of is not None:
            put(settings, TRAIN, made[id(choice.of)].as_pool.path)
        return settings

    def _trial(self, recipe: Recipe, made: Mapping[int, Made], evaluations: Evaluations) -> Trial:
        own = made[id(recipe.choice)] if recipe.choice else None
        parent = made[id(recipe.choice.of)] if recipe.choice and recipe.choice.of else None
        with telling(recipe.place):
            fit = {"model.samples.number": 0, **recipe.fit}
            adapter = recipe.adapter and self._adapter(recipe, recipe.adapter)
            job = self._jobs.fit(
                recipe.label,
                fit,
                evaluations,
                selection=own.folder if own else None,
                selection_fingerprint=own.key if own else None,
                variant=recipe.variant,
                examples=own.count if own else None,
                pool=parent.as_pool if parent else None,
                adapter=adapter,
            )
        needs, folder = (own.needs, own.folder) if own else ((), None)
        return Trial(recipe, job, needs, folder, parent.folder if parent else None)

    def _adapter(self, recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = self._jobs.settings("select", {})
        sizes = weight_counts(at(settings, MODEL))
        budget = count_of("the parameter budget", recipe.budgets.parameters, sum(sizes.values()), "weights")
        return with_rank(given, at(settings, MODEL), budget, recipe.seed)

    def _folder(self, job: Job) -> str:
        return str(self._bank.place(job) / "selection")


def _name(what: str, place: str, choice: Choice) -> str:
    """What people call the job of a selection."""
    return f"{what} of {place.removeprefix('methods.')}, seed {choice.settings[SEED]}"


def _of_validate(evaluation: Evaluation) -> dict[str, Any]:
    """The settings of validate for an evaluation."""
    tokens = {"model.generation.max_new_tokens": evaluation.max_new_tokens}
    return {**tokens, **evaluation.validate, "data.validation": evaluation.data, "tasks": evaluation.tasks}
