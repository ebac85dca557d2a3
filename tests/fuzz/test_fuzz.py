"""Each fuzzer on a fixed number of cases, the same ones each time."""

import pytest

from tests.fuzz.fuzzers import FUZZERS

CASES = {
    "records": 150,
    "sources": 150,
    "templates": 50,
    "tokenizers": 50,
    "manifests": 80,
    "selections": 40,
    "deltas": 40,
    "configs": 12,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_broken_input_ends_in_a_sentence(name: str) -> None:
    """Whatever the case, the job ends well or in one sentence; some cases do the one, some the other."""
    outcomes = FUZZERS[name].run(CASES[name])
    assert all(outcomes.values()), outcomes
