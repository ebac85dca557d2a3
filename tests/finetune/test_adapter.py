"""Adapters of PEFT under a budget."""

import pytest

from dualsft.errors import UserError
from dualsft.finetune.adapter import Adapter, with_rank
from dualsft.models.loading import load_model
from tests.world.models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model")


def size(model: str, config: dict[str, object]) -> int:
    """How many weights an adapter on the loaded model trains."""
    adapted = Adapter(config, seed=0).put_on(load_model(model))
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", ["LORA", "SHIRA"])
@pytest.mark.parametrize("budget", [1, 1500, 2500])
def test_rank_is_the_nearest(kind: str, budget: int, model: str) -> None:
    """No other rank trains a number of weights that is nearer to the budget."""
    config = with_rank({"peft_type": kind}, model, budget, seed=0)
    distance = {rank: abs(size(model, {**config, "r": rank}) - budget) for rank in range(1, config["r"] + 3)}
    assert distance[config["r"]] == min(distance.values())


def test_what_is_given_stays(model: str) -> None:
    """A rank and modules of one's own are kept, and an adapter without a rank needs none."""
    given = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    assert with_rank(given, model, 10**6, seed=0).items() >= given.items()
    assert "r" not in with_rank({"peft_type": "IA3"}, model, 10, seed=0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "peft_type is None; give one of"),
        ({"peft_type": "LORA", "target_modules": ["nosuch"]}, "PEFT refuses this LORA adapter: .*nosuch"),
        ({"peft_type": "SHIRA", "r": 10**6}, "PEFT refuses this SHIRA adapter"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "PROMPT_TUNING cannot be merged"),
    ],
)
def test_refusals(config: dict[str, object], told: str, model: str) -> None:
    """What PEFT does not take, or cannot merge, ends in one sentence before anything is trained."""
    with pytest.raises(UserError, match=told):
        with_rank(config, model, 1000, seed=0)


def test_seeds_decide(model: str) -> None:
    """The same seed starts the same adapter, whatever was drawn before, and another one another."""
    config = with_rank({"peft_type": "LORA"}, model, 1000, seed=0)
    starts = [Adapter(config, seed).put_on(load_model(model)).state_dict() for seed in (0, 0, 1)]
    same, other = ([(starts[0][name] == of[name]).all() for name in starts[0]] for of in starts[1:])
    assert all(same)
    assert not all(other)
