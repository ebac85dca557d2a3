"""What a fuzzer is, what its cases may end in, and how it is run."""

import contextlib
import io
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from dualsft.commands.messages import explanation
from dualsft.errors import UserError

LONGEST_MESSAGE = 1000
PHASES = (Phase.generate, Phase.target, Phase.shrink)


@dataclass(frozen=True)
class Fuzzer:
    """Cases of one kind of input, and the job that reads it.

    Attributes:
        cases: What is drawn.
        job: Does the work on one case, in an empty folder of its own.
        prepare: Makes what the cases are drawn from, which may not be done while they are drawn.
    """

    cases: SearchStrategy[Any]
    job: Callable[[Any, Path], None]
    prepare: Callable[[], object] = lambda: None

    def run(self, count: int, start: int | None = None) -> dict[str, int]:
        """Try this many cases; without a start the same ones each time.

        Returns:
            How many ended well and how many in a refusal.

        Raises:
            Exception: what the smallest failing case raised, with that case in its notes.
        """
        self.prepare()
        outcomes = {"ended well": 0, "refused": 0}

        @settings(
            max_examples=count,
            derandomize=start is None,
            database=None,
            deadline=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=self.cases)
        def attempt(case: Any) -> None:
            outcomes["refused" if self.refusal(case) else "ended well"] += 1

        (attempt if start is None else seed(start)(attempt))()
        return outcomes

    def refusal(self, case: Any) -> str | None:
        """What the user is told about a case; None if it ended well, and an exception if it ended in anything else."""
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
            patch.object(constants, "HF_HUB_OFFLINE", True),  # a path that is changed looks like a name on the Hub
        ):
            warnings.simplefilter("ignore")
            try:
                self.job(case, Path(folder))
            except (UserError, ArgumentError) as error:
                told = explanation(error)
                assert told is not None
                message = told[0].replace(folder, "FOLDER")
                assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message}"
                return message
        return None
