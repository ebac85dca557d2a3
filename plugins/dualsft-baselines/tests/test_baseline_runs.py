"""Every name of the package, as in its README, through `dualsft select`: budgets, and choices by plain autograd."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from baseline_cases import OK, RESPONSES, Job, chosen, differentiate, flat, is_mask_of
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from dualsft import load_selection
from dualsft.cli import run

EXAMPLES, WEIGHTS = 3, 777
NAMES = {(point.group, point.name) for point in distribution("dualsft-baselines").entry_points}
BUDGETS = ["--model.data_budget", str(EXAMPLES), "--model.parameter_budget", str(WEIGHTS)]
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(\w+)` \|.*\| `(dualsft\.\w+)` \|.*\| `(--.*)` \|$", README, re.MULTILINE)


@dataclass(frozen=True)
class Direct:
    """What there is to know at a scoring checkpoint, in float64.

    Attributes:
        weights: Parameter name -> θ.
        loss: l_i of the examples that can be trained on.
        gradients: g_i, (example, weight), weights in the order of the names.
        validation: v, (weight).
    """

    weights: dict[str, Tensor]
    loss: Tensor
    gradients: Tensor
    validation: Tensor

    @classmethod
    def at(cls, checkpoint: str, job: Job) -> "Direct":
        """Differentiate one example at a time."""
        model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
        loss, gradients = differentiate(model, job.train)
        _, of_validation = differentiate(model, job.validation)
        return cls({n: w.detach() for n, w in model.named_parameters()}, loss, gradients, of_validation.mean(0))


@pytest.fixture(scope="module")
def direct(job: Job) -> Direct:
    """At the base model."""
    return Direct.at(job.model, job)


def top(values: Tensor, count: int = EXAMPLES) -> list[int]:
    """The ids of the largest values, of the examples that can be trained on."""
    return sorted(OK[k] for k in values.argsort(descending=True)[:count].tolist())


def test_what_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    """`dualsft plugins` lists every name of the package with its description, and none cannot be used."""
    run(["plugins"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "dualsft-baselines 0.1.0" in line]
    assert {line.split()[0] for line in lines} == {name for _, name in NAMES}
    assert len(lines) == len(NAMES) == 10
    assert not any("cannot be used" in line for line in lines)
    assert all(line.rstrip().endswith(".") for line in lines)


def test_the_readme_has_every_name() -> None:
    """With the group that it is registered in."""
    assert {(group, name) for name, group, _ in TABLE} == NAMES
    assert len(TABLE) == len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [(name, options.split()) for name, _, options in TABLE])
def test_exact_budgets(job: Job, tmp_path: Path, name: str, options: list[str]) -> None:
    """With the options of the README's table, each chooses as many examples and weights as are due."""
    assert name in options
    warmup = ["--model.warmup.fraction", "0.5"] if "adam" in options else []
    selection = load_selection(job.select(tmp_path / "out", *options, *warmup, *BUDGETS))
    assert len(selection.example_ids) == EXAMPLES
    assert set(selection.example_ids) <= set(OK)
    assert is_mask_of(selection.mask(), selection.parameter_scores(), WEIGHTS)


Values = Callable[[Direct], Tensor]
BY_EXAMPLE: dict[str, tuple[list[str], Values]] = {
    "gradient_norm": ([], lambda d: d.gradients.norm(dim=1)),
    "gradient_norm, reversed": (["--model.data_allocator.reverse", "true"], lambda d: -d.gradients.norm(dim=1)),
    "loss, highest": (["--model.data_allocator.keep", "highest"], lambda d: d.loss),
    "loss, lowest": (["--model.data_allocator.keep", "lowest"], lambda d: -d.loss),
    "loss, middle": ([], lambda d: -(d.loss.argsort().argsort() - len(OK) // 2).abs().double()),
    "less": ([], lambda d: F.cosine_similarity(d.gradients, d.validation[None], dim=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_EXAMPLE)
def test_examples_are_those_of_a_direct_computation(job: Job, direct: Direct, tmp_path: Path, case: str) -> None:
    """Norms, losses and cosines by autograd choose the same examples."""
    options, values = BY_EXAMPLE[case]
    name = ["--model.data_allocator", case.split(",")[0]]
    found = load_selection(job.select(tmp_path / "out", *name, *options, *BUDGETS)).example_ids
    assert list(found) == top(values(direct))


def test_less_with_adam(job: Job, tmp_path: Path) -> None:
    """After a warm-up the gradients are those of its model, and P = 1/(sqrt(ĉ)+eps) is that of its Adam."""
    warmup = ["--model.warmup.fraction", "1.0", "--model.warmup.learning_rate", "0.01", "--model.warmup.keep", "true"]
    options = ["--model.preconditioner", "adam", *warmup, "--model.data_allocator", "less"]
    folder = job.select(tmp_path / "out", *options, *BUDGETS)
    there = Direct.at(str(folder / "warmup"), job)
    moments = load_file(folder / "warmup" / "second_moment.safetensors")
    preconditioner = 1 / (flat(moments[name] for name in there.weights).sqrt() + 1e-8)
    steps = preconditioner * there.gradients
    cosines = F.cosine_similarity(steps, there.validation[None], dim=1, eps=1e-30)
    assert list(load_selection(folder).example_ids) == top(cosines)
    without_norm = steps @ there.validation
    without_adam = F.cosine_similarity(there.gradients, there.validation[None], dim=1)
    assert len({str(top(values)) for values in (cosines, without_norm, without_adam)}) == 3, "it shows nothing"


def test_longest_responses(job: Job, tmp_path: Path) -> None:
    """By supervised tokens, which are the response's bytes and the end."""
    folder = job.select(tmp_path / "out", "--model.data_allocator", "longest_response", *BUDGETS)
    lengths = torch.tensor([float(len(RESPONSES[i])) for i in OK])
    assert list(load_selection(folder).example_ids) == top(lengths)


def largest(values: Tensor, weights: dict[str, Tensor]) -> set[tuple[str, int]]:
    """Names and flat indices of the largest of one value for each weight."""
    places = [(name, k) for name, weight in weights.items() for k in range(weight.numel())]
    return {places[k] for k in values.argsort(descending=True)[:WEIGHTS].tolist()}


@pytest.mark.parametrize(("keep", "sign"), [("largest", 1), ("smallest", -1)])
def test_magnitude_looks_at_the_base_model(job: Job, direct: Direct, tmp_path: Path, keep: str, sign: int) -> None:
    """The largest or smallest |θ| of the model as loaded."""
    options = ["--model.parameter_allocator", "magnitude", "--model.parameter_allocator.keep", keep]
    mask = load_selection(job.select(tmp_path / "out", *options, *BUDGETS)).mask()
    assert chosen(mask) == largest(sign * flat(direct.weights.values()).abs(), direct.weights)


def test_sift(job: Job, direct: Direct, tmp_path: Path) -> None:
    """Scores are |ḡ_j|, and the default allocator chooses the largest; then the examples may go by the mask."""
    folder = job.select(tmp_path / "out", "--model.scorer", "sift", *BUDGETS)
    selection = load_selection(folder)
    scores = selection.parameter_scores()
    mean = direct.gradients.mean(0)
    found = flat(scores[name] for name in direct.weights)
    torch.testing.assert_close(found, mean.abs(), rtol=1e-3, atol=1e-6 * float(mean.abs().max()))
    assert len(chosen(selection.mask()) ^ largest(mean.abs(), direct.weights)) <= 4  # float32 against float64
    assert list(selection.example_ids) == top(direct.gradients @ mean.sign())
