"""Held-out loss and accuracy against the plain definition: one row at a time, all logits, float64."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.evaluation.held_out import Encoded, HeldOut, encode, held_out, measure, ratio, sums
from siftune.models.tokenize_rows import answer_tokens
from siftune.online.label_losses import MostLikely, cross_entropy
from siftune.records import Row
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    {"instruction": "Add.", "input": "1 + 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello, world! " * 6},
    {"instruction": "Name a colour " * 8, "input": "", "output": "blue"},
    {"instruction": "Count.", "input": "to four", "output": "1 2 3 4"},
    {"instruction": "?", "input": "", "output": "!"},
]


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plainly(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[float, float, int]:
    """Loss, accuracy and answer tokens from the model's own logits, in float64, row by row, unpadded."""
    precise = copy.deepcopy(model).double()
    loss, right, count = 0.0, 0, 0
    for ids, labels in rows:
        with torch.no_grad():
            logits = precise(torch.tensor([ids])).logits[0]
        for position in range(len(ids) - 1):
            aim = labels[position + 1]
            if aim == -100:
                continue
            loss -= float(torch.log_softmax(logits[position], dim=0)[aim])
            right += int(int(logits[position].argmax()) == aim)
            count += 1
    return loss / count, right / count, count


def tokens(text: str = "prompt", max_length: int = 200) -> list[tuple[list[int], list[int]]]:
    tokenizer = tiny_tokenizer()
    rows = [Row(i, "", row["instruction"], row["input"], row["output"]) for i, row in enumerate(ROWS)]
    made = []
    for row in rows:
        ids, labels = answer_tokens(row, tokenizer, text=text, max_length=max_length)
        made.append((ids, labels))
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "gpt_neox"])
@pytest.mark.parametrize("text", ["chat", "prompt"])
def test_loss_and_accuracy_are_those_of_the_definition(family: str, text: str) -> None:
    model = tiny_model(family)
    rows = tokens(text, 200)
    found = measure(model, Encoded(rows, {}), token_budget=300)
    loss, accuracy, count = plainly(model, rows)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.token_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert (found.tokens, found.rows) == (count, len(ROWS))


def test_some_tokens_are_predicted_right_so_that_accuracy_says_something() -> None:
    model, rows = tiny_model(), tokens()
    with torch.no_grad():
        said = [model(torch.tensor([ids])).logits[0].argmax(dim=1).tolist() for ids, _ in rows]
    rows = [(ids, [-100, *line[:3], *([-100] * (len(ids) - 4))]) for (ids, _), line in zip(rows, said, strict=True)]
    assert measure(model, Encoded(rows, {})).token_accuracy == 1.0
    wrong = [(ids, [-100 if x == -100 else (x + 1) % 261 for x in labels]) for ids, labels in rows]
    assert measure(model, Encoded(wrong, {})).token_accuracy == 0.0


def test_neither_batches_nor_the_order_of_rows_change_a_row() -> None:
    model, rows = tiny_model(), tokens()
    one = np.stack(sums(model, rows, token_budget=1))
    many = np.stack(sums(model, rows, token_budget=100_000))
    turned = np.stack(sums(model, rows[::-1], token_budget=150))[:, ::-1]
    np.testing.assert_allclose(many, one, rtol=1e-5)
    np.testing.assert_allclose(turned, one, rtol=1e-5)


def test_a_vocabulary_in_blocks_is_the_whole_one() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    target = torch.tensor([0, 49, 10, 20, 30, 40, 3])
    blocks = [(start, start + 10, logits[:, start : start + 10]) for start in range(0, 50, 10)]
    most_likely = MostLikely()
    loss = cross_entropy(most_likely.observe(blocks), target)
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert most_likely.tokens.tolist() == logits.argmax(dim=1).tolist()
    ties = MostLikely()
    cross_entropy(ties.observe([(0, 2, torch.zeros(1, 2)), (2, 4, torch.zeros(1, 2))]), torch.tensor([2]))
    assert ties.tokens.tolist() == [0], "the first of equal logits"


def test_a_lora_model_is_measured_with_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    rows = tokens()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_model(), config).eval()
    found = measure(model, Encoded(rows, {}))
    loss, _, _ = plainly(copy.deepcopy(model).merge_and_unload(), rows)
    base, _, _ = plainly(tiny_model(), rows)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert abs(base - loss) > 1e-2


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    measure(model, Encoded(tokens(), {}))
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())


def test_files_are_domains_and_every_row_is_counted_or_has_a_reason(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    long = {"instruction": "long " * 60, "input": "", "output": "never seen"}
    first = written(tmp_path / "a.jsonl", [*ROWS, long, {"instruction": "no answer", "output": ""}])
    second = written(tmp_path / "b.jsonl", ROWS[:2])
    found = held_out(model, tokenizer, {"a": first, "both": [second, first]}, text="prompt", max_length=128)
    assert list(found) == ["a", "both"]
    assert found["a"].rows == len(ROWS)
    assert found["a"].skipped == {"empty answer": 1, "no answer tokens after truncation": 1}
    assert found["both"].rows == len(ROWS) + 2
    loss, accuracy, count = plainly(model, tokens("prompt", 128))
    assert (found["a"].loss, found["a"].token_accuracy, found["a"].tokens) == (
        pytest.approx(loss, rel=1e-5),
        pytest.approx(accuracy),
        count,
    )
    assert held_out(model, tokenizer, {"a": first}, text="prompt", max_length=128, max_rows=2)["a"].rows == 2
    turned = written(tmp_path / "turned.jsonl", [long, *ROWS])
    some = held_out(model, tokenizer, {"a": turned}, text="prompt", max_length=128, max_rows=2)["a"]
    assert (some.rows, some.skipped) == (2, {"no answer tokens after truncation": 1})
    assert json.loads(json.dumps(found["a"].facts))["rows"] == len(ROWS)


def test_the_standard_error_is_the_spread_that_other_rows_would_show() -> None:
    draw = np.random.default_rng(0)
    whole = draw.integers(1, 60, size=400).astype(float)
    part = whole * draw.gamma(2.0, size=400)
    value, error = ratio(part, whole)
    again = draw.integers(0, 400, size=(4000, 400))
    bootstrap = (part[again].sum(axis=1) / whole[again].sum(axis=1)).std()
    assert value == part.sum() / whole.sum()
    assert error == pytest.approx(bootstrap, rel=0.05)
    assert math.isnan(ratio(part[:1], whole[:1])[1])
    found = measure(tiny_model(), Encoded(tokens(), {}))
    loss, _, count = sums(tiny_model(), tokens(), token_budget=8192)
    assert found.loss_stderr == ratio(loss, count)[1]


def test_rows_without_a_finite_loss_are_counted_apart() -> None:
    model, rows = tiny_model(), tokens()
    with torch.no_grad():
        model.get_input_embeddings().weight[rows[0][0][0]] = float("nan")
    found: HeldOut = measure(model, Encoded(rows, {"bad": 1}))
    spoilt = sum(rows[0][0][0] in ids[:-1] for ids, _ in rows)
    assert found.skipped == {"bad": 1, "loss not finite": spoilt}
    assert found.rows == len(rows) - spoilt


def test_refusals_name_the_place_and_the_way_out(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    good = written(tmp_path / "good.jsonl", ROWS)
    empty = written(tmp_path / "empty.jsonl", [{"instruction": "x " * 90, "output": "y"}])
    with pytest.raises(UserError, match=r"held-out maths: none of the rows of .*empty\.jsonl"):
        held_out(model, tokenizer, {"maths": empty}, text="prompt", max_length=32)
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        held_out(model, tokenizer, {"maths": tmp_path / "absent.jsonl"})
    with pytest.raises(UserError, match="max_rows must be >= 1, got 0"):
        held_out(model, tokenizer, {"maths": good}, max_rows=0)
    with pytest.raises(UserError, match="no held-out file"):
        held_out(model, tokenizer, {})
    with pytest.raises(UserError, match="chat template"):
        held_out(model, tiny_tokenizer(template=False), {"maths": good}, text="chat")
    with pytest.raises(UserError, match=r"gives token \d+, and the model's vocabulary has 50"):
        held_out(tiny_model(vocabulary=50), tokenizer, {"maths": good}, text="prompt")
    with pytest.raises(UserError, match="token_budget must be >= 1, got 0"):
        held_out(model, tokenizer, {"maths": good}, token_budget=0)


def test_a_row_is_cut_at_the_models_own_positions(tmp_path: Path) -> None:
    long = {"instruction": "a", "input": "", "output": "word " * 300}
    found = held_out(
        tiny_model("gpt2"), tiny_tokenizer(), {"x": written(tmp_path / "x.jsonl", [long])}, max_length=4096
    )
    assert found["x"].tokens < 512


def test_encode_needs_no_model(tmp_path: Path) -> None:
    encoded = encode(tiny_tokenizer(), {"x": written(tmp_path / "x.jsonl", ROWS)}, text="prompt")
    assert encoded["x"].rows == tokens("prompt", 512)
