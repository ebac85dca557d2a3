"""The heat map of where chosen weights are."""

from pathlib import Path

import numpy as np

from dualsft.experiments.heat_map import draw_layers
from dualsft.experiments.patterns import Densities


def test_the_same_tables_give_the_same_files(tmp_path: Path) -> None:
    """Every method has a panel with its name and its layers, in more rows than one too; the bytes do not change."""
    values = np.array([[0.1, np.nan, 0.3], [0.5, 0.0, 1.0]])
    tables = [Densities(f"method {k}", ["0", "outside"], ["q", "up", "all"], values / (k + 1)) for k in range(5)]
    assert (
        draw_layers(tables, tmp_path / "one") == draw_layers(tables, tmp_path / "two") == ["layers.png", "layers.svg"]
    )
    drawn = (tmp_path / "one" / "layers.svg").read_text()
    assert all(f"<!-- {word} -->" in drawn for word in ("method 0", "method 4", "outside", "weights chosen (%)"))
    assert drawn == (tmp_path / "two" / "layers.svg").read_text()
    assert (tmp_path / "one" / "layers.png").stat().st_size
