import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from dualsft.data.examples import Examples, encode_examples, load_examples
from dualsft.data.options import FormatOptions
from dualsft.data.records import read_records
from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, FORGETFUL, SPECIAL, byte_level

RESPONSES = [
    "72",
    "She sold 48 clips.",
    "  indented\n\treturn  42 \n",
    "é ñ 日本語",
    "🙂👩‍👩‍👧 done",
    "x",
    "the sea " * 20,
]
TOKENIZERS: dict[str, dict[str, Any]] = {
    "bos": {},
    "bos and eos": {"adds": "<bos> $A <eos>"},
    "nothing": {"adds": "$A"},
    "trimmed": {"trim_offsets": True},
    "bytes": {"vocabulary": 261},
}


def encode(
    folder: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 2048,
    **options: Any,
) -> Examples:
    """Encodes rows as a JSON lines pool."""
    path = write_jsonl(folder / "pool.jsonl", rows)
    return encode_examples(read_records(path), tokenizer, FormatOptions(**options), max_length)


def learnt(examples: Examples, row: int) -> list[int]:
    """The ids that an example has for labels."""
    return [label for label in examples.dataset[row]["labels"] if label != -100]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_decode_to_the_response(tmp_path: Path, kind: str) -> None:
    """What is learnt is the response to the letter and one end-of-sequence token, whatever the tokenizer adds."""
    tokenizer = byte_level(**TOKENIZERS[kind])
    rows = [{"prompt": f"Où? 🙂 {i}", "response": text} for i, text in enumerate(RESPONSES)]
    examples = encode(tmp_path, rows, tokenizer)
    assert examples.status == ("ok",) * len(rows)
    for row, text in enumerate(RESPONSES):
        assert tokenizer.decode(learnt(examples, row)) == text + "<eos>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_the_tokenizers_own(tmp_path: Path, kind: str) -> None:
    """The ids are those of prompt and response read together, with its special tokens, closed by one <eos>."""
    tokenizer = byte_level(**TOKENIZERS[kind])
    rows = [{"prompt": "Write", "response": text} for text in RESPONSES]
    examples = encode(tmp_path, rows, tokenizer)
    for row, text in enumerate(RESPONSES):
        expected = tokenizer("Write\n" + text)["input_ids"]
        expected += [] if expected[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
        assert examples.dataset[row]["input_ids"] == expected
        assert examples.lengths[row] == len(expected)
        assert examples.num_tokens[row] == len(learnt(examples, row))


def test_tokens_of_spaces_are_learnt(tmp_path: Path) -> None:
    """A token of spaces alone counts even where the tokenizer reports no characters for it."""
    tokenizer = byte_level(trim_offsets=True)
    response = "a    b     "
    offsets = tokenizer(response, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    examples = encode(tmp_path, [{"prompt": "code", "response": response}], tokenizer)
    assert tokenizer.decode(learnt(examples, 0)) == response + "<eos>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_spaces_of_the_prompt_are_not_learnt(tmp_path: Path, trim_offsets: bool) -> None:
    """Neither are the spaces at the end of a prompt, unless one token joins them to the response."""
    tokenizer = byte_level(trim_offsets=trim_offsets)
    row = {"prompt": "code:    ", "response": "\n4"}
    examples = encode(tmp_path, [row], tokenizer, prompt_template="{prompt}")
    assert tokenizer.decode(learnt(examples, 0)) == "\n4<eos>"


def test_a_token_across_the_boundary_is_learnt(tmp_path: Path) -> None:
    """Prompt and response are tokenised together, and a token with a character of the response belongs to it."""
    tokenizer = byte_level()
    examples = encode(tmp_path, [{"prompt": "She", "response": "sold"}], tokenizer, prompt_template="{prompt} ")
    assert tokenizer.decode(learnt(examples, 0)) == " sold<eos>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_boundary_inside_unicode_text(tmp_path: Path, trim_offsets: bool) -> None:
    """Wherever a text is cut in two, no token that ends within the prompt is learnt and no response token is not."""
    tokenizer = byte_level(adds="<bos> $A", trim_offsets=trim_offsets)
    text = "é🙂 日👩‍👩‍👧!  sea"
    rows = [{"prompt": text[:cut], "response": text[cut:]} for cut in range(len(text))]
    examples = encode(tmp_path, rows, tokenizer, prompt_template="{prompt}")
    for cut, row in enumerate(rows):
        said = learnt(examples, cut)
        whole = examples.dataset[cut]["input_ids"]
        assert whole[len(whole) - len(said) :] == said
        prompt, response = whole[1 : len(whole) - len(said)], tokenizer.decode(said)
        assert row["response"] + "<eos>" in response
        assert len(str(tokenizer.decode(prompt)).replace("\ufffd", "")) <= cut


def test_first_token_has_no_label(tmp_path: Path) -> None:
    """Nothing predicts the first token, so it is never learnt; one token alone leaves nothing."""
    tokenizer = byte_level(adds="$A")
    examples = encode(tmp_path, [{"text": "the sea"}, {"text": "x"}], tokenizer)
    first = examples.dataset[0]
    assert first["labels"] == [-100, *first["input_ids"][1:]]
    assert examples.dataset[1]["labels"] == [-100, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    alone = encode(tmp_path, [{"text": "x"}], tokenizer)
    assert alone.status == ("empty",)
    assert alone.dataset[0]["labels"] == [-100]


@pytest.mark.parametrize("response", ["", "  \n", None])
def test_blank_responses_are_empty(tmp_path: Path, response: str | None) -> None:
    """A blank response is `empty` and has no label at all, its end-of-sequence token included."""
    for kind in TOKENIZERS.values():
        examples = encode(tmp_path, [{"prompt": "why", "response": response}], byte_level(**kind))
        assert examples.status == ("empty",)
        assert set(examples.dataset[0]["labels"]) == {-100}
        assert examples.num_tokens.tolist() == [0]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_truncation_at_every_length(tmp_path: Path, kind: str) -> None:
    """Cutting keeps the first tokens with the labels they had, and an example without labels left is `truncated`."""
    tokenizer = byte_level(**TOKENIZERS[kind])
    rows = [{"prompt": "What is the sea?", "response": "wide 🙂"}]
    whole = encode(tmp_path, rows, tokenizer).dataset[0]
    for max_length in range(2, len(whole["input_ids"]) + 2):
        examples = encode(tmp_path, rows, tokenizer, max_length)
        labels = whole["labels"][:max_length]
        left = sum(label != -100 for label in labels)
        cut = examples.dataset[0]
        assert cut["input_ids"] == whole["input_ids"][:max_length]
        assert cut["labels"] == labels
        assert examples.num_tokens.tolist() == [left]
        assert examples.status == ("ok" if left else "truncated",)


def test_chat_is_read_without_additions(tmp_path: Path) -> None:
    """A rendered conversation gets no special tokens but its template's, and learns every assistant turn."""
    tokenizer = byte_level(CHATML, adds="<bos> $A <eos>")
    contents = ["the sea?", "wide", "and 🙂?", "deep"]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    examples = encode(tmp_path, [{"messages": messages}], tokenizer)
    ids = examples.dataset[0]["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(learnt(examples, 0)) == "wide<|im_end|>\ndeep<|im_end|>\n"


def test_chat_whose_template_rewrites_turns(tmp_path: Path) -> None:
    """Labels follow the conversation as it is written in full, not as each turn was written when it was last."""
    tokenizer = byte_level(FORGETFUL)
    contents = ["the sea?", " wide\n", "and?", "deep", "so?", " "]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    examples = encode(tmp_path, [{"messages": messages}, {"messages": messages[4:]}], tokenizer)
    assert tokenizer.decode(learnt(examples, 0)) == "wide<|im_end|>\ndeep<|im_end|>\n"
    assert examples.status == ("ok", "empty")


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    """That no response ends in an end-of-sequence token is told, unless a chat template ends them."""
    tokenizer = byte_level(CHATML)
    rows: list[dict[str, Any]] = [{"prompt": "a", "response": "b"}]
    assert encode(tmp_path, rows, tokenizer).remarks == ()
    tokenizer.eos_token = None
    [remark] = encode(tmp_path, rows, tokenizer).remarks
    assert "no end-of-sequence token" in remark
    with pytest.warns(UserWarning, match="no end-of-sequence token"):
        load_examples(str(tmp_path / "pool.jsonl"), tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert encode(tmp_path, [{"messages": turns}], tokenizer).remarks == ()


def test_many_rows_equal_rows_alone(tmp_path: Path) -> None:
    """Encoding thousands of rows in chunks gives what each row gives alone, statuses included."""
    tokenizer = byte_level()
    generator = np.random.default_rng(0)
    rows = [
        {"prompt": "the sea " * int(generator.integers(0, 12)), "response": RESPONSES[i % 7] if i % 5 else " "}
        for i in range(1100)
    ]
    together = encode(tmp_path, rows, tokenizer, max_length=16)
    assert set(together.status) == {"ok", "empty", "truncated"}
    assert together.counts() == {status: together.status.count(status) for status in ("ok", "empty", "truncated")}
    assert together.ok_ids() == [i for i, status in enumerate(together.status) if status == "ok"]
    for row in (*range(0, 1100, 97), 511, 512, 1023, 1024, 1099):
        alone = encode(tmp_path, [rows[row]], tokenizer, max_length=16)
        assert together.dataset[row] == {**alone.dataset[0], "example_id": row}
        assert together.status[row] == alone.status[0]
        assert together.num_tokens[row] == alone.num_tokens[0]
        assert together.lengths[row] == alone.lengths[0]


def test_columns_and_fingerprint(tmp_path: Path) -> None:
    """The dataset has three columns, lives in memory, and its fingerprint tells its content."""
    rows = [{"prompt": "a", "response": "the sea is wide"}, {"prompt": "", "response": ""}]
    one, same, cut = (encode(tmp_path, rows, byte_level(), n) for n in (9, 9, 6))
    assert {name: str(feature) for name, feature in one.dataset.features.items()} == {
        "example_id": "Value('int64')",
        "input_ids": "List(Value('int32'))",
        "labels": "List(Value('int32'))",
    }
    assert one.dataset["example_id"][:] == [0, 1]
    assert one.dataset.cache_files == []
    assert one.dataset._fingerprint == same.dataset._fingerprint != cut.dataset._fingerprint


def test_literal_special_tokens(tmp_path: Path) -> None:
    """A response that spells the end-of-sequence token out at its end is not closed twice."""
    tokenizer = byte_level()
    examples = encode(tmp_path, [{"prompt": "a", "response": "b<eos>"}], tokenizer)
    assert tokenizer.decode(learnt(examples, 0)) == "b<eos>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_that_were_rendered_before(tmp_path: Path, kind: str) -> None:
    """A text or a prompt with special tokens of its own gets no second ones, and none that begins it is learnt."""
    tokenizer = byte_level(**TOKENIZERS[kind])
    rows = [{"text": "<bos>the sea<eos>"}, {"text": "<bos>the sea<eos>\n"}, {"text": "<bos>the sea"}]
    examples = encode(tmp_path, rows, tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in examples.dataset] == [
        "<bos>the sea<eos>",
        "<bos>the sea<eos>\n",
        "<bos>the sea<eos>",
    ]
    assert [tokenizer.decode(learnt(examples, row)) for row in range(3)] == [
        "the sea<eos>",
        "the sea<eos>\n",
        "the sea<eos>",
    ]
    prompts = encode(tmp_path, [{"prompt": "<bos>q", "response": "a"}], tokenizer)
    assert tokenizer.decode(prompts.dataset[0]["input_ids"]) == "<bos>q\na<eos>"


def test_texts_that_repeat_special_tokens(tmp_path: Path) -> None:
    """Special tokens elsewhere in a text stay as they are."""
    examples = encode(tmp_path, [{"text": "<bos><bos>a<bos>b<eos>c"}, {"text": ""}], byte_level(adds="<bos> $A <eos>"))
    texts = [byte_level().decode(row["input_ids"]) for row in examples.dataset]
    assert texts == ["<bos><bos>a<bos>b<eos>c<eos>", "<bos><eos>"]


def test_columns_of_other_types(tmp_path: Path) -> None:
    """Texts that Parquet stores as large strings, views, categories or dictionaries are the same texts."""
    texts = ["the sea", "é🙂"]
    expected = encode(tmp_path, [{"prompt": text, "response": text} for text in texts], byte_level()).dataset
    plain = pa.array(texts)
    for column in (plain.cast(pa.large_string()), plain.cast(pa.string_view()), plain.dictionary_encode()):
        pq.write_table(pa.table({"prompt": column, "response": column}), tmp_path / "pool.parquet")
        assert load_examples(str(tmp_path / "pool.parquet"), byte_level())[:] == expected[:]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_without_its_vocabulary(tmp_path: Path, kind: str) -> None:
    """A folder with a tokenizer's configuration alone is refused: its texts would have no tokens."""
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    with pytest.raises(UserError, match=r"vocabulary.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_load_examples(tmp_path: Path) -> None:
    """The public function takes a tokenizer's path and the format options, and gives the same dataset."""
    rows = [{"q": "the sea?", "a": "wide"}]
    options = {"prompt_column": "q", "response_column": "a", "prompt_template": "{prompt} "}
    expected = encode(tmp_path, rows, byte_level(), 5, **options).dataset
    byte_level().save_pretrained(tmp_path / "tokenizer")
    loaded = load_examples(str(tmp_path / "pool.jsonl"), str(tmp_path / "tokenizer"), max_length=5, **options)
    assert loaded[:] == expected[:]


def test_unusable_input(tmp_path: Path) -> None:
    """A missing tokenizer, a limit that leaves nothing and half a character are each refused in a sentence."""
    with pytest.raises(UserError, match="has no tokenizer: save one beside the model"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.max_length=1 leaves nothing"):
        encode(tmp_path, [{"text": "a"}], byte_level(), max_length=1)
    with pytest.raises(UserError, match=r"pool\.jsonl, line 1 \(row 0\): the text holds half a character"):
        encode(tmp_path, [{"text": "\ud83d"}], byte_level())


def test_slow_tokenizers_are_refused() -> None:
    """A tokenizer that cannot map tokens to characters is refused, naming what to use."""
    from transformers import ByT5Tokenizer

    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(ByT5Tokenizer())


def test_special_tokens_are_what_the_helper_says() -> None:
    """The tiny tokenizer holds its special tokens as single tokens (else these tests prove little)."""
    tokenizer = byte_level()
    assert [len(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in SPECIAL] == [1] * len(SPECIAL)
