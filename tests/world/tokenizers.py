"""Tiny real tokenizers, trained in memory on a few sentences."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SENTENCES = [
    "How many clips did Natalia sell altogether in April and May?",
    "She sold 48 clips in April and 24 clips in May, so 72 clips in all.",
    "Write a short poem about the sea: the sea is wide, the sea is deep.",
    "user assistant system think\n\nWhat is the capital of France? Paris.",
    "    indented code:\n        return 42\n",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the assistant's last turn gets an (empty) block of thought, earlier ones lose theirs.
FORGETFUL = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if loop.index0 > ns.last %}<think>\n{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Numbers the turns from the end, so that a prompt is no prefix of the whole.
RESTLESS = (
    "{% for m in messages %}{{ messages | length - loop.index0 }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = CHATML.replace(
    "<|im_start|>{{ m.role }}",
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}",
)


def byte_level(
    template: str | None = None, adds: str = "<bos> $A", trim_offsets: bool = False, vocabulary: int = 400
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer.

    Args:
        template: Chat template.
        adds: What it puts around a text, in the notation of ``TemplateProcessing``.
        trim_offsets: Whether it reports character ranges without their white space, as GPT-NeoX's does.
        vocabulary: Number of tokens; the 256 bytes and the special ones come first.
    """
    tokenizer = Tokenizer.from_str(_trained(vocabulary))
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single=adds, special_tokens=ids),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=100_000
    )
    fast.chat_template = template
    return fast


@cache
def _trained(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())
