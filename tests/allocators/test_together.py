"""Ranks that choose weights together, each in its own part of every tensor, choose what one process does."""

import pytest
import torch
from torch import Tensor

from dualsft.allocators import GlobalTopK, LayerQuota, ParameterAllocator, Proportional, UniformPerLayer
from dualsft.allocators.base import ScoredParameters
from dualsft.allocators.choice import own_part
from dualsft.selection.mask import own_entries
from dualsft.sharding.groups import job_group
from tests.allocators.cases import random_scores
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

SHAPES = {
    "model.layers.0.q_proj.weight": (12, 15),
    "model.layers.1.q_proj.weight": (15, 12),
    "model.layers.1.up_proj.weight": (7, 40),
    "model.norm.weight": (7,),
    "model.scale": (),
    "none": (0, 3),
}
ALLOCATORS: list[ParameterAllocator] = [
    GlobalTopK(),
    GlobalTopK("signed", reverse=True),
    LayerQuota(),
    UniformPerLayer(by="signed"),
    Proportional(),
]
Masks = list[dict[str, Tensor]]


def all_scores() -> list[dict[str, Tensor]]:
    """Scores without ties, with many, and all the same."""
    scores = random_scores(0, SHAPES)
    few = {name: (4 * score).round() / 4 for name, score in scores.items()}
    return [scores, few, {name: torch.zeros_like(score) for name, score in scores.items()}]


def chosen(together: bool) -> Masks:
    """What each rule chooses by each of these scores, for several budgets; of ranks their own parts alone."""
    group = job_group() if together else None
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for module in ("choice", "proportional"):
            patch.setattr(f"dualsft.allocators.{module}.BLOCK", 16)
        patch.setattr("dualsft.allocators.choice.sampling_stride", lambda entries: 3)
        for scores in all_scores():
            total = sum(score.numel() for score in scores.values())
            for allocator in ALLOCATORS:
                for budget in (1, total // 10, total // 2, total - 1):
                    masks = allocator.allocate(ScoredParameters(scores, None, group), budget)
                    assert all(masks[name].shape == score.shape for name, score in scores.items())
                    found.append({name: own_entries(mask, group) for name, mask in masks.items()})
    return found


@pytest.mark.parametrize("count", [2, 5])
def test_the_parts_of_ranks_are_the_choice_of_one(count: int) -> None:
    """Ties go to the first name and place, whoever has them; a tensor may have fewer blocks than there are ranks."""
    parts, expected = run_on_ranks(count, chosen, True), chosen(together=False)
    assert len(expected) == 60
    for k, masks in enumerate(expected):
        for name, mask in masks.items():
            assert torch.equal(torch.cat([of_rank[k][name] for of_rank in parts]), mask), (k, name)


def divided(entries: int) -> slice:
    """This rank's part of a tensor."""
    return own_part(entries, job_group())


@pytest.mark.parametrize("entries", [0, 1, 2**17, 2**17 + 1, 5 * 2**17 - 3])
def test_parts_are_whole_bytes_of_bits(entries: int) -> None:
    """They follow each other without gaps, so that the bits of each are packed by itself."""
    end = 0
    for part in run_on_ranks(3, divided, entries):
        assert part.start == end
        assert part.start % 8 == 0 or part.start == part.stop
        end = part.stop
    assert end == entries


def refused(scores: dict[str, Tensor]) -> str:
    """What scores that cannot be ranked are refused with; the sample has none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualsft.allocators.choice.BLOCK", 16)
        patch.setattr("dualsft.allocators.choice.sampling_stride", lambda entries: 31)
        with pytest.raises(ValueError, match="NaN") as error:
            GlobalTopK().allocate(ScoredParameters(scores, None, job_group()), 9)
    return str(error.value)


def test_a_score_that_is_not_a_number_is_refused_by_all() -> None:
    """Whichever rank has it, so that none waits for another."""
    scores = torch.arange(96.0)
    scores[-1] = torch.nan
    assert len(set(run_on_ranks(3, refused, {"w": scores}))) == 1
