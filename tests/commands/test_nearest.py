"""The advice on a mistyped key."""

import pytest

from dualsft.commands.keys import keys_of
from dualsft.commands.nearest import nearest
from dualsft.commands.parsing import parser_of

MISTYPED = {
    ("select", "model.data_budgt"): ["model.data_budget"],
    ("select", "mdel.data_budget"): ["model.data_budget"],
    ("select", "data_budget"): ["model.data_budget"],
    ("select", "data-budget"): ["model.data_budget"],
    ("select", "model.warmup.lr"): ["model.warmup.learning_rate"],
    ("select", "lr"): ["model.path.learning_rate", "model.warmup.learning_rate"],
    ("fit", "lr"): ["optimizer.lr"],
    ("fit", "num_train_epochs"): ["trainer.max_epochs"],
    ("fit", "optimizr"): ["optimizer"],
    ("fit", "train_file"): ["data.train"],
    ("fit", "xyzzy"): [],
}


@pytest.mark.parametrize(("verb", "key"), MISTYPED)
def test_the_nearest_key(verb: str, key: str) -> None:
    """By spelling, by the last name alone, and by what other trainers call it; nothing where nothing is near."""
    assert nearest(key, keys_of(parser_of(verb))) == MISTYPED[verb, key]
