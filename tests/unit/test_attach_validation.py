"""GREATS with a file of validation rows: tokenised as the trainer's rows are, or refused in one sentence at attach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import siftune
from siftune.errors import UserError
from siftune.online.greats import Greats
from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import ledger, trainer

ROWS = [{"instruction": f"say {word}", "output": word} for word in ("apple", "pear", "a plum", "fig")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_hand(row: dict[str, Any]) -> dict[str, list[int]]:
    """Question, newline, answer, end: one token per byte after the special ones, so this is all there is to it."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize(f"{row['instruction']}\n")]
    answer = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize(row["output"])]
    answer.append(tokenizer.eos_token_id)
    return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}


def trained(folder: Path, validation: Any, **options: Any) -> list[dict[str, Any]]:
    """The ledger of a short run."""
    live = trainer(folder, max_steps=4)
    siftune.attach(live, Greats(keep=3, validation=validation, validation_rows=2, **options), quiet=True)
    live.train()
    return ledger(folder)


def test_a_file_is_the_same_as_its_rows_tokenised_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "held-out.jsonl", ROWS)
    said = trained(tmp_path / "file", path, validation_text="prompt")
    assert said == trained(tmp_path / "rows", [by_hand(row) for row in ROWS])
    others = trained(tmp_path / "chat", str(path), validation_text="chat")
    assert [line["influence"] for line in said] != [line["influence"] for line in others]


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "held-out.jsonl", ROWS)
    live = trainer(tmp_path / "out")
    live.args.max_length = 12  # as SFTConfig has it: "say a plum\n" leaves one token of the answer, "say apple\n" two
    siftune.attach(live, Greats(keep=3, validation=path, validation_text="prompt"))
    assert "validation rows" not in capsys.readouterr().err
    siftune.detach(live)
    live.args.max_length = 10
    selector = Greats(keep=3, validation=path, validation_text="prompt")
    siftune.attach(live, selector)
    assert "2 of 4 validation rows are left out: 2 x no answer tokens after truncation" in capsys.readouterr().err
    assert [len(batch["input_ids"]) for batch in selector._batches or []] == [2]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (None, {}, "held-out.jsonl"),
        ([{"question": "what?"}], {}, "held-out.jsonl"),
        ([{"instruction": "long" * 30, "output": "x"}], {"validation_text": "prompt"}, "no row with a label token"),
        ([{"text": "words alone"}], {"validation_text": "chat"}, "text: prompt"),
        (ROWS, {"validation_text": "plain"}, "validation_text='plain'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, rows: list[dict[str, Any]] | None, options: dict[str, Any], said: str
) -> None:
    path = tmp_path / "held-out.jsonl"
    if rows is not None:
        write(path, rows)
    live = trainer(tmp_path / "out")
    live.args.max_length = 60
    with pytest.raises(UserError, match=said) as caught:
        siftune.attach(live, Greats(keep=3, validation=path, **options), quiet=True)
    assert "\n" not in str(caught.value)
    siftune.attach(live, Greats(keep=3, validation=tiny_batch([9, 14])), quiet=True)  # nothing was left half attached


def test_without_a_tokenizer_it_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "held-out.jsonl", ROWS)
    live = trainer(tmp_path / "out")
    live.processing_class = None
    with pytest.raises(UserError, match="processing_class=tokenizer"):
        siftune.attach(live, Greats(keep=3, validation=path), quiet=True)
    own_loop = Greats(keep=1, validation=path, learning_rate=0.1)
    with torch.random.fork_rng(), pytest.raises(UserError, match="tokenised rows"):
        own_loop.select(tiny_model("llama", layers=1), tiny_batch([5, 9]))
