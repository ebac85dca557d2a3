"""Keys that no command knows, on command lines and in configurations."""

from argparse import ArgumentError
from pathlib import Path

import pytest
import yaml

from dualsft.commands.parsing import parser_of, plain_values, prepare, replay_of

REFUSED = {
    "--model.data_budgt=5": "dualsft select has no option --model.data_budgt; did you mean --model.data_budget?",
    "--optimizer.lr": "dualsft select has no option --optimizer.lr; it is one of fit and audit.",
    "--xyzzy": "dualsft select has no option --xyzzy; `dualsft select --help` shows those it has.",
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_unknown_option_is_refused_with_advice(option: str) -> None:
    """The nearest option, the commands that have it, or where to look."""
    with pytest.raises(ArgumentError) as refusal:
        prepare([option, "5"], "select", parser_of("select"))
    assert str(refusal.value) == REFUSED[option]


@pytest.mark.parametrize(
    "option",
    ["--model.scorer.method", "--data.validation.name", "--trainer.callbacks.monitor", "--model.frozen+", "--seed"],
)
def test_options_that_only_a_class_knows_pass(option: str) -> None:
    """As do names of validation sets, additions to lists, beginnings of one option alone, and values with hyphens."""
    assert prepare([option, "--- x"], "select", parser_of("select"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model": {"warmup": {"lr": 1.0}}}, "model.warmup.lr, which no command knows; did you mean model.warmup.lea"),
        ({"model.data_budgt": 5}, "the key model.data_budgt, which no command knows; did you mean model.data_budget?"),
        ({"modl": {"data_budget": 5}}, "the key modl, which no command knows; did you mean model?"),
        ({"optimiser": {"class_path": "SGD"}}, "the key optimiser, which no command knows; did you mean optimizer?"),
        ({"trainr": {}}, "the key trainr, which no command knows; did you mean trainer?"),
    ],
)
def test_an_unknown_key_of_a_configuration_is_refused_with_advice(config: object, told: str, tmp_path: Path) -> None:
    """However deep it is, before the parser misses what is required, and where it is another verb's that is meant."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ArgumentError) as refusal:
        prepare(["--config", str(tmp_path / "job.yaml")], "select", parser_of("select"))
    assert told in str(refusal.value)


@pytest.mark.parametrize("value", [0.3, None, [0.3], "prior.yaml"])
@pytest.mark.parametrize("key", ["model.training_prior", "trainer"])
def test_a_value_where_keys_are_due(key: str, value: object, tmp_path: Path) -> None:
    """It is refused by the key, dotted or not: the parser would fail in words of its own, or take a name for a file."""
    section, _, name = key.partition(".")
    for number, config in enumerate(({key: value}, {section: {name: value} if name else value})):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(
            ArgumentError, match=f"gives {key} no keys and values of its own; `dualsft fit --print_conf"
        ):
            prepare(["--config", str(path)], "fit", parser_of("fit"))


def test_a_file_for_a_section_on_the_command_line(tmp_path: Path) -> None:
    """Its keys are taken, and of its own path, which neither YAML nor JSON would hold, nothing is left."""
    (tmp_path / "prior.yaml").write_text("weight: 0.25", encoding="utf-8")
    options = {
        "--model.model_name_or_path": "m",
        "--data.train": "t",
        "--output_dir": "o",
        "--model.training_prior": str(tmp_path / "prior.yaml"),
    }
    parsed = parser_of("fit").parse_args([part for pair in options.items() for part in pair])
    assert "weight: 0.25" in replay_of(parser_of("fit"), parsed)
    assert "__path__" not in plain_values(parsed.model.training_prior)
