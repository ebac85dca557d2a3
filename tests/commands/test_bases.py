"""Bases that users have: refused in one sentence before work starts, or right, with every verb."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.selection import load_selection
from tests.world.data import sums, write_jsonl
from tests.world.jobs import QUIET
from tests.world.models import VOCABULARY, tiny_llama, tiny_tokenizer

_SIZES: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2}


def bert() -> PreTrainedModel:
    """A masked model."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, intermediate_size=16, **sizes))


def few_positions() -> PreTrainedModel:
    """A GPT-2 of 20 positions."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=20, **_SIZES))


def small_vocabulary() -> PreTrainedModel:
    """A model of fewer tokens than its tokenizer's."""
    return tiny_llama(vocab_size=40, pad_token_id=None)


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bert": (bert, "is not a causal language model: its first token sees the tokens behind it"),
    "few positions": (
        few_positions,
        r"has an example of \d+ tokens, but the model has 20 positions; set data\.max_length",
    ),
    "small vocabulary": (small_vocabulary, "the model's vocabulary has 40 tokens"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options of a pool and a validation set."""
    folder = tmp_path_factory.mktemp("data")
    train, validation = write_jsonl(folder / "pool.jsonl", sums(8)), write_jsonl(folder / "new.jsonl", sums(3))
    return {"--data.train": train, "--data.validation": validation}


def save_base(path: Path, model: PreTrainedModel) -> str:
    """Writes the folder of a base whose configuration names no class."""
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def arguments(verb: str, base: str, inputs: dict[str, str], folder: Path) -> list[str]:
    """The command line of a verb."""
    own = {"fit": ["--trainer.max_epochs", "1", "--model.samples.number", "2"]}.get(verb, [])
    options = {"--model.model_name_or_path": base, **inputs, "--output_dir": str(folder)}
    return [verb, *(part for pair in options.items() for part in pair), *QUIET, *own]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", ["select", "fit", "validate"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_does_not_do_is_refused(tmp_path: Path, inputs: dict[str, str], verb: str, kind: str) -> None:
    """With every verb, in one sentence, and no folder is left behind."""
    making, sentence = REFUSED[kind]
    base = save_base(tmp_path / "base", making())
    with pytest.raises(UserError, match=sentence):
        run(arguments(verb, base, inputs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", ["select", "validate"])
def test_a_configuration_is_refused_as_one(tmp_path: Path, inputs: dict[str, str], verb: str) -> None:
    """And not as the fault of the tokenizer, whose loader reads it too."""
    config = Path(save_base(tmp_path / "base", tiny_llama()), "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": "two"}))
    with pytest.raises(UserError, match=r"base cannot be loaded as a causal language model:.*expected int, got str"):
        run(arguments(verb, str(config.parent), inputs, tmp_path / "out"))


def padded_base(path: Path, pad_is_known: bool) -> str:
    """A base whose tokenizer pads with a token of its vocabulary, or with one behind the model's embedding."""
    base = save_base(path, tiny_llama(pad_token_id=None))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>" if pad_is_known else "<beyond>"})
    tokenizer.save_pretrained(path)
    assert (tokenizer.pad_token_id < VOCABULARY) == pad_is_known
    return base


@pytest.mark.slow
def test_padding_needs_no_embedding(tmp_path: Path, inputs: dict[str, str]) -> None:
    """Scores, choice and trained weights are those of padding with a known token; answers are generated too."""
    found = []
    for known in (True, False):
        folder = tmp_path / str(known)
        base = padded_base(folder / "base", known)
        for verb in ("select", "fit", "validate"):
            more = ["--model.generation.max_new_tokens", "4"] if verb == "validate" else []
            run([*arguments(verb, base, inputs, folder / verb), *more])
        scores = load_selection(folder / "select").examples["score"].to_pylist()
        metrics = json.loads((folder / "validate" / "metrics.json").read_text())
        found.append((scores, metrics, (folder / "fit" / "model" / "model.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore")
def test_answers_need_positions_too(tmp_path: Path, inputs: dict[str, str]) -> None:
    """A prompt and its answer must have positions; samples of a fit are as long as there is room."""
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=48, **_SIZES)))
    validate = arguments("validate", base, inputs, tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.validation has a prompt of \d+ tokens, which with an answer of 45"):
        run([*validate, "--model.generation.max_new_tokens", "45"])
    assert not (tmp_path / "out").exists()
    run([*validate, "--model.generation.max_new_tokens", "5"])
    run(arguments("fit", base, inputs, tmp_path / "fit"))
    assert (tmp_path / "fit" / "logs" / "samples.jsonl").is_file()


def test_a_fit_sees_that_the_base_has_changed(
    tmp_path: Path, inputs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, chat template and vocabulary are as much a part of what was scored as the weights are."""
    base = Path(save_base(tmp_path / "base", tiny_llama()))
    run(arguments("select", str(base), inputs, tmp_path / "selection"))
    fit = [*arguments("fit", str(base), inputs, tmp_path / "fit"), "--model.selection", str(tmp_path / "selection")]
    kept = {path: path.read_text(encoding="utf-8") for path in base.glob("*.json")}

    def changed(file: str, old: str, new: str) -> None:
        assert old in kept[base / file]
        (base / file).write_text(kept[base / file].replace(old, new), encoding="utf-8")

    changed("config.json", '"rope_theta": 10000.0', '"rope_theta": 500000.0')
    with pytest.raises(UserError, match=r"other settings in the config\.json .*rope_theta\); restore"):
        run(fit)
    changed("config.json", '"use_cache": true', '"use_cache": false')
    changed("tokenizer.json", '"<eos>"', '"<end>"')
    (base / "tokenizer_config.json").write_text(kept[base / "tokenizer_config.json"].replace("<eos>", "<end>"))
    with pytest.raises(UserError, match="made with another tokenizer or chat template"):
        run(fit)
    for path, text in kept.items():
        path.write_text(text, encoding="utf-8")
    changed("tokenizer_config.json", '"eos_token": "<eos>"', '"eos_token": "<bos>"')
    with pytest.raises(UserError, match=r"made with another eos_token \(<eos>\) than .* has now \(<bos>\); restore it"):
        run(fit)
    (base / "tokenizer_config.json").write_text(kept[base / "tokenizer_config.json"])
    (base / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="made with another tokenizer or chat template"):
        run(fit)
    assert not (tmp_path / "fit").exists()
    (base / "chat_template.jinja").unlink()
    run(fit)
    assert (tmp_path / "fit" / "delta.safetensors").is_file()
    assert "scored as read" not in capsys.readouterr().err
    # what is the user's to change is told
    run([*fit, "--data.prompt_template", "Q: {prompt}", "--overwrite"])
    told = r"data.prompt_template '{prompt}\n', now 'Q: {prompt}'; they are trained on as read now."
    assert told in capsys.readouterr().err
