"""A few batches in place of all."""

from pathlib import Path

import pytest

from dualsft.data.batches import length_batches
from dualsft.data.sampled import BATCHES, SampledDataModule
from dualsft.data.selected import selected_ids
from tests.data.test_module import write_selection
from tests.world.data import write_jsonl
from tests.world.tokenizers import byte_level


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """Forty rows of different lengths, one without a response."""
    rows = [{"prompt": "?", "response": "x" * (i % 17) * (i != 20)} for i in range(1, 41)]
    return write_jsonl(tmp_path / "pool.jsonl", rows)


def module(train: str, selection: str | None = None) -> SampledDataModule:
    """A module with small batches."""
    return SampledDataModule(
        train, tokenizer=byte_level(), max_length=40, batch_tokens=40, batch_size=2, selection=selection
    )


def test_the_largest_batch_and_others_of_all_lengths_take_part(pool: str) -> None:
    """Of the batches that all examples would make; ids stay, and tokens are counted of both."""
    data = module(pool)
    examples = data.train_examples
    labelled = [i for i, n in enumerate(examples.num_tokens) if n]
    batches = length_batches(examples.lengths, 40, ids=labelled)
    assert len(batches) > BATCHES
    taken = set(examples.ok_ids())
    assert taken < set(labelled)
    assert {*batches[0], *batches[-1]} <= taken
    assert sum(set(batch) <= taken for batch in batches) == BATCHES
    sample, whole = data.tokens()["data.train"]
    assert sample == examples.lengths[sorted(taken)].sum()
    assert whole == examples.lengths[labelled].sum()


def test_a_selection_decides_what_is_sampled(pool: str, tmp_path: Path) -> None:
    """Only selected examples take part and count, all of them where they are few."""
    fingerprint = module(pool).train_examples.records.fingerprint
    chosen = [3, 8, 30]
    data = module(pool, selection=write_selection(tmp_path / "s", fingerprint, chosen, rows=40))
    assert data.training_ids() == chosen == sorted(selected_ids(tmp_path / "s", data.train_examples.records))
    assert data.tokens()["data.train"].sample == data.tokens()["data.train"].whole
