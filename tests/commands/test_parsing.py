"""Values of configurations that are YAML and yet nothing to compute with."""

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from dualsft.commands.parsing import _moved, _read_config, check_numbers
from dualsft.errors import UserError


@pytest.mark.parametrize("text", ["a: 2024-99-99", f"a: {'1' * 5000}", "a: &a [*a]", "data: &a {x: *a}"])
def test_values_that_yaml_cannot_make_are_refused(tmp_path: Path, text: str) -> None:
    """A date that is none, more digits than Python reads, and values that hold themselves."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=r"job\.yaml is not YAML"):
        _read_config(str(tmp_path / "job.yaml"))


@pytest.mark.parametrize("value", [2**63, 10**400, [-(10**400)], {"0": 10**5000}, Namespace(x=10**400)])
def test_an_integer_that_64_bits_do_not_hold_is_refused(value: Any) -> None:
    """Wherever it is; the message names its key."""
    with pytest.raises(UserError, match=r"^trainer\.a\S* is an integer beyond"):
        check_numbers(Namespace(trainer={"a": value}))
    check_numbers({"a": 2**63 - 1, "b": -(2**63), "c": 1e300, "d": True})


@pytest.mark.parametrize("text", ["1", "1_", "a.", ".a", "a b."])
def test_long_texts_are_read_once(text: str) -> None:
    """The search for class paths that have moved takes no square of the length: this one would last for hours."""
    assert _moved(text * 200_000) == text * 200_000
