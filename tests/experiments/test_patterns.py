"""Densities by layer and kind of module, and their tables."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dualsft.experiments.grid import Budgets
from dualsft.experiments.patterns import Chosen, densities, density_rows

SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (5, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.10.self_attn.q_proj.weight": (4, 4),
}


def random_masks(seed: int, density: float = 0.4) -> dict[str, Tensor]:
    """A mask of the model with these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def choice(method: str, seed: int, mask: dict[str, Tensor], **changes: object) -> Chosen:
    """What a method chose: a quarter of 20 examples, and this mask."""
    usual = {"budgets": Budgets(5, 0.4), "examples": frozenset(range(5)), "pool": 20}
    return Chosen(**{"method": method, "seed": seed, "mask": mask, **usual, **changes})  # type: ignore[arg-type]


def test_densities_are_those_of_a_loop() -> None:
    """Each figure is the share of chosen weights among all of the layer's modules of the kind; means are over seeds."""
    masks = [random_masks(seed) for seed in (0, 1)]
    (table,) = densities(density_rows([choice("both", seed, mask) for seed, mask in enumerate(masks)]))
    assert (table.title, table.layers, table.kinds) == ("both", ["0", "10", "outside"], ["q", "up", "other", "all"])
    names = {("0", "q"): ["model.layers.0.self_attn.q_proj.weight"], ("outside", "all"): ["model.embed_tokens.weight"]}
    names["0", "all"] = [name for name in SHAPES if "layers.0." in name]
    for (layer, kind), own in names.items():
        expected = [torch.cat([mask[name].flatten() for name in own]).double().mean() for mask in masks]
        found = table.values[table.layers.index(layer), table.kinds.index(kind)]
        assert found == pytest.approx(float(sum(expected)) / 2)
    assert np.isnan(table.values[1, 1])  # layer 10 has no up projection
    assert table.markdown().splitlines()[3].split()[5] == "-"


def test_one_table_for_each_method_and_budget() -> None:
    """Budgets are named where a method has several; a method that trains all weights has no pattern."""
    given = [(0.4, "both"), (12, "both"), (0.4, "other"), (None, "data only")]
    rows = density_rows([choice(method, 0, random_masks(0), budgets=Budgets(5, share)) for share, method in given])
    assert [table.title for table in densities(rows)] == ["both (40%)", "both (12)", "other"]
