"""Chat templates: pieces of real ones, put together anew, some of which never end or fail."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_examples
from dualsft.data import formats
from dualsft.data.limits import limited
from tests.fuzz.harness import Fuzzer
from tests.world import templates
from tests.world.data import write_jsonl
from tests.world.tokenizers import CHATML, RESTLESS, STRICT, byte_level

USUAL = [
    "<|im_start|>{{ m.role }}\n",
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.content.split('</think>')[-1] }}",
    "<|im_end|>\n",
    "{{ eos_token }}",
    "{{ bos_token }}",
    "{% if tools %}{{ tools | tojson }}{% endif %}",
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
    "{{ tools | tojson }}",
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
REAL = [CHATML, RESTLESS, STRICT, *(text for name, text in vars(templates).items() if name.isupper())]
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
    template = draw(st.sampled_from(REAL))
    first = draw(st.integers(0, len(template)))
    last = draw(st.integers(first, min(len(template), first + 20)))
    return template[:first] + draw(st.sampled_from(["", *USUAL, *ODD])) + template[last:]


def _render(template: str, folder: Path) -> None:
    with patch.object(formats, "limited", partial(limited, seconds=0.3, size=2**28)):  # so that many cases take minutes
        load_examples(write_jsonl(folder / "pool.jsonl", ROWS), byte_level(template), max_length=64)


TEMPLATES = Fuzzer(st.one_of(*[_made()] * 3, _cut(), st.text(max_size=20)), _render)
