import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualsft import DataAllocator, ParameterAllocator, SelectionModule, load_selection
from dualsft.allocators import ScoredExamples
from dualsft.errors import UserError
from dualsft.scorers import ParameterStatistics, Scorer
from dualsft.selection import Warmup
from dualsft.selection.dense_training import EPS
from tests.references import assert_same_gradients, slow_scores
from tests.world.damage import flipped
from tests.world.data import LINES, OK, write_jsonl
from tests.world.faults import InfiniteGradient
from tests.world.jobs import ADAM, SGD, Inputs, contents, select, write_inputs
from tests.world.models import save_tiny_model


def test_adam_scores_equal_the_loop_at_the_warmed_up_model(inputs: Inputs, tmp_path: Path) -> None:
    """With u = (η/n) v / (sqrt(ĉ)+eps), from the weights and second moment that the warm-up left in ``warmup/``."""
    options = {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3, keep=True), "step_size": 1e-3}
    selection = select(inputs, tmp_path / "out", options)
    checkpoint = tmp_path / "out" / "warmup"
    moments = load_file(checkpoint / "second_moment.safetensors")
    rows, weights = slow_scores(inputs, str(checkpoint), 1e-3, lambda name: 1 / (moments[name].double().sqrt() + EPS))
    scores = selection.examples["score"].to_pylist()
    assert {i: scores[i] for i in OK} == pytest.approx(rows, rel=1e-3, abs=1e-5 * max(map(abs, rows.values())))
    assert_same_gradients(selection.parameter_scores(), weights, 1e-4)


@pytest.mark.parametrize("preconditioner", ["adam", "none"])
def test_a_kept_warm_up_serves_as_a_checkpoint(inputs: Inputs, tmp_path: Path, preconditioner: Any) -> None:
    """Scoring at the kept checkpoint gives the very scores of the run that made it."""
    warmup = Warmup(fraction=0.5, learning_rate=1e-3, keep=True)
    first = select(inputs, tmp_path / "a", {"warmup": warmup, "preconditioner": preconditioner})
    given = Warmup(checkpoint=str(tmp_path / "a" / "warmup"))
    second = select(inputs, tmp_path / "b", {"warmup": given, "preconditioner": preconditioner})
    for name in ("examples.parquet", "parameter_scores.safetensors", "mask.safetensors", "selected.jsonl"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert first.manifest["model"] == second.manifest["model"]
    assert set(second.manifest["scoring_checkpoint"]) == {"fingerprint", "second_moment"}
    assert first.manifest["scoring_checkpoint"] is None
    assert [phase["name"] for phase in second.manifest["phases"]] == ["validation gradient", "scores"]


def test_a_flipped_bit_of_the_kept_second_moment_is_noticed(inputs: Inputs, tmp_path: Path) -> None:
    """It would be a wrong preconditioner; one without a checksum, as another tool writes it, is read."""
    select(inputs, tmp_path / "a", {"warmup": Warmup(fraction=0.5, learning_rate=1e-3, keep=True)})
    given = {"warmup": Warmup(checkpoint=str(tmp_path / "a" / "warmup"))}
    path = tmp_path / "a" / "warmup" / "second_moment.safetensors"
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, len(whole) // 2))
    with pytest.raises(
        UserError, match=r"second_moment\.safetensors is damaged \(it holds other bytes than were writt"
    ):
        select(inputs, tmp_path / "b", given)
    path.write_bytes(whole)
    save_file(load_file(path), path)
    select(inputs, tmp_path / "c", given)


def test_a_checkpoint_without_second_moment_serves_plain_gradients_alone(inputs: Inputs, tmp_path: Path) -> None:
    """Adam needs the file and says so; no preconditioner does without."""
    checkpoint = save_tiny_model(tmp_path / "checkpoint", seed=7)
    with pytest.raises(
        UserError, match=r"has no second_moment\.safetensors; make the checkpoint with model\.warmup\.keep"
    ):
        select(inputs, tmp_path / "a", {"warmup": Warmup(checkpoint=checkpoint)})
    options = {"warmup": Warmup(checkpoint=checkpoint), "preconditioner": "none", "step_size": 0.5}
    selection = select(inputs, tmp_path / "b", options)
    rows, _ = slow_scores(inputs, checkpoint, 0.5)
    scores = selection.examples["score"].to_pylist()
    assert {i: scores[i] for i in OK} == pytest.approx(rows, rel=1e-4, abs=1e-6 * max(map(abs, rows.values())))


def test_a_checkpoint_of_another_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """The scoring checkpoint must have the base model's weights by name and shape; so must the second moment."""
    untied = save_tiny_model(tmp_path / "untied", tied=False)
    options = {"warmup": Warmup(checkpoint=untied), "preconditioner": "none"}
    with pytest.raises(UserError, match="has other weights, by name or shape"):
        select(inputs, tmp_path / "out", options)
    checkpoint = Path(save_tiny_model(tmp_path / "checkpoint"))
    save_file({"model.norm.weight": torch.ones(3)}, checkpoint / "second_moment.safetensors")
    with pytest.raises(UserError, match="belongs to another model"):
        select(inputs, tmp_path / "out2", {"warmup": Warmup(checkpoint=str(checkpoint))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", "auto"),
        ("32-true", "bfloat16"),
        ("bf16-true", "auto"),
        ("32-true", "float64"),
        ("64-true", "auto"),
    ],
)
def test_precisions(inputs: Inputs, tmp_path: Path, precision: str, dtype: str) -> None:
    """In every precision the identity holds to its own tolerance, and the scores resemble those of float32."""
    plain = select(inputs, tmp_path / "plain", SGD)
    other = select(inputs, tmp_path / "other", {**SGD, "dtype": dtype}, precision=precision)
    scores = [torch.tensor([s.examples["score"].to_pylist()[i] for i in OK]) for s in (plain, other)]
    torch.testing.assert_close(*scores, rtol=0.1, atol=0.02 * float(scores[0].abs().max()))
    assert all(score.dtype == torch.float32 for score in other.parameter_scores().values())


def test_float16_is_refused(tmp_path: Path) -> None:
    """A float16 checkpoint is not scored in float16, where small scores become zero; nothing is left behind."""
    inputs = write_inputs(tmp_path, dtype=torch.float16)
    with pytest.raises(UserError, match=r"underflow in float16; set model\.dtype to float32 or bfloat16"):
        select(inputs, tmp_path / "out", SGD)
    assert not (tmp_path / "out").exists()
    assert select(inputs, tmp_path / "out", {**SGD, "dtype": "float32"}).manifest["model"]["dtype"] == "float32"


def test_gradient_checkpointing_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """With activations recomputed the artifact is the same."""
    plain = select(inputs, tmp_path / "plain", ADAM)
    recomputed = select(inputs, tmp_path / "recomputed", {**ADAM, "gradient_checkpointing": True})
    assert contents(plain.folder) == contents(recomputed.folder)


class Poisoned(SelectionModule):
    """The gradient is infinite on every text of at most this many tokens."""

    longest = 12

    def configure_model(self) -> None:
        """Put a trap behind the embedding."""
        super().configure_model()

        def trap(_: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            lengths = (args[0] != self.model.config.pad_token_id).sum(1)
            return InfiniteGradient.apply(output, (lengths <= self.longest)[:, None, None].expand_as(output))

        self.model.model.embed_tokens.register_forward_hook(trap)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selections meet examples whose gradient is not finite."""
    monkeypatch.setattr("tests.world.jobs.SelectionModule", Poisoned)


@pytest.mark.usefixtures("poisoned")
def test_nonfinite_examples_are_marked_and_not_selected(inputs: Inputs, tmp_path: Path) -> None:
    """Their status says so, they have no score, and the fraction is of what remains."""
    bad = [i for i, (ids, _) in inputs.examples("train").items() if len(ids) <= Poisoned.longest]
    assert 0 < len(bad) < len(OK)
    selection = select(inputs, tmp_path / "out", {**SGD, "data_budget": 1.0, "data_allocator": Favourite()})
    assert Favourite.budget == len(OK) - len(bad)
    table = selection.examples.to_pydict()
    assert [i for i, status in enumerate(table["status"]) if status == "nonfinite"] == bad
    assert selection.example_ids == [i for i, score in enumerate(table["score"]) if score is not None]
    assert set(selection.example_ids) == set(OK) - set(bad)
    assert selection.manifest["counts"]["examples"]["scored"] == len(OK) - len(bad)


@pytest.mark.usefixtures("poisoned")
def test_a_count_that_finite_examples_cannot_meet_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """A count is a promise; it is not lowered silently."""
    with pytest.raises(UserError, match=r"model\.data_budget is 8, but only \d examples have finite scores"):
        select(inputs, tmp_path / "out", {**SGD, "data_budget": 8})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("which", ["train", "validation"])
def test_nothing_finite_is_an_error(inputs: Inputs, tmp_path: Path, which: str) -> None:
    """Where no example of the pool, or of the validation set, is finite, nothing is selected."""
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "long", "response": "and " * 9}])
    short = write_jsonl(tmp_path / "short.jsonl", [{"prompt": "x", "response": "y"}])
    paths = {"train": long, "validation": long, which: short}
    kind = "example of data.train" if which == "train" else "validation example"
    with pytest.raises(UserError, match=f"No {kind} has a finite loss and gradient"):
        select(Inputs(inputs.model, **paths), tmp_path / "out", SGD)


@pytest.mark.usefixtures("poisoned")
def test_nonfinite_validation_examples_are_left_out(inputs: Inputs, tmp_path: Path) -> None:
    """The scores are those of the validation set without them."""
    lines = [
        '{"prompt": "What is 1 + 1?", "response": "2, of course, and never 3."}',
        '{"prompt": "", "response": "y"}',
    ]
    scores = []
    for count in (1, 2):
        path = write_jsonl(tmp_path / f"{count}.jsonl", lines[:count])
        found = select(replace(inputs, validation=path), tmp_path / f"out{count}", SGD)
        scores.append([score for score in found.examples["score"].to_pylist() if score is not None])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert any(scores[0])


class Favourite(DataAllocator):
    """Looks at everything it is given, and takes the examples with the longest prompts."""

    seen: ScoredExamples
    budget: int

    def allocate(self, examples: ScoredExamples, budget: int) -> torch.Tensor:
        """By length of prompt."""
        type(self).seen, type(self).budget = examples, budget
        lengths = torch.tensor([len(str(record["prompt"])) for record in examples.records])
        return examples.example_id[lengths.argsort(descending=True, stable=True)[:budget]].sort().values


class Backwards(Scorer):
    """The opposite of first order."""

    def direction(self, statistics: ParameterStatistics) -> torch.Tensor:
        """Minus v."""
        return -statistics.validation_gradient


def test_scorers_and_allocators_of_ones_own(inputs: Inputs, tmp_path: Path) -> None:
    """A scorer decides the scores and an allocator the choice, given scores, lengths and records of what is scored."""
    options = {**SGD, "scorer": Backwards(), "data_allocator": Favourite(), "data_budget": 3}
    selection = select(inputs, tmp_path / "out", options)
    records = [json.loads(LINES[i]) for i in OK]
    longest = sorted(range(len(OK)), key=lambda k: (-len(records[k]["prompt"]), k))[:3]
    assert selection.example_ids == sorted(OK[k] for k in longest)
    assert list(Favourite.seen.records) == records
    assert Favourite.seen.num_tokens.tolist() == [selection.examples["num_tokens"].to_pylist()[i] for i in OK]
    forwards = select(inputs, tmp_path / "forwards", {**SGD, "step_size": float(len(OK))})
    ours, theirs = (s.examples["score"].to_pylist() for s in (selection, forwards))
    assert [ours[i] for i in OK] == pytest.approx([-theirs[i] for i in OK], rel=1e-5)
    assert selection.manifest["scorer"]["class_path"] == "tests.selection.test_module.Backwards"


class Broken(Scorer):
    """Gives directions that cannot be used."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def direction(self, statistics: ParameterStatistics) -> torch.Tensor:
        """NaN, or of another shape."""
        v = statistics.validation_gradient
        return v / 0 if self.kind == "nan" else v.flatten()


@pytest.mark.parametrize("kind", ["nan", "flat"])
def test_a_broken_scorer_is_named(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    """A direction that is not finite, or not of the parameter's shape, is the scorer's mistake."""
    with pytest.raises(UserError, match=r"Broken gave model\.embed_tokens\.weight a direction"):
        select(inputs, tmp_path / "out", {**SGD, "scorer": Broken(kind)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_budget": 0}, "model.data_budget is 0"),
        ({"parameter_budget": 1.5}, "model.parameter_budget is 1.5"),
        ({"step_size": 0.0}, "model.step_size is 0.0"),
        ({"step_size": float("nan")}, "model.step_size is nan"),
        ({"warmup": Warmup(fraction=0.0)}, "model.preconditioner is adam, which needs .* a warm-up"),
    ],
)
def test_contradictions_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with key and value."""
    with pytest.raises(UserError, match=message):
        SelectionModule("nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_budget": 9}, "model.data_budget is 9, but there are only 8"),
        ({"parameter_budget": 10**9}, "model.parameter_budget is 1,000,000,000, but there are only"),
    ],
)
def test_a_mistake_leaves_no_folder_behind(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Budgets that the input cannot meet are refused before the output folder is made."""
    with pytest.raises(UserError, match=message):
        select(inputs, tmp_path / "out", {**SGD, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["train", "validation"])
def test_data_without_responses_is_refused(inputs: Inputs, tmp_path: Path, which: str) -> None:
    """If no row has a response to score by, the counts tell why, and no folder is made."""
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "response": ""}, {"prompt": "b", "response": ""}])
    with pytest.raises(UserError, match=rf"No example of data\.{which} has a response .*0 ok, 2 empty, 0 truncated"):
        select(replace(inputs, **{which: empty}), tmp_path / "out", SGD)
    assert not (tmp_path / "out").exists()


def test_the_model_module_is_fingerprinted_with_the_data_tokenizer(inputs: Inputs, tmp_path: Path) -> None:
    """The tokenizer in the manifest is the one that made the tokens."""
    other = save_tiny_model(tmp_path / "other", template="{{ messages }}")
    same = select(inputs, tmp_path / "a", SGD).manifest["tokenizer"]
    assert select(inputs, tmp_path / "b", SGD, data={"tokenizer": other}).manifest["tokenizer"] != same
    assert load_selection(tmp_path / "a").manifest["tokenizer"] == same


class _TooMany(DataAllocator):
    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        return examples.example_id[: budget + 1]


class _TwiceTheSame(DataAllocator):
    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        return examples.example_id[:1].expand(budget)


class _Nothing(ParameterAllocator):
    def allocate(self, scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}


@pytest.mark.parametrize(
    "option", [{"data_allocator": _TooMany()}, {"data_allocator": _TwiceTheSame()}, {"parameter_allocator": _Nothing()}]
)
def test_an_allocator_that_misses_its_budget_is_named(inputs: Inputs, tmp_path: Path, option: dict[str, Any]) -> None:
    """A plugin that does not choose exactly the budget is refused by name, and nothing is published."""
    (allocator,) = option.values()
    with pytest.raises(UserError, match=f"{type(allocator).__name__} chose"):
        select(inputs, tmp_path / "out", {**SGD, "data_budget": 2, **option})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]


def test_autocast_scores_the_warmed_up_weights(inputs: Inputs, tmp_path: Path) -> None:
    """Under bf16-mixed a warm-up sees its own steps: scoring at the kept checkpoint anew gives the very scores."""
    warmup = Warmup(fraction=1.0, epochs=3, learning_rate=1e-2, keep=True)
    first = select(inputs, tmp_path / "a", {"warmup": warmup}, precision="bf16-mixed")
    given = Warmup(checkpoint=str(tmp_path / "a" / "warmup"))
    second = select(inputs, tmp_path / "b", {"warmup": given}, precision="bf16-mixed")
    for name in ("examples.parquet", "parameter_scores.safetensors"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
