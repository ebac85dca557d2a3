"""What it costs to tell exactly which tokens of a conversation are learnt, against rendering and tokenising it alone.

    python benchmarks/rendering.py                  about half a minute
    python benchmarks/rendering.py --turns 2 16

For each shape of chat template and number of turns: CPU seconds per 1,000 records of transformers'
`apply_chat_template`, one record at a time as a script would map it over its data, and the ratios to it of
`apply_chat_template` with ``return_assistant_tokens_mask`` (which only a template with `{% generation %}` blocks has)
and of `encode_examples`. Medians over rounds of the ratio within a round. Where both mark tokens they mark the same
ones, or the program ends.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import dualsft
from dualsft.data.examples import encode_examples
from dualsft.data.files import SourceLine
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records, build_records
from dualsft.data.tokenizer import load_tokenizer

MODEL = Path(dualsft.__file__).parent / "quickstart" / "assets" / "model"
_LOOP = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|assistant|>\n"
TEMPLATES = {
    "turn by turn": f"{_LOOP}{_PROMPT}{{% endif %}}",
    "ends in eos": f"{_LOOP}{_PROMPT}{{% else %}}{{{{ eos_token }}}}{{% endif %}}",
    "drops thoughts": _LOOP.replace("m.content", "m.content if loop.last else m.content.split('</think>')[-1]")
    + f"{_PROMPT}{{% endif %}}",
    "marks what is generated": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    f"{_PROMPT}{{% endif %}}",
}
"""Shape -> template: turn by turn as ChatML, with an end of its own as Phi-3's, and dropping thoughts as Qwen3's."""


def conversations(count: int, turns: int) -> list[list[dict[str, str]]]:
    """Conversations of 20 words a turn, of which each answer begins with a thought."""
    draw, words = random.Random(count), ["the", "sea", "is", "deep", "and", "one", "plus", "two", "makes", "three"]

    def turn(number: int) -> dict[str, str]:
        said = " ".join(draw.choices(words, k=20))
        if number % 2 == 0:
            return {"role": "user", "content": said}
        return {"role": "assistant", "content": f"<think>hm</think>{said}"}

    return [[turn(number) for number in range(turns)] for _ in range(count)]


def plain(tokenizer: PreTrainedTokenizerBase, given: list[Any], marking: bool) -> list[Any]:
    """Each conversation through `apply_chat_template`."""
    return [tokenizer.apply_chat_template(one, return_dict=True, return_assistant_tokens_mask=marking) for one in given]


def encode(tokenizer: PreTrainedTokenizerBase, records: Records) -> Any:
    """The examples of all records."""
    return encode_examples(records, tokenizer, FormatOptions(), 1 << 20).dataset


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of a call, of all its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def check(tokenizer: PreTrainedTokenizerBase, given: list[Any], records: Records) -> None:
    """Compare ids and marked tokens with those of `apply_chat_template`."""
    examples = encode(tokenizer, records)
    for one, example in zip(plain(tokenizer, given, marking=True), examples, strict=True):
        assert one["input_ids"] == example["input_ids"]
        assert one["assistant_masks"] == [int(label != -100) for label in example["labels"]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = load_tokenizer(str(MODEL))
    print(f"{'template':24} turns   plain s  plain with mask  encode_examples")
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        for turns in options.turns:
            given = conversations(options.records, turns)
            lines = [SourceLine(json.dumps({"messages": one}), "records", k) for k, one in enumerate(given, start=1)]
            records, marks = build_records(lines), "{% generation %}" in template
            if marks:
                check(tokenizer, given, records)
            ways: dict[str, Callable[[], object]] = {
                "plain": partial(plain, tokenizer, given, marking=False),
                "ours": partial(encode, tokenizer, records),
                **({"mask": partial(plain, tokenizer, given, marking=True)} if marks else {}),
            }
            rounds = [{way: cpu_seconds(work) for way, work in ways.items()} for _ in range(options.rounds + 1)][1:]
            took = statistics.median(one["plain"] for one in rounds) / options.records * 1000
            ratio = {way: statistics.median(one[way] / one["plain"] for one in rounds) for way in ways}
            mask = f"{ratio['mask']:.2f}" if marks else "-"
            print(f"{name:24} {turns:5} {took:9.3f} {mask:>16} {ratio['ours']:16.2f}", flush=True)


if __name__ == "__main__":
    main()
