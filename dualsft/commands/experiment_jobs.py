"""Jobs of an experiment, made from the ordinary configuration of select, fit and validate."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

from dualsft.commands.resolved import as_arguments, at, resolved, without
from dualsft.data.options import validation_sources
from dualsft.data.records import read_records
from dualsft.data.sources import Given
from dualsft.data.tokenizer import load_tokenizer
from dualsft.experiments.jobs import Job
from dualsft.models.configuration import stored_configuration
from dualsft.models.loading import model_fingerprint, model_folder, tokenizer_fingerprint
from dualsft.selection.scoring_checkpoint import describe_checkpoint

MODEL, TRAIN, VALIDATION, SELECTION = "model.model_name_or_path", "data.train", "data.validation", "model.selection"
CHECKPOINT, SEED = "model.warmup.checkpoint", "seed_everything"
_TRAINING = 3  # an example that is trained on costs about three that are evaluated
_PATHS = (MODEL, TRAIN, VALIDATION, SELECTION, CHECKPOINT)
_APART = (*_PATHS, "trainer.enable_progress_bar", "trainer.default_root_dir", "trainer.logger")
"""Keys that are no part of a job's settings: what it reads, by path, and what changes no result."""


class Pool(NamedTuple):
    """What another job will have chosen, as the pool of a job.

    Attributes:
        path: Where its records will be.
        key: The other job's.
        size: How many they are, about; for estimates of time.
    """

    path: str
    key: str
    size: int


class Jobs:
    """Makes jobs that share a configuration.

    Args:
        arguments: The arguments that select, fit and validate share, such as ``--config FILE``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._resolved: dict[str, dict[str, Any]] = {}

    def settings(self, verb: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a verb under these overrides, by dotted key; see `resolved` for the errors."""
        others = {key: value for key, value in overrides.items() if key != SEED}  # seeds are many, and all alike
        known = json.dumps([verb, others], sort_keys=True)
        if known not in self._resolved:
            self._resolved[known] = resolved(verb, [*self._arguments, *as_arguments(others)])
        settings = deepcopy(self._resolved[known])
        return {**settings, SEED: overrides[SEED]} if SEED in overrides else settings

    def select(self, name: str, overrides: Mapping[str, Any], pool: Pool | None = None) -> Job:
        """A selection, from the configuration's pool or another one."""
        settings = self.settings("select", overrides)
        what = {"select": without(settings, _APART)}
        inputs, fingerprints, count = _read(settings, pool)
        return Job("select", name, what, inputs, fingerprints, count)

    def allocate(self, name: str, source: Job, folder: str, choice: Mapping[str, Any]) -> Job:
        """Another choice from the scores of a selection.

        Args:
            name: What people call it.
            source: The job that makes the selection.
            folder: The selection directory.
            choice: The options of select that decide it, by name.
        """
        split = source.settings["select"]["data"]["train_split"]
        what = {"allocate": {"model": dict(choice), "data": {"train_split": split}}}
        inputs = {SELECTION: folder, TRAIN: source.inputs[TRAIN]}
        return Job("allocate", name, what, inputs, {SELECTION: source.key, TRAIN: source.fingerprints[TRAIN]})

    def evaluations(self, given: Mapping[str, Mapping[str, Any]]) -> "Evaluations":
        """Evaluations by name, each from its overrides of validate."""
        settings = {name: self.settings("validate", overrides) for name, overrides in given.items()}
        return Evaluations(settings)

    def fit(
        self,
        name: str,
        overrides: Mapping[str, Any],
        evaluations: "Evaluations",
        *,
        selection: str | None = None,
        selection_fingerprint: str | None = None,
        variant: Mapping[str, Any] | None = None,
        examples: int | None = None,
        pool: Pool | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> Job:
        """A fit of what a selection, or a variant of it, chose, and the evaluations after it.

        Args:
            name: What people call it.
            overrides: Settings of fit by dotted key.
            evaluations: What the trained model is measured on.
            selection: The selection directory, or None to train all weights on all examples.
            selection_fingerprint: What identifies its scores and choice.
            variant: What is taken in place of what the selection chose; see `dualsft.experiments.variants`.
            examples: How many examples an epoch has, if not all; for estimates of time.
            pool: What the selection was made from, if not from the configuration's pool.
            adapter: The configuration of an adapter of PEFT that is trained in place of weights.
        """
        settings = self.settings("fit", overrides)
        inputs, fingerprints, rows = _read(settings, pool)
        count = rows if examples is None else examples
        inputs |= evaluations.inputs
        fingerprints |= evaluations.fingerprints
        if selection is not None:
            assert selection_fingerprint is not None
            inputs[SELECTION], fingerprints[SELECTION] = selection, selection_fingerprint
        what = {"fit": without(settings, _APART), "variant": variant, "evaluations": evaluations.settings}
        epochs = max(at(settings, "trainer.max_epochs") or 1, 1)
        work = _TRAINING * count * epochs + evaluations.size
        if adapter is not None:
            return Job("adapter", name, {**what, "adapter": dict(adapter)}, inputs, fingerprints, work)
        return Job("fit", name, what, inputs, fingerprints, work)

    def evaluate(self, name: str, evaluations: "Evaluations") -> Job:
        """The evaluations of the base model."""
        model = next(iter(evaluations.models))
        fingerprints = {MODEL: _of_model(model), **evaluations.fingerprints}
        inputs = {MODEL: model, **evaluations.inputs}
        return Job("evaluate", name, {"evaluations": evaluations.settings}, inputs, fingerprints, evaluations.size)


class Evaluations:
    """What models are measured on, by name.

    Args:
        settings: Name -> the settings of validate.

    Attributes:
        settings: Name -> the settings, without what is read.
        inputs: ``evaluations.NAME`` -> the sources of its data, where it has any.
        fingerprints: The same keys -> the hash of the records.
        models: The models that the settings name.
        size: How many examples they have, or 1 if they are tasks; for estimates of time.
    """

    def __init__(self, settings: Mapping[str, dict[str, Any]]) -> None:
        self.models = {at(of, MODEL) for of in settings.values()}
        self.settings = {name: without(of, _APART) for name, of in settings.items()}
        read = {f"evaluations.{name}": of for name, of in settings.items() if at(of, VALIDATION) is not None}
        self.inputs: dict[str, Given] = {key: at(of, VALIDATION) for key, of in read.items()}
        self.fingerprints = {key: _of_records(self.inputs[key], _split(VALIDATION, of)) for key, of in read.items()}
        self.size = sum(_count(self.inputs[key], _split(VALIDATION, of)) for key, of in read.items()) or 1


def _read(settings: dict[str, Any], pool: Pool | None) -> tuple[dict[str, Given], dict[str, str], int]:
    """What settings read, with its hashes, and how many examples the pool has."""
    inputs = inputs_of(settings)
    if pool is None:
        return inputs, _fingerprints(inputs, settings), record_count(settings)
    others = {key: path for key, path in inputs.items() if key != TRAIN}
    return {**others, TRAIN: pool.path}, {**_fingerprints(others, settings), TRAIN: pool.key}, pool.size


def inputs_of(settings: Mapping[str, Any]) -> dict[str, Given]:
    """What settings read: key -> path or sources; each of several validation sets has a key of its own."""
    found = {key: at(settings, key) for key in (MODEL, TRAIN, CHECKPOINT)}
    sets = at(settings, VALIDATION)
    named = {f"{VALIDATION}.{n}": path for n, path in validation_sources(sets).items()} if sets is not None else {}
    found |= named if isinstance(sets, Mapping) else {VALIDATION: sets}
    return {key: given for key, given in found.items() if given is not None}


def _fingerprints(inputs: Mapping[str, Given], settings: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each of the models and records that settings read."""
    return {
        key: _of_model(str(given)) if key in (MODEL, CHECKPOINT) else _of_records(given, _split(key, settings))
        for key, given in inputs.items()
    } | _of_second_moment(inputs)


def _split(key: str, settings: Mapping[str, Any]) -> str:
    """The split that is read of a source."""
    return str(at(settings, "data.train_split" if key == TRAIN else "data.validation_split"))


@cache
def _of_model(name_or_path: str) -> str:
    """The hash of a model's weights, configuration and tokenizer."""
    parts = {
        "weights": model_fingerprint(name_or_path),
        "configuration": stored_configuration(model_folder(name_or_path)),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(name_or_path)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_second_moment(inputs: Mapping[str, Given]) -> dict[str, str]:
    """The hash of the second moment beside the weights of a ready scoring checkpoint, if it has one."""
    digest = describe_checkpoint(str(inputs[CHECKPOINT]))["second_moment"] if CHECKPOINT in inputs else None
    return {f"{CHECKPOINT}.second_moment": digest} if digest is not None else {}


def _of_records(given: Given, split: str) -> str:
    return _known_of(json.dumps(given), split)[0]


def record_count(settings: Mapping[str, Any]) -> int:
    """How many records the pool has."""
    return _count(at(settings, TRAIN), _split(TRAIN, settings))


def _count(given: Given, split: str) -> int:
    return _known_of(json.dumps(given), split)[1]


@cache
def _known_of(given: str, split: str) -> tuple[str, int]:
    """The hash of the records of sources, given as JSON, and how many they are."""
    records = read_records(json.loads(given), split)
    return records.fingerprint, len(records)
