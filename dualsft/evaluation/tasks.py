"""Tasks of the lm-evaluation-harness (EleutherAI) on a checkpoint.

The harness is optional and imported when tasks are given. It loads the tasks' data, generates or scores the answers
and computes the metrics. Code from the hub is never fetched; functions that the user's own task files name are run, and
code that the model writes only where `TaskOptions.run_model_code` allows it.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, fields
from importlib import import_module
from io import StringIO
from logging.handlers import BufferingHandler
from pathlib import Path
from sys import maxsize
from typing import Any

from lightning import Trainer, seed_everything
from transformers import PreTrainedTokenizerBase

from dualsft.data.tokenizer import pad_id
from dualsft.errors import UserError, advising, is_out_of_memory
from dualsft.evaluation.task_errors import TaskIndex, check_same, explanation, task_at_fault
from dualsft.models import PreTrainedModel
from dualsft.models.inspection import embedding_rows
from dualsft.storage.paths import expanded

INSTALL = "pip install 'lm-eval[hf]>=0.4.13'"
MODELS = "lm_eval.models.huggingface"
_ALLOWS_CODE = "HF_ALLOW_CODE_EVAL"
NEEDS = "; its data must be on this machine or in reach, and it may not need code from the hub"


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of the lm-evaluation-harness.

    Args:
        tasks: Names of tasks, groups or tags of the lm-evaluation-harness, separated by commas or as a list; batches
            hold data.batch_size requests.
        task_folder: Folder with task files (YAML) of one's own, which go before the harness's; relative paths in them
            start at this folder.
        few_shot: Examples to show before each question, if not as many as the task says; a task that says 0 stays so.
        limit: Largest number of questions of each task, from its start.
        chat_template: Whether questions are put through the tokenizer's chat template.
        run_model_code: Allow tasks such as HumanEval, which run the code that the model writes: on this machine, with
            your rights, and with nothing to keep it in. Do so only where such code can do no harm. Tasks that run no
            code do not change.
    """

    tasks: str | list[str] | None = None
    task_folder: str | None = None
    few_shot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    run_model_code: bool = False

    def __post_init__(self) -> None:
        if self.tasks is not None and not self.names:
            raise UserError(f"tasks={self.tasks!r} names no task; leave it out, or name tasks separated by commas.")
        if self.few_shot is not None and self.few_shot < 0:
            raise UserError(f"few_shot={self.few_shot} is too small: it must be at least 0.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} is too small: it must be at least 1.")
        free = ("tasks", "run_model_code")  # a permission, which does no harm where it is not needed
        idle = [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != f.default]
        if idle and not self.names:
            raise UserError(f"Without tasks there is no use for {' and '.join(idle)}; name tasks, or leave it out.")
        if self.task_folder is not None and not Path(expanded(self.task_folder)).is_dir():
            raise UserError(f"task_folder={self.task_folder!r} is not a folder; name one that holds task files.")

    @property
    def names(self) -> list[str]:
        """The names given, each once, in order."""
        parts = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
        names = [name.strip() for part in parts for name in part.split(",")]
        return list(dict.fromkeys(filter(None, names)))

    @property
    def folder(self) -> Path | None:
        """The folder of task files, absolute."""
        return Path(expanded(self.task_folder)).resolve() if self.task_folder is not None else None


def load_tasks(trainer: Trainer, options: TaskOptions) -> dict[str, Any]:
    """The tasks and groups that were named, their data read.

    Returns:
        What the harness evaluates: ``tasks`` by name, those of groups included, and the ``groups``; nothing if no task
        was named.

    Raises:
        UserError: If the harness is not installed, a task is unknown, cannot be loaded, asks for more than words, or
            runs code without `TaskOptions.run_model_code`, or the trainer has several processes.
    """
    if not options.names:
        return {}
    if trainer.world_size > 1:
        raise UserError(
            f"--tasks runs on one process, but the trainer has {trainer.world_size}; set trainer.devices to 1."
        )
    with _progress_bars(trainer), _model_code(options):
        manager, unread = _manager(options)
        index = TaskIndex(manager.task_index, options.folder, unread)
        for name in options.names:
            index.check(name)
        with chdir(options.folder) if options.folder else nullcontext(), _no_code_from_the_hub():
            loaded = _merged({name: _load(manager, name) for name in options.names})
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not options.run_model_code:
            raise UserError(
                f"The task {name!r} runs code that the model writes, on this machine and with your rights; leave it "
                "out, or set run_model_code (--run_model_code true) where such code can do no harm."
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"The task {name!r} asks about more than text, which the model cannot read; leave it out.")
    return loaded


def evaluate_tasks(
    trainer: Trainer,
    loaded: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Evaluate a model on tasks, on the trainer's device and in its precision.

    Args:
        trainer: Its device and precision are used.
        loaded: From `load_tasks`.
        model: A causal language model.
        tokenizer: The model's.
        options: Those that the tasks were loaded with.
        batch_size: Requests to a batch.
        seed: Decides which examples are shown before a question, and whatever else a task draws.

    Returns:
        The harness's own results, as JSON gives them back, with its warnings under ``warnings``.

    Raises:
        UserError: If a task cannot be evaluated on this model, or memory runs out.
    """
    if options.chat_template and not tokenizer.chat_template:
        raise UserError("chat_template is set, but the tokenizer has none; leave it out for this model.")
    harness, models, precision = _imported("lm_eval"), _imported(MODELS), trainer.precision_plugin
    out_of_memory = advising("while tasks were evaluated", "lower data.batch_size, or set model.dtype to bfloat16")
    explaining = _explaining("The tasks cannot be evaluated")
    with out_of_memory, _no_code_from_the_hub(), _model_code(options), explaining, _progress_bars(trainer):
        precision.convert_module(model).to(trainer.strategy.root_device)
        with _captured_log():  # it warns that it is given a model, not a name
            padding = _padding_with_known_ids(tokenizer, embedding_rows(model))
            wrapped = models.HFLM(pretrained=model, tokenizer=padding, backend="causal", batch_size=batch_size)
        seed_everything(seed, verbose=False)
        for task in loaded["tasks"].values():
            _prepare(task, options.few_shot, seed)
        with precision.forward_context(), _captured_log() as records:
            how = {"limit": options.limit, "apply_chat_template": options.chat_template}
            how |= {"confirm_run_unsafe_code": options.run_model_code}
            results = harness.evaluate(wrapped, loaded, log_samples=False, fewshot_as_multiturn=True, **how)
    warnings = list(dict.fromkeys(record.getMessage() for record in records))
    results = {**results, "lm_eval_version": harness.__version__, "warnings": warnings}
    return dict(json.loads(json.dumps(results, default=str)))


def _padding_with_known_ids(tokenizer: PreTrainedTokenizerBase, known: int) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that pads with an id that has an embedding; the harness would add a token, if need be."""
    tokenizer, padding = deepcopy(tokenizer), pad_id(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding if padding < known else 0)
    return tokenizer


def _prepare(task: Any, few_shot: int | None, seed: int) -> None:
    """Apply the rules of the harness's command line: a task with 0 shots stays so, one that says nothing gets none."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):
        task.set_config(key="num_fewshot", value=few_shot or 0)
    task.set_fewshot_seed(seed=seed)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks of a name; raises an error that the harness logs, as it says more than the exception that follows."""
    loaded: dict[str, Any] = {}
    failure: Exception | None = None
    with _captured_log() as records:
        try:
            loaded = dict(manager.load([name]))
        except Exception as error:
            failure = error
    task = task_at_fault(failure) if failure else None
    with _explaining(f"The task {(task.config.task if task else name)!r} cannot be loaded", NEEDS):
        if failure and task and (sentence := explanation(failure, task)):
            raise UserError(sentence) from failure
        if errors := [record.getMessage() for record in records if record.levelno >= logging.ERROR]:
            raise ValueError(errors[0]) from failure
        if failure:
            raise failure
    return loaded


def _merged(by_name: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The tasks of several names, each once; the harness would refuse one that is in two of them."""
    joined: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    sources: dict[str, str] = {}
    for name, loaded in by_name.items():
        for key, task in loaded["tasks"].items():
            if key in sources:
                check_same(key, joined["tasks"][key], task, (sources[key], name))
            sources.setdefault(key, name)
        for part in joined:
            joined[part] |= loaded[part]
    return joined


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"--tasks needs the lm-evaluation-harness, which cannot be imported ({error}); install it with {INSTALL}."
        ) from error


def _manager(options: TaskOptions) -> tuple[Any, dict[Path, str]]:
    """The harness's index of tasks, and its message about each file in the folder that it skipped.

    The harness's own tasks, of which there are thousands, are indexed only if one is needed.
    """
    manager_class = _imported("lm_eval.tasks").TaskManager
    if options.folder is None:
        with _captured_log():
            return manager_class(), {}
    with _captured_log(logging.DEBUG) as records:
        own = manager_class(include_path=options.folder, include_defaults=False)
    unread = {}
    for record in records:
        if record.msg.startswith("Skip ") and isinstance(record.args, tuple):
            unread[Path(str(record.args[0]))] = record.getMessage()
    if set(options.names) <= {*own.all_subtasks, *own.all_tags}:
        return own, unread
    with _captured_log():
        return manager_class(include_path=options.folder), unread


def _progress_bars(trainer: Trainer) -> AbstractContextManager[Any]:
    """Hides the progress bars of harness and data sets, which cannot be turned off, if the trainer shows none."""
    return nullcontext() if trainer.progress_bar_callback else redirect_stderr(StringIO())


@contextmanager
def _no_code_from_the_hub() -> Iterator[None]:
    """Keeps the harness from downloading and running code for metrics that it does not have."""
    config = _imported("evaluate").config
    before, config.HF_EVALUATE_OFFLINE = config.HF_EVALUATE_OFFLINE, True
    try:
        yield
    finally:
        config.HF_EVALUATE_OFFLINE = before


@contextmanager
def _model_code(options: TaskOptions) -> Iterator[None]:
    """Tells the metric of Hugging Face that runs code, which asks for it by this variable, that it may, if it may."""
    before = os.environ.get(_ALLOWS_CODE)
    if options.run_model_code:
        os.environ[_ALLOWS_CODE] = "1"
    try:
        yield
    finally:
        if options.run_model_code:
            os.environ.pop(_ALLOWS_CODE)
            os.environ |= {_ALLOWS_CODE: before} if before is not None else {}


@contextmanager
def _captured_log(level: int = logging.WARNING) -> Iterator[list[logging.LogRecord]]:
    """Captures the harness's log in this context, and keeps it off the screen."""
    logger, handler = logging.getLogger("lm_eval"), BufferingHandler(maxsize)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextmanager
def _explaining(what: str, advice: str = "") -> Iterator[None]:
    """Turns an exception of the harness, the data sets or a task's own functions into one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no message").split("\n")[0]
        raise UserError(f"{what} ({type(error).__name__}: {reason.rstrip('.')}){advice}.") from error
