"""Chat templates: pieces of real ones, put together anew, some of which never end or fail."""

from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_examples
from tests.fuzz.harness import Fuzzer
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, FORGETFUL, RESTLESS, STRICT, byte_level

USUAL = [
    "<|im_start|>{{ m.role }}\n",
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.content.split('</think>')[-1] }}",
    "<|im_end|>\n",
    "{{ eos_token }}",
    "{{ bos_token }}",
    "{{ m.tool_calls | tojson }}",
    "{{ tools | tojson }}",
    "{% generation %}{{ m.content }}{% endgeneration %}",
    "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}",
    "{% for i in range(3) %}{{ i }}{% endfor %}",
]
ODD = [
    "{{ loop.index0 }}",
    "{{ 1 // (loop.index0 - 1) }}",
    "{{ m.content * 3 }}",
    "{{ m.content * 1000000000 }}",
    "{{ 'x' * (10 ** 12) }}",
    "{{ range(10 ** 8) | list | length }}",
    "{{ messages[5].content }}",
    "{{ m.content[::-1] }}",
    "{{ m | length }}",
    "{{ none + 1 }}",
    "{{ raise_exception('No.') }}",
    "{{ strftime_now('%Y') }}",
    "{{ undefined_name.attribute }}",
    "{{ m.__class__.__mro__ }}",
    "{% if add_generation_prompt %}<think>\n{% endif %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x + 'y' %}{% endfor %}{{ ns.x }}",
    "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    "{% if %}",
    "{{",
    "{% endfor %}",
]
WHOLE = ["{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"]
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>so</think>Hello"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
]


@st.composite
def _made(draw: DrawFn) -> str:
    """Headers and contents in a loop, with a few odd pieces in, before and behind it."""
    usual = st.sampled_from(USUAL)
    turn = [*draw(st.lists(usual, max_size=2)), "{{ m.content }}", *draw(st.lists(usual, max_size=2))]
    parts = [WHOLE[0], *turn, WHOLE[1], draw(st.sampled_from(["", WHOLE[2]]))]
    for _ in range(draw(st.integers(0, 2))):
        parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from(ODD)))
    return "".join(parts)


@st.composite
def _cut(draw: DrawFn) -> str:
    """A sound template in which a part is gone, or replaced by another piece."""
    template = draw(st.sampled_from([CHATML, FORGETFUL, RESTLESS, STRICT]))
    first = draw(st.integers(0, len(template)))
    last = draw(st.integers(first, min(len(template), first + 20)))
    return template[:first] + draw(st.sampled_from(["", *USUAL, *ODD])) + template[last:]


def _render(template: str, folder: Path) -> None:
    load_examples(write_jsonl(folder / "pool.jsonl", ROWS), byte_level(template), max_length=64)


TEMPLATES = Fuzzer(_made() | _cut() | st.text(max_size=20), _render)
