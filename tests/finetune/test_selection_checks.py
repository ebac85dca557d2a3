"""What a fit says of a selection whose records it reads otherwise."""

from types import SimpleNamespace
from typing import Any

import pytest

from dualsft.data.module import InstructionDataModule
from dualsft.data.options import FormatOptions
from dualsft.finetune.selection_checks import tell_of_reading

OWN = {"path": "x", "prompt_column": "q", "response_column": "a"}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"train": {"a": OWN, "b": "y"}}, ""),
        ({"train": [{**OWN, "cap": 3}, "y"]}, ""),
        ({"train": {"a": {**OWN, "prompt_column": "p"}, "b": "y"}}, "data.prompt_column 'q', now 'p'"),
        ({"train": {"a": OWN, "b": "y"}, "prompt_template": "Q{prompt}"}, "data.prompt_template '{prompt}\\n', now"),
    ],
)
def test_each_source_is_compared(now: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another column or template of any source is told once, and another name or number of its records is not."""
    made_from = SimpleNamespace(train=SimpleNamespace(path={"a": OWN, "b": "y"}), format=FormatOptions())
    selection: Any = SimpleNamespace(about=SimpleNamespace(data=made_from))
    tell_of_reading(selection, InstructionDataModule(**now))
    said = capsys.readouterr().err
    assert said.count("now") == (2 if told else 0)  # the value, and how they are trained on
    assert told in said
