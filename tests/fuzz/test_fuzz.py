"""Each fuzzer on a fixed number of cases, the same ones each time."""

import pytest

from tests.fuzz.fuzzers import FUZZERS

CASES = {
    "records": 100,
    "sources": 150,
    "templates": 50,
    "tokenizers": 50,
    "manifests": 40,
    "selections": 30,
    "deltas": 30,
    "configs": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_broken_input_ends_in_a_sentence(name: str) -> None:
    """Whatever the case, the job ends well or in one sentence; some cases do the one, some the other."""
    outcomes = FUZZERS[name].run(CASES[name])
    assert all(outcomes.values()), outcomes
