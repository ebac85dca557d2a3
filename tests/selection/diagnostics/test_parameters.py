import pytest
import torch
from torch import Tensor

from dualsft.allocators.groups import kind_of, layer_of
from dualsft.selection.diagnostics import ALL, by_place
from dualsft.selection.diagnostics.parameters import SCHEMA, parameter_figures, parameter_table, tensors_of

NAMES = ("model.embed_tokens.weight", *(f"model.layers.{k}.{m}.weight" for k in (0, 10) for m in ("q_proj", "up_proj")))


@pytest.fixture
def scores() -> dict[str, Tensor]:
    """Scores of tensors inside and outside of layers; one has no weight at all."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(6, 7, generator=generator) * 10**k for k, name in enumerate(NAMES)}
    return {**made, "model.layers.10.empty.weight": torch.zeros(0)}


@pytest.fixture
def masks(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random masks, none of the first tensor."""
    generator = torch.Generator().manual_seed(1)
    made = {name: torch.rand(score.shape, generator=generator) < 0.3 for name, score in scores.items()}
    return {**made, NAMES[0]: torch.zeros(6, 7, dtype=torch.bool)}


def test_each_tensor_has_its_row(scores: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Size, choice and sums are those of the tensor in float64; layer and kind are read from its name."""
    rows = parameter_table(parameter_figures(masks, scores)[0]).to_pylist()
    assert [row["name"] for row in rows] == sorted(scores)
    for row in rows:
        score, mask = scores[row["name"]].double(), masks[row["name"]]
        layer = layer_of(row["name"])
        assert (row["layer"], row["kind"]) == (layer and layer[1], kind_of(row["name"]))
        assert (row["size"], row["selected"]) == (score.numel(), int(mask.sum()))
        assert row["score_sum"] == pytest.approx(float(score.sum()), rel=1e-12)
        assert row["selected_score_sum"] == pytest.approx(float(score[mask].sum()), rel=1e-12)
        assert row["magnitude_sum"] == pytest.approx(float(score.abs().sum()), rel=1e-12)
        if score.numel():
            assert row["positive_share"] == pytest.approx(float((score > 0).double().mean()))
            assert (row["score_q00"], row["score_q100"]) == (float(score.min()), float(score.max()))


def test_all_together_are_the_tensors_joined(
    scores: dict[str, Tensor], masks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the whole network, also where tensors are looked at in small chunks."""
    monkeypatch.setattr("dualsft.selection.diagnostics.parameters.CHUNK", 5)
    _, found = parameter_figures(masks, scores)
    flat = torch.cat([scores[name].flatten().double() for name in sorted(scores)])
    chosen = torch.cat([masks[name].flatten() for name in sorted(scores)])
    assert found is not None
    assert (found.scored, found.selected) == (len(flat), int(chosen.sum()))
    assert found.selected_positive == int((flat[chosen] > 0).sum())
    assert found.score_sum == pytest.approx(float(flat.sum()))
    assert found.captured == pytest.approx(float(flat[chosen].clamp(min=0).sum() / flat.clamp(min=0).sum()))


def test_without_scores_the_choice_is_counted(masks: dict[str, Tensor]) -> None:
    """A control has masks alone: the columns of the scores are null."""
    tensors, together = parameter_figures(masks, {})
    table = parameter_table(tensors)
    assert together is None
    assert table["selected"].to_pylist() == [int(masks[name].sum()) for name in sorted(masks)]
    assert all(table[name].null_count == len(table) for name in SCHEMA.names if "score" in name)


def test_the_table_gives_the_tensors_back(scores: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """With and without scores."""
    for known in (scores, {}):
        tensors, _ = parameter_figures(masks, known)
        assert tensors_of(parameter_table(tensors)) == tensors


def test_places_add_up(scores: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Layers in order of their numbers, those outside of all last; a layer's kinds add up to its whole."""
    tensors, _ = parameter_figures(masks, scores)
    places = by_place(tensors)
    assert [(of.layer, of.kind) for of in places] == [
        *[(0, kind) for kind in ("q", "up", ALL)],
        *[(10, kind) for kind in ("q", "up", "other", ALL)],
        *[(None, kind) for kind in ("other", ALL)],
    ]
    for layer in (0, 10, None):
        *kinds, whole = (of for of in places if of.layer == layer)
        assert (whole.size, whole.selected) == (sum(of.size for of in kinds), sum(of.selected for of in kinds))
        assert whole.score_sum == pytest.approx(sum(of.score_sum or 0 for of in kinds))
    assert sum(of.size for of in places if of.kind == ALL) == sum(score.numel() for score in scores.values())
