from pathlib import Path

from dualsft.scorers import DiagonalFisher
from dualsft.selection.summary import summary
from tests.world.jobs import SGD, Inputs, select


def test_summary_tells_what_happened(inputs: Inputs, tmp_path: Path) -> None:
    """Counts on both sides, what was left out and why, both sums, each phase, and the folder."""
    text = summary(select(inputs, tmp_path / "out", {**SGD, "data_budget": 3, "parameter_budget": 1000}))
    lines = text.splitlines()
    assert lines[0].endswith("3 of 10 selected (8 scored, 1 empty, 1 truncated)")
    assert lines[1].startswith("weights     1,000 of ")
    assert "100% covered by the scores" in lines[1]
    assert lines[2].startswith("sums        rows ")
    assert lines[3].startswith("batches     padded to 100 tokens, ")
    assert lines[4].startswith("step        2e-05, predicted improvement ")
    assert [line.split("  ")[0] for line in lines[5:7]] == ["validation gradient", "scores"]
    assert lines[-1] == f"wrote       {tmp_path / 'out'}"


def test_second_order_and_rounds_are_told(inputs: Inputs, tmp_path: Path) -> None:
    """How large the second-order term is against the first, and what each further round kept of the choice before."""
    options = {**SGD, "scorer": DiagonalFisher("empirical_fisher"), "step_size": 0.1, "data_budget": 3}
    made = select(inputs, tmp_path / "out", {**options, "order": "parameters_then_data", "rounds": 2})
    share = made.manifest["prediction"]["second_order_share"]
    kept = {side: made.manifest["rounds"][1][side]["overlap"] for side in ("parameters", "data")}
    text = summary(made)
    assert f"(second-order term {share:.2g} of the first)" in text
    assert f"round 2     chose {kept['parameters']:.1%} of the parameters, {kept['data']:.1%} of the data as" in text
