from pathlib import Path

from dualsft.selection.summary import summary
from tests.selection.runs import SGD, Inputs, select


def test_summary_tells_what_happened(inputs: Inputs, tmp_path: Path) -> None:
    """Counts on both sides, what was left out and why, both sums, each phase, and the folder."""
    text = summary(select(inputs, tmp_path / "out", {**SGD, "data_budget": 3, "parameter_budget": 1000}))
    lines = text.splitlines()
    assert lines[0].endswith("3 of 10 selected (8 scored, 1 empty, 1 truncated)")
    assert lines[1].startswith("weights     1,000 of ")
    assert "100% covered by the scores" in lines[1]
    assert lines[2].startswith("sums        rows ")
    assert lines[3].startswith("batches     padded to 100 tokens, ")
    assert [line.split("  ")[0] for line in lines[4:6]] == ["validation gradient", "scores"]
    assert lines[-1] == f"wrote       {tmp_path / 'out'}"
