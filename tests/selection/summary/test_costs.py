from pathlib import Path

from dualsft.scorers import DiagonalFisher
from dualsft.selection.summary import summary
from tests.world.jobs import SGD, Inputs, select


def test_summary_tells_what_happened(inputs: Inputs, tmp_path: Path) -> None:
    """What was chosen comes first, then both sums, the batches, the step, each phase, and the folder."""
    text = summary(select(inputs, tmp_path / "out", {**SGD, "data_budget": 3, "parameter_budget": 1000}))
    lines = text.splitlines()
    heads = ["examples", "lengths", "weights", "places", "sums", "batches", "cosines", "step"]
    phases = ["validation gradient", "scores"]
    assert [line.split("  ")[0] for line in lines] == [*heads, *phases, "wrote"]
    assert lines[4].startswith("sums        rows ")
    assert lines[5].startswith("batches     padded to 100 tokens, ")
    assert lines[6].startswith("cosines     direction u and mean gradient of the pool ")
    assert lines[7].startswith("step        2e-05, predicted improvement ")
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
