r"""Pre-train the tiny base model of the quick start: `python -m dev.quickstart.pretrain --output_dir DIR`.

The texts are the generated general tasks (`dev.quickstart.tasks`) and, for 2% of the rows (one token in six), a
shipped excerpt of GSM8K, so that the model knows the general tasks and only a little about mathematics. One example
reads `<|bos|>{prompt}\n{response}<|eos|>`; a tenth of the general rows are laid out by the chat template instead, so
that its role markers mean something. Response tokens (with the end marker) weigh 1 in the loss and prompt tokens 0.1:
the answers are what the model must learn, and a little language modelling of the prompts teaches it the words (in one
trial of 300 steps, both held-out losses came out lower than with the loss on the responses alone).

Nothing but the shipped files and the generator goes in, and the number of steps is fixed, so that the same command
gives the same model up to the rounding of the machine.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dev.quickstart.make_data import DATA, read_jsonl
from dev.quickstart.tasks import Row, generate, stream

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHECK_ROWS = 16  # the first rows of each test file, whose losses are recorded apart as a quick check of the weights


class Example(NamedTuple):
    """Token ids, and how many of the first of them belong to the prompt."""

    ids: list[int]
    prompt_length: int


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny base model of the quick start.")
    add = parser.add_argument
    add("--output_dir", type=Path, required=True)
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=7000)
    add("--batch_tokens", type=int, default=768, help="most tokens of one batch, padding included")
    add("--lr", type=float, default=2e-3)
    add("--warmup_steps", type=int, default=200)
    add("--weight_decay", type=float, default=0.01)
    add("--prompt_weight", type=float, default=0.1, help="weight of prompt tokens in the loss")
    add("--gsm8k_share", type=float, default=0.02, help="share of GSM8K among the rows")
    add("--chat_share", type=float, default=0.1, help="share of the general rows laid out by the chat template")
    add("--vocab_size", type=int, default=2048)
    add("--hidden_size", type=int, default=192)
    add("--intermediate_size", type=int, default=512)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=6)
    add("--max_length", type=int, default=512)
    add("--eval_every", type=int, default=500)
    add("--threads", type=int, default=2)
    return parser.parse_args(argv)


def build_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose digits are always separate tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(row: Row, tokenizer: PreTrainedTokenizerFast, chat: bool = False) -> Example:
    """Lay out one row, plainly or by the chat template."""
    start = f"{USER}{row['prompt']}\n{ASSISTANT}" if chat else f"{row['prompt']}\n"
    prompt = tokenizer.encode(start)
    response = tokenizer.encode(f"{row['response']}{EOS}", add_special_tokens=False)
    return Example((prompt + response)[: tokenizer.model_max_length], len(prompt))


def batches(examples: list[Example], batch_tokens: int) -> list[list[Example]]:
    """Cut examples, sorted by length, into batches of at most `batch_tokens` tokens with padding."""
    result: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: len(one.ids)):
        if not result or (len(result[-1]) + 1) * len(example.ids) > batch_tokens:
            result.append([])
        result[-1].append(example)
    return result


def training_batches(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Example]]:
    """Yield batches for ever: rows are drawn a few thousand at a time, batched by length, batches in random order."""
    rng = Random(args.seed)
    general = stream("pretrain", args.seed)
    gsm8k_rows = read_jsonl(DATA / "gsm8k_pretrain.jsonl")
    rng.shuffle(gsm8k_rows)
    gsm8k = cycle(gsm8k_rows)
    while True:
        chunk = []
        for _ in range(4096):
            if rng.random() < args.gsm8k_share:
                chunk.append(encode(next(gsm8k), tokenizer))
            else:
                chunk.append(encode(next(general), tokenizer, chat=rng.random() < args.chat_share))
        cut = batches(chunk, args.batch_tokens)
        rng.shuffle(cut)
        yield from cut


def weighted_loss(
    model: LlamaForCausalLM, batch: list[Example], prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed weighted loss of a batch and the sum of the weights."""
    length = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : example.prompt_length] = prompt_weight
        weights[row, example.prompt_length : len(example.ids)] = 1.0
    # padding stands on the right, so causal attention needs no mask
    targets, weights = ids[:, 1:], weights[:, 1:]
    used = weights > 0
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = functional.cross_entropy(model.lm_head(hidden[used]), targets[used], reduction="none")
    return (losses * weights[used]).sum(), weights.sum()


@torch.no_grad()
def response_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Return the mean loss, in nats per response token with the end marker, over all tokens of the rows."""
    model.eval()
    total, count = 0.0, 0.0
    for batch in batches([encode(row, tokenizer) for row in rows], 4096):
        loss, weight = weighted_loss(model, batch, prompt_weight=0.0)
        total, count = total + loss.item(), count + weight.item()
    model.train()
    return total / count


def held_out_rows() -> dict[str, list[Row]]:
    """Read the test files; training never sees them."""
    return {"general": read_jsonl(DATA / "test_general.jsonl"), "gsm8k": read_jsonl(DATA / "test_target.jsonl")}


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights as bfloat16, configuration and tokenizer, replacing what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train, write the log and keep the latest weights in the output folder."""
    held_out = held_out_rows()
    model = build_model(args, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )

    def rate(step: int) -> float:
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, tokens, rows, recent = time.monotonic(), 0, 0, []
    with (args.output_dir / "pretrain_log.csv").open("w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["step", "tokens", "train_loss", "held_out_general_loss", "held_out_gsm8k_loss"])
        for step, batch in enumerate(islice(training_batches(args, tokenizer), args.steps), start=1):
            loss, weight = weighted_loss(model, batch, args.prompt_weight)
            (loss / weight).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens, rows = tokens + sum(len(example.ids) for example in batch), rows + len(batch)
            recent.append((loss / weight).item())
            if step % args.eval_every == 0 or step == args.steps:
                losses = [response_loss(model, tokenizer, some) for some in held_out.values()]
                line = [step, tokens, *(f"{value:.4f}" for value in (sum(recent) / len(recent), *losses))]
                log.writerow(line)
                file.flush()
                recent.clear()
                save(model, tokenizer, args.output_dir / "model")
                print(*line, f"{tokens / (time.monotonic() - start):.0f} tokens/s", flush=True)
    return model, {"rows": rows, "tokens": tokens, "seconds": round(time.monotonic() - start)}


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.disable_progress_bar()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    texts = [*generate("pretrain", 6000, args.seed), *read_jsonl(DATA / "gsm8k_pretrain.jsonl")]
    tokenizer = build_tokenizer([f"{r['prompt']}\n{r['response']}" for r in texts], args.vocab_size, args.max_length)
    _, figures = train(args, tokenizer)
    model = LlamaForCausalLM.from_pretrained(args.output_dir / "model", dtype=torch.float32)  # the rounded weights
    held_out = held_out_rows()
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    defaults = vars(parse_args(["--output_dir", "."]))
    changed = "".join(f" --{name} {value}" for name, value in settings.items() if value != defaults[name])
    record = {
        "command": f"python -m dev.quickstart.pretrain --output_dir DIR{changed}",
        "settings": settings,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **figures,
        "held_out_loss": {name: round(response_loss(model, tokenizer, rows), 4) for name, rows in held_out.items()},
        "check": {
            "rows": CHECK_ROWS,
            **{name: round(response_loss(model, tokenizer, rows[:CHECK_ROWS]), 4) for name, rows in held_out.items()},
        },
        "loss": "nats per response token with the end marker, in float32 with the saved bfloat16 weights",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.output_dir / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
