"""Scores of weights that are kept rounded, or not at all, and what can be chosen by them later."""

from pathlib import Path

import pytest
import torch

from dualsft.errors import UserError
from dualsft.selection.reallocation import reallocate
from tests.world.jobs import SGD, Inputs, select

OPTIONS = {**SGD, "data_budget": 4, "parameter_budget": 777}


def test_rounded_scores_leave_the_choice_as_it_is(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take half of the space; what is allocated by them has the highest of them, and may differ, which is told."""
    full = select(inputs, tmp_path / "full", OPTIONS)
    found = select(inputs, tmp_path / "rounded", {**OPTIONS, "parameter_scores": "bfloat16"})
    for name in ("examples.parquet", "mask.safetensors", "parameters.parquet", "diagnostics.json"):
        assert (found.folder / name).read_bytes() == (full.folder / name).read_bytes()
    scores = full.parameter_scores()
    kept = found.parameter_scores()
    assert all(torch.equal(kept[name], score.bfloat16().float()) for name, score in scores.items())
    (file,), (whole,) = (of.folder.glob("parameter_scores*") for of in (found, full))
    assert file.stat().st_size < 0.6 * whole.stat().st_size
    capsys.readouterr()
    again = reallocate(found.folder, tmp_path / "again", data_budget=4, parameter_budget=500)
    assert "scores of weights in bfloat16" in capsys.readouterr().err
    assert (again.folder / file.name).read_bytes() == file.read_bytes()
    chosen = torch.cat([kept[name][mask].abs() for name, mask in again.mask().items()])
    others = torch.cat([kept[name][~mask].abs() for name, mask in again.mask().items()])
    assert len(chosen) == 500
    assert chosen.min() >= others.max()


def test_without_scores_the_examples_can_be_chosen_anew(inputs: Inputs, tmp_path: Path) -> None:
    """Weights and their figures stay; other ones are refused, and so is whoever asks for the scores."""
    full = select(inputs, tmp_path / "full", OPTIONS)
    found = select(inputs, tmp_path / "none", {**OPTIONS, "parameter_scores": "none"})
    for name in ("examples.parquet", "mask.safetensors", "parameters.parquet", "diagnostics.json"):
        assert (found.folder / name).read_bytes() == (full.folder / name).read_bytes()
    assert not [*found.folder.glob("parameter_scores*")]
    with pytest.raises(UserError, match=r"model\.parameter_scores none and keeps no scores of weights; select again"):
        found.parameter_scores()
    fewer = reallocate(found.folder, tmp_path / "fewer", data_budget=2, parameter_budget=777)
    expected = reallocate(full.folder, tmp_path / "expected", data_budget=2, parameter_budget=777)
    for name in ("examples.parquet", "mask.safetensors", "parameters.parquet", "diagnostics.json", "selected.jsonl"):
        assert (fewer.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    with pytest.raises(UserError, match=r"weights stay as they are; drop model\.parameter_budget, or select again"):
        reallocate(found.folder, tmp_path / "other", data_budget=2, parameter_budget=500)
    assert not (tmp_path / "other").exists()
