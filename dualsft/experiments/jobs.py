"""Jobs: the selections and fits that an experiment consists of, each identified by what its result rests on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

Kind = Literal["select", "allocate", "fit", "adapter", "evaluate"]
"""What a job does:

    select      scores a pool and a model's weights, and chooses
    allocate    chooses anew from the scores of another job's selection
    fit         trains what a selection, or a variant of it, chose, and evaluates the result
    adapter     trains an adapter of PEFT on the chosen examples, and evaluates the result
    evaluate    evaluates the base model
"""


@dataclass(frozen=True)
class Job:
    """One piece of an experiment's work.

    Attributes:
        kind: What is done.
        name: What people call it; no part of its identity.
        settings: How it is done, as JSON, without what it reads.
        inputs: What it reads: key -> the path, the sources of data, or the key of another job.
        fingerprints: The same keys -> the hash of what is there.
        work: How much is to be done, in examples that pass through the model, for estimates of time; no part of its
            identity.
    """

    kind: Kind
    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    work: float = 1.0

    @cached_property
    def key(self) -> str:
        """The hash of what the result rests on: jobs with equal keys have equal results."""
        rests_on = {"kind": self.kind, "settings": self.settings, "fingerprints": self.fingerprints}
        return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()[:20]

    def as_json(self) -> str:
        """The job as a text that `job_from_json` reads."""
        return json.dumps(asdict(self), indent=1)


def job_from_json(text: str) -> Job:
    """The job in a text."""
    return Job(**json.loads(text))
