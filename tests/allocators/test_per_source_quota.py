from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from dualsft.allocators import PerSourceQuota, ScoredExamples
from dualsft.allocators.apportion import apportion
from dualsft.errors import UserError
from tests.allocators.cases import scored


def of_sources(
    sources: Sequence[object], values: Sequence[float] | None = None, column: str = "source"
) -> ScoredExamples:
    """Examples of these sources; scores fall from row to row if not given."""
    return scored(values or range(0, -len(sources), -1), records=[{column: source} for source in sources])


def random_examples(seed: int) -> tuple[list[str], list[float]]:
    """30 rows of four sources of unequal size, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    sources = ["dcba"[int(4 * x**2)] for x in torch.rand(30, generator=generator).tolist()]
    return sources, (2 * torch.randn(30, generator=generator)).round().tolist()


def count(examples: ScoredExamples, chosen: torch.Tensor) -> Counter[str]:
    """How many were chosen of each source."""
    return Counter(str(examples.records[int(i) // 10 - 1]["source"]) for i in chosen)


@pytest.mark.parametrize("shares", ["proportional", "equal", {"a": 3.0, "d": 0.5}, {"b": 0.0, "c": 1.0}])
@pytest.mark.parametrize("seed", range(6))
def test_each_source_gets_its_part_and_spends_it_on_its_best(seed: int, shares: Any) -> None:
    """For every budget, the highest scores of each source, ties to the earlier row, as many as are its part of it."""
    sources, values = random_examples(seed)
    names = list(dict.fromkeys(sources))
    assert len(names) == 4
    sizes = [sources.count(name) for name in names]
    weights = {"proportional": sizes, "equal": [1] * 4}.get(str(shares)) or [shares.get(name, 0) for name in names]
    for budget in range(1, 31):
        expected = []
        for name, part in zip(names, apportion(budget, weights, sizes), strict=True):
            own = [k for k in range(30) if sources[k] == name]
            expected += sorted(own, key=lambda k: (-values[k], k))[:part]
        chosen = PerSourceQuota(shares=shares).allocate(of_sources(sources, values), budget).tolist()
        assert chosen == sorted(10 * (k + 1) for k in expected)
        assert len(chosen) == budget


def test_parts_are_in_proportion_equal_or_as_told() -> None:
    """Of 12, 6 and 2 rows: 6, 3, 1 in proportion; 4, 4, 2 if equal, as the smallest has no more; 2 and 6 by 1 : 3."""
    examples = of_sources(["x"] * 12 + ["y"] * 6 + ["z"] * 2)
    assert count(examples, PerSourceQuota().allocate(examples, 10)) == {"x": 6, "y": 3, "z": 1}
    assert count(examples, PerSourceQuota(shares="equal").allocate(examples, 10)) == {"x": 4, "y": 4, "z": 2}
    assert count(examples, PerSourceQuota(shares={"x": 1.0, "y": 3.0}).allocate(examples, 8)) == {"x": 2, "y": 6}


def test_sources_without_a_share_get_what_the_others_leave() -> None:
    """Named sources that are taken whole leave the rest to those that are not named, never before."""
    examples = of_sources(["x"] * 4 + ["y"] * 5)
    only_y = PerSourceQuota(shares={"y": 1.0})
    assert count(examples, only_y.allocate(examples, 5)) == {"y": 5}
    assert count(examples, only_y.allocate(examples, 7)) == {"y": 5, "x": 2}


def test_values_are_compared_as_text() -> None:
    """Numbers and null are sources too, each by what it looks like; 1 and "1" are one source."""
    examples = of_sources([1, "1", None, 2.5, None, 1])
    shares = {"1": 2.0, "None": 1.0}
    assert PerSourceQuota(shares=shares).allocate(examples, 3).tolist() == [10, 20, 30]
    assert PerSourceQuota(shares={"2.5": 1.0}).allocate(examples, 1).tolist() == [40]


def test_the_column_can_be_named() -> None:
    """Another column than `source` tells the source."""
    examples = of_sources(["x", "x", "y"], column="task")
    assert PerSourceQuota("task", "equal").allocate(examples, 2).tolist() == [10, 30]


def test_a_record_without_the_column_is_named() -> None:
    """Column, row and the columns that there are are in the error, and the option to set."""
    examples = of_sources(["x", "y"])
    examples.records[1].clear()  # type: ignore[attr-defined]
    examples.records[1].update(prompt="p", task="t")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"no column 'source' in row 20 .*has prompt, task\); give it .* as column\.$"):
        PerSourceQuota().allocate(examples, 1)


def test_a_share_for_an_unknown_source_is_told_the_known_ones() -> None:
    """The first few sources are told, and how many more there are."""
    with pytest.raises(UserError, match=r"a share to 'z', but column 'source' of the pool holds 'x', 'y'; name"):
        PerSourceQuota(shares={"x": 1.0, "z": 1.0}).allocate(of_sources(["x", "y"]), 1)
    with pytest.raises(UserError, match=r"holds '0', '1', '2', '3', '4' and 3 more; name"):
        PerSourceQuota(shares={"z": 1.0}).allocate(of_sources(list(range(8))), 1)


@pytest.mark.parametrize("share", [-0.5, float("nan"), float("inf")])
def test_impossible_shares_are_refused(share: float) -> None:
    """A negative or non-finite share is named with its source."""
    with pytest.raises(UserError, match=f"gives 'x' the share {share}; give 0 or a positive number"):
        PerSourceQuota(shares={"y": 1.0, "x": share})


@pytest.mark.parametrize("shares", [{}, {"x": 0.0}])
def test_some_share_must_be_positive(shares: dict[str, float]) -> None:
    """Nothing for nobody is a mistake."""
    with pytest.raises(UserError, match="no positive share"):
        PerSourceQuota(shares=shares)


def test_unknown_ways_to_share_are_refused() -> None:
    """Value and allowed set are told, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'proportional'.*'equal'"):
        PerSourceQuota(shares="even")  # type: ignore[arg-type]


class _Counted(Sequence[Mapping[str, Any]]):
    """Counts what is read by going through; annotations checked at run time look at rows by index."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows, self.read = rows, Counter[int]()

    def __getitem__(self, k: Any) -> Any:
        return self.rows[k]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for k, row in enumerate(self.rows):
            self.read[k] += 1
            yield row


def test_each_record_is_read_once() -> None:
    """Records are parsed anew whenever they are asked for, so the allocator goes through them a single time."""
    examples = of_sources(["x", "y", "x"])
    records = _Counted(examples.records)
    counted = ScoredExamples(examples.example_id, examples.score, examples.num_tokens, records)
    PerSourceQuota(shares={"x": 1.0}).allocate(counted, 2)
    assert records.read == {0: 1, 1: 1, 2: 1}
