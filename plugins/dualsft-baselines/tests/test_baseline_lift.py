import pytest
import torch
from baseline_cases import chosen, is_mask_of, parameters
from dualsft_baselines import Lift
from dualsft_baselines.lift import low_rank, proportional
from torch import Tensor

from dualsft import UserError


def model_weights() -> dict[str, Tensor]:
    """Two layers with matrices of several shapes and a stack of experts, and what is not of their matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (9, 4),
        "model.layers.0.self_attn.q_proj.weight": (6, 4),
        "model.layers.0.norm.weight": (4,),
        "model.layers.1.self_attn.q_proj.weight": (4, 6),
        "model.layers.1.mlp.experts.down_proj": (3, 4, 5),
        "model.norm.weight": (4,),
    }
    return {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}


def slowly_reduced(matrix: Tensor, rank: int) -> Tensor:
    """W_r by its definition, one singular triple after another, from the eigenvectors of WᵀW."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = [vectors[:, k] for k in values.argsort(descending=True)[:rank]]
    return sum((torch.outer(matrix @ v, v) for v in kept), torch.zeros_like(matrix))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_low_rank(shape: tuple[int, int]) -> None:
    """It is the sum of the first singular triples; from full rank on it is the matrix itself."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rank in (1, 2, 3):
        torch.testing.assert_close(low_rank(matrix, rank), slowly_reduced(matrix, rank), rtol=1e-9, atol=1e-9)
    for rank in (5, 100):
        torch.testing.assert_close(low_rank(matrix, rank), matrix, rtol=1e-9, atol=1e-9)


def test_proportional() -> None:
    """Whole shares add up to the total, are none above its size, and within one of what is due."""
    for sizes in ([24, 24, 60], [1], [7, 1, 1, 1], [5, 5, 5]):
        for total in range(sum(sizes) + 1):
            shares = proportional(total, sizes)
            assert sum(shares) == total
            for share, size in zip(shares, sizes, strict=True):
                assert 0 <= share <= size
                assert abs(share - total * size / sum(sizes)) < 1
    assert proportional(2, [5, 5, 5]) == [1, 1, 0]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 20, 54, 107])
def test_the_choice_equals_a_direct_computation(rank: int, budget: int) -> None:
    """Each matrix of the layers, each expert of its own, has its share of the largest entries of its W_r."""
    weights = model_weights()
    scores = parameters(weights)
    mask = Lift(rank).allocate(scores, budget)
    assert is_mask_of(mask, scores, budget)
    for name, weight in weights.items():
        in_layers = ".layers." in name and weight.dim() > 1
        assert abs(int(mask[name].sum()) - (budget * weight.numel() / 108 if in_layers else 0)) < 1
        if not in_layers:
            continue
        matrices, masks = (weight, mask[name]) if weight.dim() == 3 else (weight[None], mask[name][None])
        for matrix, its_mask in zip(matrices, masks, strict=True):
            count = int(its_mask.sum())
            assert abs(count - int(mask[name].sum()) / len(matrices)) < 1
            largest = slowly_reduced(matrix, rank).abs().flatten().argsort(descending=True)[:count]
            assert set(its_mask.flatten().nonzero().flatten().tolist()) == set(largest.tolist())


def test_what_the_matrices_cannot_hold_goes_to_the_other_weights() -> None:
    """Beyond the layers' 108 entries, the largest of embeddings and norms."""
    weights = model_weights()
    mask = Lift().allocate(parameters(weights), 113)
    others = [(-abs(float(w)), n, k) for n, t in weights.items() for k, w in enumerate(t.flatten()) if ".1." not in n]
    others = [entry for entry in others if "q_proj" not in entry[1]]
    inside = {(n, k) for n, t in weights.items() for k in range(t.numel()) if t.dim() > 1 and ".layers." in n}
    assert chosen(mask) == inside | {(name, k) for _, name, k in sorted(others)[:5]}
    everything = Lift().allocate(parameters(weights), 152)
    assert all(bool(part.all()) for part in everything.values())


def test_low_precision_is_reduced_in_float32() -> None:
    """Weights in bfloat16 are chosen as their float32 copies are."""
    weights = {name: weight.bfloat16() for name, weight in model_weights().items()}
    copies = {name: weight.float() for name, weight in weights.items()}
    assert chosen(Lift(2).allocate(parameters(weights), 30)) == chosen(Lift(2).allocate(parameters(copies), 30))


def test_a_rank_below_one_is_refused() -> None:
    """With the value."""
    with pytest.raises(UserError, match=r"lift's rank is 0; give at least 1"):
        Lift(0)
