import math

import pytest
import torch

from dualsft.objectives import example_losses, token_losses
from tests.cases import collate, make, make_examples


def test_token_losses_equal_log_softmax_at_the_next_token() -> None:
    """Each supervised position has minus the log-probability of its successor, every other position 0."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([[-100, 3, -100, 1], [0, 1, 2, -100]])
    found, targets = token_losses(logits, labels)
    assert targets.tolist() == [[3, -100, 1], [1, 2, -100]]
    for b, t in ((0, 0), (0, 2), (1, 0), (1, 1)):
        probability = logits[b, t].exp()[labels[b, t + 1]] / logits[b, t].exp().sum()
        assert found[b, t].item() == pytest.approx(-math.log(probability), rel=1e-12)
    assert found[0, 1] == found[1, 2] == 0


def test_token_losses_of_bfloat16_logits_are_float32() -> None:
    """Half-precision logits are widened first: the loss is that of the same logits in float32."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 7, dtype=torch.bfloat16), torch.tensor([[1, 2, 3]])
    found, _ = token_losses(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_losses(logits.float(), labels)[0], rtol=0, atol=0)


def test_example_losses_are_means_over_supervised_tokens() -> None:
    """l_i is the mean over the example's own supervised tokens, whatever it is padded to; 0 without any."""
    model, examples = make("gpt2"), make_examples()
    ids = examples[0][0]
    examples.append((ids, [-100] * len(ids)))
    found = example_losses(model, collate(examples))
    for (tokens, labels), loss in zip(examples[:-1], found.tolist(), strict=False):
        scores = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        nll = [-scores[t, label].item() for t, label in enumerate(labels[1:]) if label != -100]
        assert loss == pytest.approx(sum(nll) / len(nll), rel=1e-12)
    assert found[-1] == 0
