from typing import Any

import pytest

from dualsft.progress import PhaseLog
from tests.selection.tiny import collate, make_examples


def batches() -> list[Any]:
    """Three batches of five examples."""
    examples = make_examples()
    return [collate(examples[:2]), collate(examples[2:4]), collate(examples[4:])]


def test_a_phase_counts_what_passes() -> None:
    """Examples and supervised tokens are counted as the batches pass, unchanged and in order."""
    log, given = PhaseLog(show=False), batches()
    with log.phase("scores", 5) as watch:
        assert all(found is batch for found, batch in zip(watch(given), given, strict=True))
    (phase,) = log.phases
    assert (phase.name, phase.examples) == ("scores", 5)
    assert phase.tokens == sum(label != -100 for _, labels in make_examples() for label in labels)
    assert phase.seconds > 0
    assert phase.peak_memory_bytes > 2**20


def test_a_batch_counts_once_its_work_is_done() -> None:
    """The batch in work is not counted yet."""
    log = PhaseLog(show=False)
    with log.phase("scores", 5) as watch:
        passing = watch(batches())
        next(passing)
        next(passing)
    assert log.phases[0].examples == 2


def test_passes_add_up() -> None:
    """Two epochs count twice."""
    log = PhaseLog(show=False)
    with log.phase("warm-up", 10) as watch:
        for _ in range(2):
            for _ in watch(batches()):
                pass
    assert log.phases[0].examples == 10


def test_a_phase_that_fails_is_not_logged() -> None:
    """Only what was finished has a cost."""
    log = PhaseLog(show=False)
    with pytest.raises(ZeroDivisionError), log.phase("scores", 1):
        raise ZeroDivisionError
    assert log.as_json() == []


def test_phases_are_taken_over_from_an_earlier_run() -> None:
    """A phase's notes bring it back as it was, among other notes too."""
    log = PhaseLog(show=False)
    with log.phase("warm-up", 5) as watch:
        list(watch(batches()))
    expected = log.as_json()
    notes = log.take()
    assert log.phases == []
    resumed = PhaseLog(show=False)
    resumed.restore({**notes, "something": "else"})
    assert resumed.as_json() == expected


def test_the_bar_is_drawn_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar names the phase and the rate on the error stream; without it nothing is written."""
    for show in (True, False):
        with PhaseLog(show).phase("scores", 5) as watch:
            list(watch(batches()))
        text = capsys.readouterr().err
        assert ("scores" in text and "5/5" in text) is show
