import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.runs.progress import PhaseLog, say
from tests.cases import collate, make_examples


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
    notes = log.latest()
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


def drawn(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The states of the bars on the error stream, in order."""
    return [text for text in re.split(r"[\r\n]+", capsys.readouterr().err) if text]


def test_the_bar_tells_phase_place_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what an earlier run has passed, too; the rate counts all the time that the phase took."""
    notes = {"name": "scores", "examples": 2, "tokens": 100_000, "seconds": 1000.0, "peak_memory_bytes": 0}
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    with PhaseLog().phase("scores", 9, notes) as watch:
        watch._bar.mininterval = 0
        passing = watch(batches())
        for _ in range(3):
            next(passing)
    (first, *_, last) = drawn(capsys)
    assert re.search(r"scores:.* 2/9 \[\d\d:\d\d<", first)
    assert re.search(r"scores:.* 6/9 \[\d\d:\d\d<\d\d:\d\d, .*ex/s, (99|100) supervised tok/s\]", last)


def test_the_bar_starts_again_with_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that is repeated shows how far the repetition is; a resumed one, too. All that was passed is counted."""
    log = PhaseLog()
    with log.phase("scores", 5) as watch:
        list(watch(batches()))
        passing = watch(batches())
        next(passing)
        next(passing)
        notes = watch.so_far()
    assert drawn(capsys)[-1].count("2/5")
    assert notes["examples"] == 7
    with log.phase("scores", 5, notes) as watch:
        list(watch(batches()[1:]))
    assert drawn(capsys)[-1].count("5/5")
    assert log.phases[-1].examples == 10


def test_a_message_stands_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """On a line of its own, which the bar does not share."""
    with PhaseLog().phase("scores", 5) as watch:
        passing = watch(batches())
        next(passing)
        say("something happened.")
        list(passing)
    assert [line for line in drawn(capsys) if "happened" in line] == ["dualsft: something happened."]


FREED = 2**27
"""Bytes that a phase holds for a while; large enough that the allocator gives them back to the system."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget an earlier peak")
def test_the_peak_is_the_phase_s_own() -> None:
    """A small phase after a large one does not have its peak; a small part of a resumed phase keeps the larger one."""
    log = PhaseLog(show=False)
    with log.phase("large", 5) as watch:
        assert torch.ones(FREED, dtype=torch.uint8).sum() == FREED
        notes = watch.so_far()
    with log.phase("small", 5):
        pass
    with log.phase("large", 5, notes):
        pass
    large, small, resumed = (phase.peak_memory_bytes for phase in log.phases)
    assert large - small > 0.8 * FREED
    assert resumed == large
