"""Errors of the mathematics, read by somebody who configures it by keys."""

import pytest

from dualsft.errors import UserError
from dualsft.selection.remedies import BY_KEY, remedies_by_key


@pytest.mark.parametrize("remedy", BY_KEY)
def test_a_remedy_names_keys(remedy: str) -> None:
    """In place of the library's own words; the problem stays."""
    with pytest.raises(UserError) as refusal, remedies_by_key():
        raise UserError("It does not work.", remedy)
    assert str(refusal.value) == f"It does not work; {BY_KEY[remedy]}."
    assert str(refusal.value.__cause__) == f"It does not work; {remedy}."


@pytest.mark.parametrize("error", [UserError("A sentence."), UserError("A sentence.", "do so"), ValueError("1")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    """Without a remedy, with another one, or of another kind."""
    with pytest.raises(type(error)) as raised, remedies_by_key():
        raise error
    assert raised.value is error
