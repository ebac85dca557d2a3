import json
import logging
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from dualsft.cli import run
from dualsft.errors import UserError
from dualsft.evaluation import EvaluationModule, TaskOptions, load_tasks, task_scores
from dualsft.models.loading import load_model
from dualsft.trainer import Trainer
from tests.world.data import sums, write_jsonl
from tests.world.jobs import QUIET, trainer
from tests.world.models import save_tiny_model, tiny_tokenizer
from tests.world.tokenizers import CHATML

with_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
QUESTIONS = [{"question": f"{n} + {n}?", "choices": [f"{2 * n}", f"{n} and more", "the sea"]} for n in range(12)]
GOLD = [0, 2, 1] * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model's folder, with a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", template=CHATML)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and in a folder below them the data that they name."""
    at = tmp_path_factory.mktemp("tasks")
    (at / "data").mkdir()
    rows = [{**row, "gold": gold} for row, gold in zip(QUESTIONS, GOLD, strict=True)]
    write_jsonl(at / "data" / "test.jsonl", rows[2:])
    write_jsonl(at / "data" / "shown.jsonl", rows[:4])
    write_task(at, "choose")
    return at


def write_task(folder: Path, name: str, **settings: Any) -> None:
    """A task file over the files in `data`; multiple choice, if nothing else is said."""
    task = {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data/test.jsonl", "train": "data/shown.jsonl"}},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **settings}))


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, and nothing is left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def evaluate(module: EvaluationModule, run: Trainer | None = None, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The harness's results, in batches of 4."""
    run = run or trainer()
    chosen = TaskOptions(**options)
    tasks = load_tasks(run, chosen)
    module.configure_model()
    return module.evaluate_tasks(run, tasks, chosen, 4, seed)


def answer_probabilities(
    model: str, context: str, choices: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """Softmax over the choices of their log-likelihoods, one choice and one token at a time, in float64."""
    net, start, totals = load_model(model).double(), tokenizer(context)["input_ids"], []
    for choice in choices:
        ids = tokenizer(context + choice)["input_ids"]
        assert ids[: len(start)] == start
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([ids])).logits[0]
        totals.append(sum(float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(len(start), len(ids))))
    return torch.tensor(totals, dtype=torch.float64).softmax(0).tolist()


def brier(model: str, contexts: list[str], delimiter: str = " ") -> float:
    """Mean over the questions from the third on of Σ_choice (p_choice − [choice is right])²."""
    terms = []
    for context, row, gold in zip(contexts, QUESTIONS[2:], GOLD[2:], strict=True):
        found = answer_probabilities(model, context, [f"{delimiter}{c}" for c in row["choices"]], tiny_tokenizer())
        terms.append(sum((p - (number == gold)) ** 2 for number, p in enumerate(found)))
    return sum(terms) / len(terms)


def choose(results: dict[str, Any]) -> float:
    """The one figure of the task `choose`."""
    (score,) = task_scores(results)
    assert (score.task, score.metric, score.questions) == ("choose", "brier_score", 10)
    return score.value


@with_harness
@pytest.mark.parametrize("few_shot", [None, 2])
def test_likelihoods_of_choices(model: str, folder: Path, few_shot: int | None) -> None:
    """The Brier score over the choices is that of a plain loop, with and without examples before the question."""
    shown = "".join(f"{QUESTIONS[n]['question']} {QUESTIONS[n]['choices'][GOLD[n]]}\n\n" for n in range(few_shot or 0))
    expected = brier(model, [f"{shown}{row['question']}" for row in QUESTIONS[2:]])
    results = evaluate(EvaluationModule(model), tasks="choose", task_folder=str(folder), few_shot=few_shot)
    assert choose(results) == pytest.approx(expected, rel=1e-4)
    assert results["n-shot"] == {"choose": few_shot or 0}
    assert results["warnings"] == []


@with_harness
def test_chat_template(model: str, folder: Path) -> None:
    """With the chat template the question is a user's turn, and a choice begins the assistant's."""
    contexts = [f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n" for row in QUESTIONS[2:]]
    found = evaluate(EvaluationModule(model), tasks="choose", task_folder=str(folder), chat_template=True)
    assert choose(found) == pytest.approx(brier(model, contexts, delimiter=""), rel=1e-4)


@with_harness
def test_a_missing_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    """A tokenizer without one is not given one of somebody else's."""
    plain = EvaluationModule(save_tiny_model(tmp_path / "base"))
    with pytest.raises(UserError, match="chat_template is set, but the tokenizer has none"):
        evaluate(plain, tasks="choose", task_folder=str(folder), chat_template=True)


def greedy(model: str, prompt: str, tokens: int) -> str:
    """The greedy continuation of one unpadded prompt by transformers alone, up to a line's end."""
    tokenizer, ids = tiny_tokenizer(), torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    made = load_model(model).generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).split("\n")[0]


def with_padding(model: str, copy: Path, padding: str) -> str:
    """A copy of a model with another padding token, or none."""
    shutil.copytree(model, copy)
    tokenizer: Any = tiny_tokenizer()
    if padding != "its own":
        tokenizer.add_tokens([f"<unused {k}>" for k in range(300)])
        tokenizer.pad_token = "<unused 299>" if padding == "without an embedding" else None
    tokenizer.save_pretrained(copy)
    return str(copy)


@with_harness
@pytest.mark.parametrize("padding", ["its own", "without an embedding", "none"])
def test_exact_match_of_generated_answers(model: str, tmp_path: Path, padding: str) -> None:
    """Answers generated in padded batches equal those to single prompts: a third of the references are these.

    Padding needs no token of its own, and none that the model knows.
    """
    rows = sums(9)
    for number, row in enumerate(rows):
        row["response"] = greedy(model, row["prompt"], 6) if number % 3 == 0 else "something else"
    assert len({row["response"] for row in rows}) == 4, "all answers are alike"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_task(
        tmp_path,
        "say",
        output_type="generate_until",
        dataset_kwargs={"data_files": {"test": "rows.jsonl"}},
        fewshot_split=None,
        doc_to_text="{{prompt}}",
        doc_to_choice=None,
        doc_to_target="{{response}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    module = EvaluationModule(with_padding(model, tmp_path / "model", padding))
    (score,) = task_scores(evaluate(module, tasks="say", task_folder=str(tmp_path)))
    assert (score.metric, score.value, score.questions) == ("exact_match", pytest.approx(1 / 3), 9)
    assert score.stderr == pytest.approx((2 / 9 / 8) ** 0.5)  # of a mean of nine with variance 2/9
    (first,) = task_scores(evaluate(module, tasks="say", task_folder=str(tmp_path), limit=1))
    assert (first.value, first.questions) == (1, 1)


@with_harness
def test_code_of_the_model_is_run_where_that_is_allowed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that runs code is evaluated if it may be, and its metric is told by the variable that it asks for.

    The variable is afterwards what it was before, and is not set for a task that may not run code.
    """
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    write_jsonl(tmp_path / "rows.jsonl", sums(3))
    (tmp_path / "metric.py").write_text(
        "import os\n\n\ndef allowed(references, predictions):\n"
        "    return {'pass@1': float(os.environ.get('HF_ALLOW_CODE_EVAL') == '1')}\n"
    )
    code = "output_type: generate_until\nmetric_list: [{metric: !function metric.allowed, aggregation: mean}]\n"
    task = {
        "task": "write",
        "unsafe_code": True,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
    }
    (tmp_path / "write.yaml").write_text(yaml.safe_dump(task) + code)
    module = EvaluationModule(model)
    (score,) = task_scores(evaluate(module, tasks="write", task_folder=str(tmp_path), run_model_code=True))
    assert (score.metric, score.value, score.questions) == ("pass@1", 1.0, 3)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    with pytest.raises(UserError, match="runs code that the model writes"):
        load_tasks(trainer(), TaskOptions("write", str(tmp_path)))


@with_harness
def test_drawn_examples_follow_the_seed(model: str, folder: Path, tmp_path: Path) -> None:
    """The same seed shows the same examples before a question, another seed others."""
    (tmp_path / "data").symlink_to(folder / "data")
    write_task(tmp_path, "choose", fewshot_config={"sampler": "default"}, num_fewshot=2)
    module = EvaluationModule(model)
    found = [choose(evaluate(module, tasks="choose", task_folder=str(tmp_path), seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@with_harness
def test_precision(model: str, folder: Path) -> None:
    """The trainer's precision and model.dtype are obeyed alike."""
    by_dtype = evaluate(EvaluationModule(model, dtype="bfloat16"), tasks="choose", task_folder=str(folder))
    half = trainer(precision="bf16-true")
    by_trainer = evaluate(EvaluationModule(model), half, tasks="choose", task_folder=str(folder))
    full = evaluate(EvaluationModule(model), tasks="choose", task_folder=str(folder))
    assert choose(by_dtype) == choose(by_trainer) != choose(full)


@with_harness
def test_what_the_harness_warns_of_is_kept(model: str, folder: Path, tmp_path: Path) -> None:
    """A question that does not fit into the model is cut, and the results say so, once for all that are cut alike."""
    (tmp_path / "data").symlink_to(folder / "data")
    write_task(tmp_path, "choose", doc_to_text="word " * 300 + "{{question}}")
    results = evaluate(EvaluationModule(model), tasks="choose", task_folder=str(tmp_path))
    assert results["warnings"]
    assert all("Truncating" in warning for warning in results["warnings"])
    assert len(set(results["warnings"])) == len(results["warnings"]) < 30


@with_harness
def test_command(model: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Data and tasks are evaluated by one command, printed, and written to one file; its configuration replays it."""
    write_task(folder, "again")
    write_jsonl(tmp_path / "rows.jsonl", sums(4))
    at = ["--model.model_name_or_path", model, "--data.batch_size", "4", *QUIET]
    tasks = ["--tasks", "choose,again", "--task_folder", str(folder), "--few_shot", "1", "--limit", "5"]
    data = ["--data.validation", str(tmp_path / "rows.jsonl")]
    run(["validate", *at, *data, *tasks, "--output_dir", str(tmp_path / "a")])
    printed, errors = capfd.readouterr()
    measured, kept = (json.loads((tmp_path / "a" / name).read_text()) for name in ("metrics.json", "tasks.json"))
    assert set(measured) == {
        *("loss", "perplexity", "token_accuracy"),
        *("tasks/choose/brier_score", "tasks/again/brier_score"),
    }
    settings: dict[str, Any] = {"tasks": "choose", "task_folder": str(folder), "few_shot": 1, "limit": 5}
    (score,) = task_scores(evaluate(EvaluationModule(model), **settings))
    assert kept["results"]["choose"]["brier_score,none"] == measured["tasks/choose/brier_score"] == score.value
    assert [line.split() for line in printed.splitlines()[-3:]] == [
        ["task", "metric", "value", "stderr", "questions", "shots"],
        *([name, "brier_score", f"{score.value:.4f}", "-", "5", "1"] for name in ("choose", "again")),
    ]
    assert errors == ""
    replay = ["--config", str(tmp_path / "a" / "config.yaml")]
    run(["validate", *replay, "--output_dir", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == measured
    run(["validate", *at, *tasks, "--output_dir", str(tmp_path / "b"), "--overwrite"])
    alone = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert alone == {name: value for name, value in measured.items() if name.startswith("tasks/")}


@pytest.mark.parametrize(
    "given",
    [
        ["--tasks", "a,b"],
        ["--tasks", "a, b,a"],
        ["--tasks", "[a, b]"],
        ["--tasks=a", "--tasks=b"],
        ["--config", "tasks: c", "--tasks", "a", "--tasks", "b"],
        ["--config", "tasks: [a]", "--tasks+", "b"],
        ["--config", "tasks: [a, b]"],
    ],
    ids=" ".join,
)
def test_forms_of_task_names(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commas, lists and repetition say the same; what is given anew replaces what a configuration says."""
    if given[0] == "--config":
        (tmp_path / "tasks.yaml").write_text(given[1])
        given = ["--config", str(tmp_path / "tasks.yaml"), *given[2:]]
    with pytest.raises(SystemExit) as stop:
        run(["validate", *given, "--print_config"])
    assert not stop.value.code
    assert TaskOptions(yaml.safe_load(capsys.readouterr().out)["tasks"]).names == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ", "}, "tasks=', ' names no task"),
        ({"tasks": []}, r"tasks=\[\] names no task"),
        ({"tasks": "a", "few_shot": -1}, "few_shot=-1 is too small"),
        ({"tasks": "a", "limit": 0}, "limit=0 is too small"),
        ({"limit": 3, "chat_template": True}, "no use for limit and chat_template"),
        ({"tasks": "a", "task_folder": "no/such"}, "task_folder='no/such' is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    """Each names the option and its value."""
    with pytest.raises(UserError, match=words):
        TaskOptions(**options)


@pytest.fixture
def own(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task files, and two tasks in the place of the harness's own thousands, to be quick."""
    tasks = pytest.importorskip("lm_eval.tasks.manager", exc_type=ImportError)
    (tmp_path / "harness").mkdir()
    write_task(tmp_path / "harness", "arc_easy", dataset_path="allenai/ai2_arc", dataset_kwargs={})
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "harness" / "manager.py"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "data").symlink_to(folder / "data")
    return tmp_path / "own"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"tasks": "chose"}, r"There is no task 'chose' in .*own or among .*; close names are choose\.$"),
    "not here": ({"tasks": "choose,arc_easy"}, r"The task 'arc_easy' cannot be loaded \(.*Hub.*on this machine"),
    "no data": ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, r"'choose' cannot be loaded \(FileNotFound"),
    "metric": ({"metric_list": [{"metric": "mine"}]}, r"'choose' cannot be loaded \(.*mine.*may not need code from"),
    "unsafe": ({"unsafe_code": True}, r"'choose' runs code that the model writes, .* \(--run_model_code true\)"),
    "pictures": ({"doc_to_image": "question"}, "'choose' asks about more than text"),
    "column": ({"doc_to_text": "{{question[3].x}}"}, r"'choose' cannot be loaded \(.*"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tasks_that_cannot_be_evaluated(mistake: str, own: Path, model: str) -> None:
    """One sentence says which task it is and why, before any model is loaded or folder made."""
    settings, words = MISTAKES[mistake]
    write_task(own, "choose", **{key: value for key, value in settings.items() if key != "tasks"})
    at = ["--tasks", settings.get("tasks", "choose"), "--task_folder", str(own), *QUIET]
    with pytest.raises(UserError, match=words):
        run(["validate", "--model.model_name_or_path", model, *at, "--output_dir", str(own / "out")])
    assert not (own / "out").exists()


def test_a_task_file_that_is_no_yaml_is_named(own: Path) -> None:
    """The harness passes over it in silence; whoever looks for a task that it may hold is told, and nobody else."""
    (own / "broken.yaml").write_text("task: lost\n  : {")
    for name in ("broken", "lost"):
        with pytest.raises(UserError, match=rf"There is no task '{name}' .*; the harness says: Skip .*broken\.yaml"):
            load_tasks(trainer(), TaskOptions(name, str(own)))
    with pytest.raises(UserError, match=r"There is no task 'los' in .* harness's own\.$"):
        load_tasks(trainer(), TaskOptions("los", str(own)))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "test split": ({"test_split": "dev"}, r"its test_split is 'dev', but its data have test, train; name one"),
    "shots": ({"fewshot_split": "dev"}, r"its fewshot_split is 'dev', but its data have test, train; name one"),
    "shots, said otherwise": (
        {"fewshot_config": {"split": "dev"}, "fewshot_split": None},
        r"its fewshot_config's split is 'dev', but its data have test, train; name one",
    ),
    "empty": (
        {"dataset_kwargs": {"data_files": {"test": "data/test.jsonl", "train": ["more/*.jsonl"]}}},
        r"its data have no rows \(\S+/own/more/empty\.jsonl\); fill them, or name others in dataset_kwargs",
    ),
    "all empty": (
        {"dataset_kwargs": {"data_files": "more/empty.jsonl"}},
        r"its data have no rows \(\S+/own/more/empty\.jsonl\); fill them, or name others in dataset_kwargs",
    ),
    "without rows": (
        {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "more/header.csv"}}},
        r"its data have no rows \(\S+/own/more/header\.csv\); fill them, or name others in dataset_kwargs",
    ),
}


@pytest.mark.parametrize("asked", ["choose", "group"])
@pytest.mark.parametrize("fault", FAULTS)
def test_splits_and_rows_that_are_not_there(fault: str, asked: str, own: Path) -> None:
    """One sentence names the task, in a group of several too, its file, what is wrong there and what to do."""
    settings, words = FAULTS[fault]
    write_task(own, "choose", **settings)
    write_task(own, "another")
    (own / "more").mkdir()
    (own / "more" / "empty.jsonl").touch()
    (own / "more" / "header.csv").write_text("question,choices,gold\n")
    (own / "group.yaml").write_text("group: group\ntask: [another, choose]\n")
    with pytest.raises(UserError, match=rf"^The task 'choose' \(\S+/own/choose\.yaml\) cannot be loaded: {words}.*\.$"):
        load_tasks(trainer(), TaskOptions(asked, str(own)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [choose, chose]", "'group' .* holds 'chose', but there is no such task in .*; close names are choose;"),
        ("task: [{task: chose, num_fewshot: 1}]", "'group' .* holds 'chose', but there is no such task"),
        ("task: [{group: inner, task: [chose]}]", "'inner' .* holds 'chose', but there is no such task"),
        ("task: [lost]", r"'group' .* holds 'lost'.*; the harness says: Skip .*broken\.yaml"),
        ("task: choose", "'group' .* has no tasks; list them under its key task"),
        ("task: [{group: inner, task: [group]}]", "'group' .* holds itself; take it out"),
    ],
)
def test_groups_that_cannot_be_loaded(text: str, words: str, own: Path) -> None:
    """The group, its file and the member are named, though another group is asked for that holds it."""
    write_task(own, "choose")
    (own / "broken.yaml").write_text("task: lost\n  : {")
    (own / "group.yaml").write_text(f"group: group\n{text}\n")
    (own / "outer.yaml").write_text("group: outer\ntask: [choose, group]\n")
    for name in ("group", "outer"):
        with pytest.raises(UserError, match=rf"^The group {words}.*\.$") as told:
            load_tasks(trainer(), TaskOptions(name, str(own)))
        assert str(own / "group.yaml") in str(told.value)


def test_groups_may_define_their_tasks(own: Path) -> None:
    """A member that no file defines is one if the group says where its data are."""
    write_task(own, "choose")
    task = yaml.safe_load((own / "choose.yaml").read_text())
    (own / "choose.yaml").unlink()
    given = {key: task.pop(key) for key in ("dataset_path", "dataset_kwargs")}
    (own / "group.yaml").write_text(yaml.safe_dump({"group": "inside", "task": [{**task, **given}]}))
    (own / "above.yaml").write_text(yaml.safe_dump({"group": "above", "task": [task], **given}))
    loaded = load_tasks(trainer(), TaskOptions("inside,above", str(own)))
    assert list(loaded["tasks"]) == ["inside::choose", "above::choose"]


def test_a_task_that_several_names_bring_is_evaluated_once(model: str, own: Path) -> None:
    """By itself, in groups and under a tag it has one figure, that of the task alone; groups count it each."""
    write_task(own, "choose", tag="some")
    for group in ("one", "two"):
        metrics = [{"metric": "brier_score"}]
        settings = {"group": group, "task": ["choose"], "aggregate_metric_list": metrics}
        (own / f"{group}.yaml").write_text(yaml.safe_dump(settings))
    module = EvaluationModule(model)
    at: dict[str, Any] = {"task_folder": str(own), "limit": 3}
    (alone,) = task_scores(evaluate(module, tasks="choose", **at))
    for names in ("one,choose", "choose,one,some,two"):
        found = {score.task: score for score in task_scores(evaluate(module, tasks=names, **at))}
        assert found.keys() == {"choose", *names.split(",")} - {"some"}
        assert {(score.value, score.questions) for score in found.values()} == {(alone.value, 3)}


def test_a_task_that_comes_with_two_settings_is_refused(own: Path) -> None:
    """Its figures go by its name, which would stand for two."""
    write_task(own, "choose")
    (own / "group.yaml").write_text("group: shown\ntask: [{task: choose, num_fewshot: 2}]\n")
    words = r"'choose' is in both 'shown' and 'choose', with different settings \(num_fewshot\); evaluate these"
    with pytest.raises(UserError, match=words):
        load_tasks(trainer(), TaskOptions("shown,choose", str(own)))


def test_groups_may_name_the_harness_s_own_tasks(own: Path) -> None:
    """A group of one's own takes its tasks from wherever they are known."""
    write_task(own, "choose")
    files = {"data_files": {"test": str(own / "data" / "test.jsonl")}}
    write_task(own.parent / "harness", "theirs", dataset_kwargs=files, fewshot_split=None)
    (own / "group.yaml").write_text("group: both\ntask: [choose, theirs]\n")
    loaded = load_tasks(trainer(), TaskOptions("both", str(own)))
    assert list(loaded["tasks"]) == ["choose", "theirs"]
    assert list(loaded["groups"]) == ["both"]


def test_no_code_comes_from_the_hub(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While tasks are loaded the library that would download metrics is told that it is offline."""
    evaluate = pytest.importorskip("evaluate")
    asked = []
    monkeypatch.setattr(evaluate, "load", lambda name: asked.append((name, evaluate.config.HF_EVALUATE_OFFLINE)))
    write_task(own, "choose", metric_list=[{"metric": "mine"}])
    before = evaluate.config.HF_EVALUATE_OFFLINE
    with pytest.raises(UserError, match="'choose' cannot be loaded"):
        load_tasks(trainer(), TaskOptions("choose", str(own)))
    assert asked == [("mine", True)]
    assert before == evaluate.config.HF_EVALUATE_OFFLINE


@pytest.mark.parametrize("missing", ["lm_eval.tasks", "lm_eval.models.huggingface"])
def test_without_the_extra(missing: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness, or without what it needs for models of this kind, one sentence says what to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    command = ["validate", "--model.model_name_or_path", model, "--tasks", "choose", "--task_folder", str(folder)]
    with pytest.raises(UserError, match=r"--tasks needs the lm-evaluation-harness.*pip install 'lm-eval\[hf\]"):
        run([*command, *QUIET])


@with_harness
def test_several_processes_are_refused(folder: Path) -> None:
    """The harness would put the same questions to each."""
    with pytest.raises(UserError, match=r"the trainer has 2; set trainer\.devices to 1"):
        load_tasks(trainer(devices=2), TaskOptions("choose", str(folder)))


@with_harness
def test_logging_is_left_as_it_was(model: str, folder: Path) -> None:
    """Whoever uses the harness beside us hears it as before."""
    logger = logging.getLogger("lm_eval")
    before = logger.level, logger.propagate, list(logger.handlers)
    evaluate(EvaluationModule(model), tasks="choose", task_folder=str(folder), limit=1)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
