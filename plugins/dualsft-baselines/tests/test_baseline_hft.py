from collections import Counter

import pytest
import torch
from baseline_cases import chosen, is_mask_of
from dualsft_baselines import HalfFineTuning

from dualsft import ScoredParameters

LAYERS = 4
BLOCKS = {
    "self_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "norms": ["input_layernorm", "post_attention_layernorm"],
}
OUTSIDE = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,), "lm_head.weight": (10, 4)}


def llama() -> ScoredParameters:
    """The parameters of a Llama of four layers."""
    shapes: dict[str, tuple[int, ...]] = {**OUTSIDE}
    for layer in range(LAYERS):
        for names in BLOCKS.values():
            shapes |= {f"model.layers.{layer}.{n}.weight": (4,) if "norm" in n else (4, 4) for n in names}
    return ScoredParameters({name: torch.zeros(shape) for name, shape in shapes.items()})


HALF = LAYERS * (2 * 16 + 4) + LAYERS // 2 * 3 * 16
EMBEDDINGS = 10 * 4 * 2 + 4


def whole(scores: ScoredParameters, budget: int, seed: int) -> set[str]:
    """The parameters that are chosen whole."""
    return {name for name, part in HalfFineTuning(seed).allocate(scores, budget).items() if bool(part.all())}


@pytest.mark.parametrize("seed", range(5))
def test_half_of_each_block_is_the_papers(seed: int) -> None:
    """Half of each block of each layer, whole, and all else; of three there are two or one, equally often."""
    scores = llama()
    mask = HalfFineTuning(seed).allocate(scores, HALF + EMBEDDINGS)
    assert is_mask_of(mask, scores, HALF + EMBEDDINGS)
    assert all(bool(part.all()) or not bool(part.any()) for part in mask.values())
    trained = whole(scores, HALF + EMBEDDINGS, seed)
    assert trained >= OUTSIDE.keys()
    counts = {
        block: [sum(f"model.layers.{layer}.{n}.weight" in trained for n in names) for layer in range(LAYERS)]
        for block, names in BLOCKS.items()
    }
    assert counts["self_attn"] == [2] * LAYERS
    assert counts["norms"] == [1] * LAYERS
    assert sorted(counts["mlp"]) == [1, 1, 2, 2]


def test_any_budget_is_met_by_whole_parameters_but_one() -> None:
    """Exactly the budget, at most one parameter is trained in part, and a larger budget only adds."""
    scores = llama()
    total = sum(score.numel() for score in scores.values())
    previous: set[str] = set()
    for budget in [*range(1, total, 13), total]:
        mask = HalfFineTuning(3).allocate(scores, budget)
        assert is_mask_of(mask, scores, budget)
        in_part = [name for name, part in mask.items() if bool(part.any()) and not bool(part.all())]
        assert len(in_part) <= 1
        trained = whole(scores, budget, 3)
        assert trained >= previous
        previous = trained


def test_small_budgets_are_spread_over_layers_and_blocks() -> None:
    """At a quarter, every attention block has one matrix, and embeddings have nothing."""
    trained = whole(llama(), HALF // 2, seed=0)
    attention = Counter(name.split(".")[2] for name in trained if "self_attn" in name)
    assert all(attention[str(layer)] in (1, 2) for layer in range(LAYERS))
    assert not trained & OUTSIDE.keys()


def test_the_seed_decides() -> None:
    """The same seed gives the same mask, others give others, and each matrix has its chance; scores have no say."""
    scores = llama()
    other = ScoredParameters({name: torch.randn(score.shape) for name, score in reversed(list(scores.items()))})
    for seed in range(3):
        same = (chosen(HalfFineTuning(seed).allocate(s, HALF + 5)) for s in (scores, other))
        assert len({frozenset(choice) for choice in same}) == 1
    drawn = [whole(scores, HALF, seed) for seed in range(40)]
    times = Counter(name for trained in drawn for name in trained if ".layers." in name)
    assert len(times) == LAYERS * 9
    assert all(8 <= count <= 32 for count in times.values())


def test_architectures_with_other_names() -> None:
    """Names of GPT-2, and experts in one tensor, have layers and blocks too; biases are a block apart."""
    names = {
        "transformer.wte.weight": (9, 4),
        **{f"transformer.h.{k}.attn.c_attn.weight": (4, 4) for k in range(2)},
        **{f"transformer.h.{k}.attn.c_proj.weight": (4, 4) for k in range(2)},
        **{f"transformer.h.{k}.attn.c_attn.bias": (4,) for k in range(2)},
        **{f"transformer.h.{k}.attn.c_proj.bias": (4,) for k in range(2)},
        **{f"transformer.h.{k}.mlp.experts.up_proj": (2, 2, 4) for k in range(2)},
        **{f"transformer.h.{k}.mlp.experts.down_proj": (2, 4, 2) for k in range(2)},
    }
    scores = ScoredParameters({name: torch.zeros(shape) for name, shape in names.items()})
    trained = whole(scores, 2 * (16 + 4 + 16), seed=0)
    for k in range(2):
        of_layer = [name for name in trained if f".h.{k}." in name]
        assert Counter(name.split(".")[3] + name[-4:] for name in of_layer) == Counter(
            {"attnight": 1, "attnbias": 1, "mlpproj": 1}
        )
    assert "transformer.wte.weight" not in trained
