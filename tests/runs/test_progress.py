import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.data.module import InstructionDataModule
from dualsft.runs.progress import PhaseLog
from tests.cases import collate, make_examples
from tests.world.data import write_jsonl
from tests.world.models import tiny_tokenizer


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


def test_progress_is_shown_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    """With the number of the phase, of how many there are, its name and its rate; without it nothing is written."""
    for show in (True, False):
        log = PhaseLog(show, planned=2)
        for name in ("warm-up", "scores", "unplanned"):
            with log.phase(name, 5) as watch:
                list(watch(batches()))
        lines = capsys.readouterr().err.splitlines()
        told = [re.sub(r"in \d+:\d\d, [\d,]+ tok/s", "in TIME, RATE", line) for line in lines]
        names = ("[1/2] warm-up", "[2/2] scores", "[3] unplanned") if show else ()
        assert told == [f"dualsft: {name}: done in TIME, RATE" for name in names]


def shares(log: PhaseLog, given: Any, notes: dict[str, Any] | None = None) -> list[float]:
    """How far the bar of a phase is behind each batch."""
    with log.phase("scores", 5, notes) as watch:
        return [*[watch._bar.share for _ in watch(given)][1:], watch._bar.share]


def test_the_bar_counts_examples_where_batches_are_mixed() -> None:
    """Of what an earlier run has passed, too; a pass that is repeated starts again."""
    notes = {"name": "scores", "examples": 2, "tokens": 100_000, "seconds": 1000.0, "peak_memory_bytes": 0}
    log = PhaseLog(show=False)
    assert shares(log, batches()[1:], notes) == [0.8, 1.0]
    with log.phase("scores", 5) as watch:
        list(watch(batches()))
        passing = watch(batches())
        next(passing)
        next(passing)
        assert watch._bar.share == 0.4
        assert watch.so_far()["examples"] == 7


@pytest.mark.parametrize("packing", [False, True])
def test_the_bar_counts_tokens_where_the_longest_come_first(packing: bool, tmp_path: Path) -> None:
    """So that the time left can be believed; from wherever, and on whichever rank, the pass goes on."""
    rows = [{"prompt": "a", "response": " ".join(["word"] * n)} for n in (1, 1, 1, 1, 40)]
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    data = InstructionDataModule(
        train=pool, tokenizer=tiny_tokenizer(), packing=packing, max_length=64, batch_tokens=64
    )
    data.setup("fit")
    lengths = data.train_examples.lengths
    for start, part in ((0, slice(None)), (1, slice(None)), (1, slice(0, None, 2))):
        batches = [[int(i) for i in batch["example_id"]] for batch in data.pool_loader(part=part)]
        own = [sum(int(lengths[i]) for i in batch) for batch in batches]
        expected = [sum(own[: k + 1]) / sum(own) for k in range(start, len(own))]
        found = shares(PhaseLog(show=False), data.pool_loader(start=start, part=part))
        assert found == pytest.approx(expected)


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
