"""Trains the embedded tiny model and its tokenizer on the embedded corpus alone; writes `assets/model/`.

    python -m tools.demo.train_model --out siftune/demo/assets/model

A Llama of 1.8 M weights (5 layers, width 160, vocabulary 2,048), float32 safetensors of about 7 MB. Cost: 3.3 million
tokens, about twelve minutes on one core. Seeded: the same machine, versions and one thread give the same weights.
Shapes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from siftune.data.protect import foreign_name
from siftune.demo.embedded import MODEL
from siftune.files import read_json, write_json
from siftune.output import as_json, say

from . import grammars, prompts

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}{{ message['content'] + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words with the space before them, single digits, runs of signs, runs of white space."""


def build_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens trained on the corpus, with the chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    texts = [_plain(row) for row in grammars.rows(12_000, seed)]
    texts += [message["content"] for index in range(400) for message in prompts.conversation(rng, seed + index)]
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[0], pad_token=SPECIAL[3], model_max_length=1024, padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Endless token lists: requests for rows with their answers (two fifths), rows as chat, rows as plain text.

    Requests need a large share because only a few tokens of each decide its domain: with a share of an eighth the model
    wrote rows of other domains than requested.
    """
    rng = random.Random(seed)
    for epoch in range(10_000):
        for row in grammars.rows(6000, seed + 1 + epoch):
            drawn = rng.random()
            if drawn < 0.4:
                text = _chat(tokenizer, prompts.conversation(rng, rng.randrange(2**31)))
            elif drawn < 0.7:
                text = _chat(tokenizer, messages(row))
            else:
                text = _plain(row)
            yield [*tokenizer.encode(text, add_special_tokens=False), int(tokenizer.eos_token_id)]


def batches(tokenizer: PreTrainedTokenizerFast, *, rows: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Concatenated documents, `(B, T)` tokens at a time."""
    buffer: list[int] = []
    for tokens in documents(tokenizer, seed):
        buffer += tokens
        while len(buffer) >= rows * length:
            yield torch.tensor(buffer[: rows * length]).view(rows, length)
            buffer = buffer[rows * length :]


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    """A row as one turn of chat."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, count: int = 300, seed: int = 0
) -> float:
    """Mean cross-entropy per token, in nats, over held-out rows as plain text."""
    total, tokens = 0.0, 0
    for row in grammars.held_out(count, seed):
        ids = torch.tensor([tokenizer.encode(_plain(row), add_special_tokens=False)])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


def train(out: Path, *, steps: int, rows: int, length: int, rate: float, vocabulary: int, seed: int) -> dict[str, Any]:
    """Train from scratch and save model, tokenizer and `training_log.json` into `out`; returns the log."""
    tokenizer = build_tokenizer(vocabulary, seed)
    model = build_model(tokenizer, seed)
    started = time.monotonic()
    losses = fit(model, batches(tokenizer, rows=rows, length=length, seed=seed), steps=steps, rate=rate)
    seconds = time.monotonic() - started
    out.mkdir(parents=True, exist_ok=True)
    sampled = model.generation_config  # servers sample only where the model's folder enables it
    assert sampled is not None
    sampled.do_sample, sampled.temperature, sampled.top_p = True, 0.9, 0.95
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokenizer_config = read_json(out / "tokenizer_config.json")  # a name that transformers 4 also knows
    write_json(out / "tokenizer_config.json", tokenizer_config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (out / "model.safetensors").chmod(0o644)  # written as 0600; other users must be able to read it
    settings = {"steps": steps, "rows": rows, "length": length, "rate": rate, "vocabulary": vocabulary, "seed": seed}
    log = {
        "command": "python -m tools.demo.train_model "
        + " ".join(f"--{name} {value}" for name, value in settings.items()),
        "data": "tools/demo/grammars.py (pool part) and tools/demo/prompts.py, nothing else",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * rows * length,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "held_out_loss": round(held_out_loss(model, tokenizer), 4),
        "uniform_loss": round(math.log(len(tokenizer)), 4),
        "losses": losses,
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


def fit(model: LlamaForCausalLM, source: Iterator[torch.Tensor], *, steps: int, rate: float) -> list[dict[str, Any]]:
    """`steps` steps of AdamW, warmed up, then a cosine decay to a twentieth; returns the logged losses."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warm = min(50, steps // 10 + 1)
    started, tokens, losses = time.monotonic(), 0, []
    for step in range(1, steps + 1):
        past = (step - warm) / max(1, steps - warm)
        share = step / warm if step < warm else 0.05 + 0.475 * (1 + math.cos(math.pi * past))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        ids_BT = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # twice as fast on one core; the weights stay float32
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids_BT.numel()
        if step % 25 == 0 or step == steps:
            losses.append({"step": step, "loss": round(loss.item(), 4)})
            speed = tokens / (time.monotonic() - started)
            say(f"step {step}/{steps} loss {loss.item():.3f} {speed:,.0f} tokens/s")
    model.eval()
    return losses


def _plain(row: dict[str, str]) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def _chat(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip("\n")


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    if (
        options["out"].resolve() != MODEL.resolve()
        and options["out"].exists()
        and foreign_name(options["out"]) is not None
    ):
        parser.error(f"--out {options['out']} is not empty; pass a new or empty folder")
    torch.set_num_threads(1)
    log = train(options.pop("out"), **options)
    say(as_json({key: value for key, value in log.items() if key != "losses"}, indent=1), multiline=True)


if __name__ == "__main__":
    main()
