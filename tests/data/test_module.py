import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentParser

from dualsft.data.loaders import RowLists
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.data.records import Records, read_records
from dualsft.data.selected import selected_ids
from dualsft.errors import UserError
from tests.world.data import write_jsonl
from tests.world.tokenizers import byte_level

RESPONSES = ["wide", "", "deep and wide", None, "blue", "the sea " * 30, "calm"]
OK = [0, 2, 4, 6]


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """Seven rows: two without a response, and one whose prompt is longer than 40 tokens."""
    rows = [{"prompt": "x" * 60 if i == 5 else "the sea?", "response": text} for i, text in enumerate(RESPONSES)]
    return write_jsonl(tmp_path / "pool.jsonl", rows)


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Three rows of plain text, one of them blank."""
    return write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in ("the sea", " ", "deep and wide is it")])


def module(train: str | None, **options: Any) -> InstructionDataModule:
    """A data module that truncates to 40 tokens."""
    return InstructionDataModule(train, **{"tokenizer": byte_level(), "max_length": 40, "batch_size": 2, **options})


def write_selection(folder: Path, fingerprint: str, selected: list[int], rows: int = 7) -> str:
    """Writes the two files of a selection that fine-tuning reads."""
    folder.mkdir()
    columns = {"example_id": range(rows), "selected": [row in selected for row in range(rows)]}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "examples.parquet")
    manifest = {"schema_version": 1, "data": {"train": {"fingerprint": fingerprint}}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Path and split of whatever is read from now on."""
    read: list[tuple[str, str]] = []

    def noted(path: str, split: str, cache_dir: None) -> Records:
        read.append((path, split))
        return read_records(path)

    monkeypatch.setattr("dualsft.data.module.read_records", noted)
    return read


def ids(loader: Any) -> list[int]:
    """The example ids that a loader yields, in order."""
    return [example for batch in loader for example in batch["example_id"].tolist()]


def test_loaders_hold_the_examples_with_labels(pool: str) -> None:
    """Training, scoring and validation see each `ok` example once, and no other."""
    data = module(pool, validation=pool)
    assert data.train_examples.counts() == {"ok": 4, "empty": 2, "truncated": 1}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.pool_loader(), data.validation_loader()):
        assert sorted(ids(loader)) == OK
    for loader in (data.pool_loader(), data.validation_loader()):
        lengths = data.train_examples.lengths[ids(loader)].tolist()
        assert lengths == sorted(lengths, reverse=True)


def test_loaders_over_some_ids(pool: str) -> None:
    """A warm-up or a second pass over a subset sees just the ids that it names; the seed decides the order."""
    data = module(pool, batch_size=1)
    assert sorted(ids(data.training_loader([6, 0], seed=1))) == [0, 6]
    assert sorted(ids(data.pool_loader([2, 4]))) == [2, 4]
    orders = {tuple(ids(data.training_loader(OK, seed=seed))) for seed in range(8)}
    assert len(orders) > 1


def test_batches_carry_the_examples(pool: str) -> None:
    """A batch holds the rows of the encoded examples, padded with the tokenizer's own padding."""
    data = module(pool)
    for batch in data.pool_loader():
        for row, example in enumerate(batch["example_id"].tolist()):
            expected = data.train_examples.dataset[example]
            length = len(expected["input_ids"])
            assert batch["input_ids"][row, :length].tolist() == expected["input_ids"]
            assert batch["labels"][row, :length].tolist() == expected["labels"]
            assert batch["attention_mask"][row].sum() == length
            assert set(batch["input_ids"][row, length:].tolist()) <= {data.tokenizer.pad_token_id}


def test_packed_batches_carry_the_examples(pool: str) -> None:
    """Packed, each example stands whole in its span; a row of max_length tokens holds several."""
    data = module(pool, validation=pool, packing=True)
    for loader in (data.pool_loader(), data.validation_loader(), data.train_dataloader()):
        batches = list(loader)
        assert sorted(ids(batches)) == OK
        for batch in batches:
            assert "attention_mask" not in batch
            assert batch["input_ids"].shape[1] <= 40
            for example, (row, first, length) in zip(batch["example_id"], batch["spans"].tolist(), strict=True):
                expected = data.train_examples.dataset[int(example)]
                assert batch["input_ids"][row, first : first + length].tolist() == expected["input_ids"]
                assert batch["labels"][row, first : first + length].tolist() == expected["labels"]
    (scoring,) = data.pool_loader()
    assert len(scoring["input_ids"]) < len(OK)


def test_evaluation_is_never_packed(pool: str) -> None:
    """The batches that a validation loop gets are padded ones with a mask, packing or not."""
    plain, packing = (module(pool, validation=pool, packing=flag).val_dataloader() for flag in (False, True))
    for one, other in zip(plain, packing, strict=True):
        assert one.keys() == other.keys() == {"example_id", "input_ids", "attention_mask", "labels"}
        assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("packing", [False, True])
def test_start_leaves_batches_out_unread(pool: str, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that starts at a later batch yields what is left of the whole, and reads nothing else."""
    read: list[int] = []
    data = module(pool, validation=pool, packing=packing, batch_tokens=20)
    plain = RowLists.__getitem__

    def noted(self: RowLists, ids: list[int]) -> Any:
        read.extend(ids)
        return plain(self, ids)

    monkeypatch.setattr(RowLists, "__getitem__", noted)
    for make in (data.pool_loader, data.validation_loader):
        whole = [batch["example_id"].tolist() for batch in make()]
        assert len(whole) > 1
        for start in range(len(whole) + 1):
            read.clear()
            assert [batch["example_id"].tolist() for batch in make(start=start)] == whole[start:]
            assert read == [example for batch in whole[start:] for example in batch]


@pytest.mark.parametrize("packing", [False, True])
def test_parts_are_read_apart_and_are_all(pool: str, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example is in one of several parts, of which each has about as many tokens; no part reads another's."""
    read: list[int] = []
    data = module(pool, packing=packing, batch_tokens=20)
    plain = RowLists.__getitem__

    def noted(self: RowLists, ids: list[int]) -> Any:
        read.extend(ids)
        return plain(self, ids)

    monkeypatch.setattr(RowLists, "__getitem__", noted)
    lengths, parts, ids = (
        data.train_examples.lengths,
        [slice(k, None, 3) for k in range(3)],
        data.train_examples.ok_ids(),
    )
    found = []
    for part in parts:
        read.clear()
        found.append([i for batch in data.pool_loader(part=part) for i in batch["example_id"].tolist()])
        assert read == found[-1]
    assert sorted(i for of_part in found for i in of_part) == ids
    tokens = [int(lengths[of_part].sum()) for of_part in found]
    assert max(tokens) - min(tokens) <= int(lengths[ids].max())
    assert [*data.pool_loader([ids[0]], part=slice(1, None, 2))] == []


@pytest.mark.parametrize("packing", [False, True])
def test_another_budget_for_scoring(pool: str, packing: bool) -> None:
    """A smaller budget than the module's gives the batches that a module of that budget has, over some ids too."""
    data, small = (module(pool, validation=pool, packing=packing, batch_tokens=tokens) for tokens in (400, 20))
    assert len(data.pool_loader()) == len(data.validation_loader()) == 1
    for found, expected in (
        (data.pool_loader(batch_tokens=20), small.pool_loader()),
        (data.pool_loader([6, 2], batch_tokens=20), small.pool_loader([6, 2])),
        (data.validation_loader(batch_tokens=20), small.validation_loader()),
    ):
        assert [batch["input_ids"].tolist() for batch in found] == [batch["input_ids"].tolist() for batch in expected]
    assert len(data.pool_loader(batch_tokens=20)) > 1


@pytest.mark.parametrize("packing", [False, True])
def test_padding_shares(tmp_path: Path, packing: bool) -> None:
    """The shares, which need no batch, are those of the padding in the batches themselves."""
    rows = [{"prompt": "why", "response": "sea " * (1 + i * i % 23)} for i in range(60)]
    data = module(write_jsonl(tmp_path / "pool.jsonl", rows), packing=packing, batch_tokens=130, batch_size=6)
    lengths = data.train_examples.lengths
    for share, loader in (
        (data.padding_share(), data.pool_loader()),
        (data.training_padding_share(), data.train_dataloader()),
    ):
        slots = sum(batch["input_ids"].numel() for batch in loader)
        assert share == pytest.approx(1 - lengths.sum() / slots)
        assert 0 < share < 0.2


def test_setup_is_lazy_and_done_once(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before it is needed, and nothing is read twice."""
    read = read_files(monkeypatch)
    data = module(pool, validation=pool, train_split="a", validation_split="b")
    assert read == []
    data.setup("validate")
    assert read == [(pool, "b")]
    for stage in ("fit", "fit", "predict", None):
        data.setup(stage)
    assert read == [(pool, "b"), (pool, "a")]
    assert data.train_examples is data.train_examples


def test_a_list_is_one_validation_set(pool: str, other: str) -> None:
    """Files in a list are one set without a name, end to end, and a named set may be such a list."""
    alone = module(None, validation=[pool, other])
    assert (alone.named_validation, list(alone.validation_sets)) == (False, ["validation"])
    assert len(alone.validation_sets["validation"]) == 10
    named = module(None, validation={"both": [pool, other], "one": {"path": other, "format": "text"}})
    assert [len(examples) for examples in named.validation_sets.values()] == [10, 3]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"train": {"a": {"path": "x", "cap": 0}}}, r"data\.train\.a\.cap is 0"),
        ({"validation": {"a": {"path": "x", "cap": 3}}}, r"data\.validation\.a\.cap is for data\.train alone"),
        ({"validation": []}, r"data\.validation is an empty list"),
    ],
)
def test_mistakes_in_sources_are_told_at_once(given: dict[str, Any], problem: str) -> None:
    """Options of sources are checked when the module is made, under the option that gives them."""
    with pytest.raises(UserError, match=problem):
        InstructionDataModule(**given)


def test_named_validation_sets(pool: str, other: str) -> None:
    """Sets come in the order given, each as it would be alone; a name shares nothing with the pool's or a source's."""
    given = {"wide": other, "train": pool, "validation": other, "a-1": pool}
    data = module(other, validation=given)
    assert (data.validation, data.named_validation) == (given, True)
    assert list(data.validation_sets) == list(given)
    for name, examples in data.validation_sets.items():
        alone = module(None, validation=given[name]).validation_sets["validation"]
        assert examples.records.fingerprint == alone.records.fingerprint
        assert (examples.status, examples.lengths.tolist()) == (alone.status, alone.lengths.tolist())
        assert data.validation_sets[name] is examples
    assert len(data.train_examples) == 3


def test_a_single_source_is_called_validation(pool: str) -> None:
    """A plain source is a set without a name of its own, and no source is no set."""
    data = module(pool, validation=pool)
    assert (data.validation, data.named_validation, list(data.validation_sets)) == (pool, False, ["validation"])
    data = module(pool)
    assert (data.validation, data.named_validation, data.validation_sets) == (None, False, {})


@pytest.mark.parametrize("packing", [False, True])
def test_loaders_of_named_sets(pool: str, other: str, packing: bool) -> None:
    """Each set has the batches, for scoring and for validation, that it has as the only source, in the order given."""
    options: dict[str, Any] = {"packing": packing, "batch_tokens": 40}
    data = module(None, validation={"b": pool, "a": other}, **options)
    loaders = data.val_dataloader()
    assert isinstance(loaders, list)
    for name, source, loader in zip(("b", "a"), (pool, other), loaders, strict=True):
        alone = module(None, validation=source, **options)
        assert ids(loader) == ids(alone.val_dataloader())
        assert ids(data.validation_loader(name)) == ids(alone.validation_loader())
        assert ids(data.validation_loader(name, 1, 30)) == ids(alone.validation_loader(start=1, batch_tokens=30))
    assert ids(module(None, validation={"a": pool}, **options).val_dataloader()) == ids(loaders[0])
    with pytest.raises(KeyError):
        data.validation_loader()


def test_named_sets_are_read_lazily_and_once(pool: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader reads its own set alone, a stage what is still missing; one split serves all sets."""
    read = read_files(monkeypatch)
    data = module(pool, validation={"b": pool, "a": other}, train_split="t", validation_split="v")
    assert read == []
    data.validation_loader("a")
    assert read == [(other, "v")]
    data.setup("validate")
    assert read == [(other, "v"), (pool, "v")]
    for stage in ("fit", None):
        data.setup(stage)
    assert read == [(other, "v"), (pool, "v"), (pool, "t")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "is an empty mapping"),
        ({"a": "x", "b c": "x"}, "names a set 'b c': use letters, digits, _ and - alone"),
        ({"a/b": "x"}, "names a set 'a/b'"),
        ({"a.b": "x"}, "names a set 'a.b'"),
        ({"": "x"}, "names a set ''"),
        ({2024: "x"}, "names a set 2024, which is not text: put the name in quotes"),
    ],
)
def test_names_that_cannot_be_used(given: dict[Any, str], words: str) -> None:
    """A mapping without sets, or with names that would not do for metrics and columns, is refused at construction."""
    with pytest.raises(UserError, match=rf"^data\.validation {words}"):
        validation_sources(given)
    if all(isinstance(name, str) for name in given):
        with pytest.raises(UserError, match=rf"^data\.validation {words}"):
            module(None, validation=given)


def test_mistakes_in_a_named_set_are_told_with_its_name(pool: str, tmp_path: Path) -> None:
    """Missing files, unknown columns and examples too long for a batch: each says in which set; others do not."""
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"q": "the sea?", "a": "wide"}])
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "the sea?", "response": "the sea " * 30}])
    for source, words in (
        ("nowhere.jsonl", r"nowhere\.jsonl does not exist"),
        (odd, "odd.jsonl: The columns q, a fit no format"),
        (long, r"Example 0 has 40 tokens, more than data\.batch_tokens=39"),
    ):
        for stage in ("fit", "validate"):
            with pytest.raises(UserError, match=rf"^data\.validation\.odd-1: {words}"):
                module(pool, validation={"sound": pool, "odd-1": source}, batch_tokens=39).setup(stage)
        with pytest.raises(UserError, match=rf"^{words}" if source != "nowhere.jsonl" else words):
            module(pool, validation=source, batch_tokens=39).setup("validate")
    with pytest.raises(UserError, match=r"data\.validation\.b: Example 0 has 40 tokens"):
        module(None, validation={"a": pool, "b": long}, batch_tokens=39).val_dataloader()
    with pytest.raises(UserError, match=r"^data\.tokenizer is not given"):
        module(pool, validation={"sound": pool}, tokenizer=None).setup("validate")


@pytest.mark.parametrize("stage", ["fit", "validate", "predict", None])
def test_missing_sources_are_named(pool: str, stage: str | None) -> None:
    """Each stage asks for the sources it needs by their key; training does without a validation set."""
    if stage == "fit":
        data = module(pool)
        data.setup(stage)
        assert data.val_dataloader() == []
    else:
        with pytest.raises(UserError, match=r"data\.validation is not given"):
            module(pool).setup(stage)
    if stage != "validate":
        with pytest.raises(UserError, match=r"data\.train is not given"):
            module(None, validation=pool).setup(stage)
    with pytest.raises(UserError, match=r"data\.tokenizer is not given"):
        module(pool, validation=pool, tokenizer=None).setup(stage)


@pytest.mark.parametrize(
    ("option", "least"), [("max_length", 2), ("batch_tokens", 1), ("batch_size", 1), ("seed", 0), ("num_workers", 0)]
)
def test_values_out_of_range(option: str, least: int) -> None:
    """A value below what makes sense is refused at construction with the key, the value and the least allowed."""
    with pytest.raises(UserError, match=rf"data\.{option}={least - 1} is too small: it must be at least {least}"):
        module(None, **{option: least - 1})
    module(None, **{option: least})


def test_contradictions_are_refused_at_construction() -> None:
    """So are format options that contradict each other."""
    with pytest.raises(UserError, match=r"data\.prompt_column"):
        InstructionDataModule(format="text", prompt_column="q")
    with pytest.raises(UserError, match=r"data\.prompt_template"):
        InstructionDataModule(prompt_template="Q:")


def test_training_on_a_selection(pool: str, tmp_path: Path) -> None:
    """Only selected examples that have labels are trained on; scoring still sees the whole pool."""
    selection = write_selection(tmp_path / "selection", read_records(pool).fingerprint, [1, 2, 5, 6])
    assert selected_ids(selection, read_records(pool)) == [1, 2, 5, 6]
    data = module(pool, selection=selection)
    assert sorted(ids(data.train_dataloader())) == [2, 6]
    assert sorted(ids(data.pool_loader())) == OK


def test_selections_that_do_not_fit(pool: str, tmp_path: Path) -> None:
    """A selection of other data, an unfinished one and one that leaves nothing are each told apart."""
    fingerprint = read_records(pool).fingerprint
    other = write_selection(tmp_path / "other", "0" * 64, [0], rows=9)
    with pytest.raises(UserError, match=r"other was made for other data: 9 rows against 7 in data\.train"):
        module(pool, selection=other).train_dataloader()
    with pytest.raises(UserError, match=r"is not a finished selection: it has no manifest\.json"):
        module(pool, selection=str(tmp_path)).train_dataloader()
    useless = write_selection(tmp_path / "useless", fingerprint, [1, 5])
    with pytest.raises(UserError, match=r"No example .* is left to train on .*4 ok, 2 empty, 1 truncated"):
        module(pool, selection=useless).train_dataloader()
    (tmp_path / "useless" / "examples.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"examples\.parquet cannot be read"):
        module(pool, selection=useless).train_dataloader()
    (tmp_path / "useless" / "manifest.json").write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="does not tell which data"):
        module(pool, selection=useless).train_dataloader()
    (tmp_path / "useless" / "manifest.json").write_text('{"schema_version": 2}', encoding="utf-8")
    with pytest.raises(UserError, match="has schema version 2, this dualsft reads 1"):
        module(pool, selection=useless).train_dataloader()


def test_a_batch_budget_below_an_example(pool: str) -> None:
    """An example that no batch may hold is refused when batches are made, by name."""
    with pytest.raises(UserError, match=r"Example \d has \d+ tokens, more than data\.batch_tokens=4"):
        module(pool, batch_tokens=4).pool_loader()
    for stage in ("fit", "predict"):
        with pytest.raises(UserError, match=r"Example \d has \d+ tokens, more than fit into a row of 4: raise data\."):
            module(pool, validation=pool, batch_tokens=4, packing=True).setup(stage)


def test_command_line(pool: str, tmp_path: Path) -> None:
    """Every option is settable from a command line, the tokenizer as a path, and documented there."""
    byte_level().save_pretrained(tmp_path / "tokenizer")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data")
    arguments = [f"--data.train={pool}", f"--data.tokenizer={tmp_path / 'tokenizer'}", "--data.format=prompt_response"]
    config = parser.parse_args([*arguments, "--data.max_length=40"])
    data = parser.instantiate(config).data
    assert sorted(ids(data.pool_loader())) == OK
    text = parser.format_help()
    for option in ("train", "validation", "batch_tokens", "prompt_template", "selection", "seed", "packing"):
        assert f"--data.{option}" in text
    assert "Largest batch in tokens, padding included" in " ".join(text.split())
