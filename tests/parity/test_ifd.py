"""IFD against its naive definition: one row at a time, whole logits, float64, tokens found by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from siftune.data.load import load_pool
from siftune.errors import UserError
from siftune.models.causal_lm import CausalLM, logits, mean_losses
from siftune.offline.ifd import IFD
from siftune.records import Scores
from tests.pools import make_pool
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add the two numbers.", "input": "1 and 2", "output": "3"},
    {"instruction": "Name a colour.", "input": "", "output": "Blue, like the sea: \u6d77."},
    {"instruction": "Say it again", "input": "again and again", "output": "again and again and again"},
    {"instruction": "Write code.", "input": "", "output": "def f(x):\n    return x + 1\n"},
    {"instruction": "emoji?", "input": "", "output": "\U0001f600 yes"},
    {"instruction": "Count.", "input": "", "output": " 1 2 3 4 5 6 7 8 9"},
] + [{"instruction": "q" * (3 + i), "input": "", "output": "ab " * (1 + i % 7) + "z"} for i in range(24)]


def naive_loss(model: Any, ids: list[int], first: int) -> float:
    """Mean cross-entropy of ids[first:], each given all before it."""
    with torch.no_grad():
        out = model(torch.tensor([ids])).logits[0].double()
    losses = [float(torch.logsumexp(out[t - 1], 0) - out[t - 1][ids[t]]) for t in range(first, len(ids))]
    return sum(losses) / len(losses)


def naive_ifd(model: Any, before: list[int], answer: list[int], start: list[int], ratio: str) -> float:
    asked = naive_loss(model, start + before + answer, len(start) + len(before))
    alone = naive_loss(model, start + answer, len(start)) if start else naive_loss(model, answer, 1)
    return math.exp(asked) / math.exp(alone) if ratio == "perplexity" else asked / alone


def byte_ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def raw_ratios(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **settings: Any) -> Scores:
    """Scores with the ratios above 1 left in, so that a random model's rows all take part in the comparison."""
    from siftune.offline import ifd as loss

    monkeypatch.setattr(loss, "_dropped", lambda rows, ratio_B: {})
    pool = make_pool(rows)
    return IFD(model=str(folder), device="cpu", **settings).fit(pool).score(pool)


@pytest.mark.filterwarnings("error:the head of model")  # the slow way would be right, too
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "qwen3"])
@pytest.mark.parametrize("ratio", ["perplexity", "loss"])
def test_every_row_equals_the_naive_definition(
    family: str, ratio: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", family)
    scores = raw_ratios(folder, monkeypatch, ROWS, ratio=ratio, token_budget=128)
    model = tiny_model(family).double()
    for number, row in enumerate(ROWS):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part) + "\n"
        expected = naive_ifd(model, byte_ids(question), byte_ids(row["output"]), [2], ratio)
        assert scores.values[number] == pytest.approx(expected, rel=2e-5), (number, row)
        assert scores.tokens is not None
        assert scores.tokens[number] == len(byte_ids(question + row["output"]))


def test_paper_puts_no_start_token_and_leaves_out_the_first_token_below_the_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    scores = raw_ratios(folder, monkeypatch, ROWS, compat="paper")
    model = tiny_model("gpt2").double()
    assert scores.reasons == {0: "one answer token alone, which nothing comes before"}
    for number, row in list(enumerate(ROWS))[1:]:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part) + "\n"
        expected = naive_ifd(model, byte_ids(question), byte_ids(row["output"]), [], "perplexity")
        assert scores.values[number] == pytest.approx(expected, rel=2e-5)


def test_chat_rows_go_through_the_template_and_count_the_last_answers_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    talk = [
        ("system", "Be brief."),
        ("user", "Hi, hello"),
        ("assistant", "hello"),
        ("user", "Hm"),
        ("assistant", "hello"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    scores = raw_ratios(folder, monkeypatch, [row])
    marks = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in talk[:-1])
    expected = naive_ifd(
        tiny_model("llama").double(), byte_ids(marks + "<|im_start|>assistant\n"), byte_ids("hello"), [2], "perplexity"
    )
    assert scores.values[0] == pytest.approx(expected, rel=2e-5)


def test_a_prompt_file_stands_in_place_of_the_rows_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    (tmp_path / "prompt.txt").write_text("Task: {instruction} [{input}] {other}\n>>\n")
    row = {"instruction": "Fill {input}", "input": "{answer}", "output": "done it"}
    scores = raw_ratios(folder, monkeypatch, [row], prompt=str(tmp_path / "prompt.txt"))
    before = "Task: Fill {input} [{answer}] {other}\n>>"
    expected = naive_ifd(tiny_model("llama").double(), byte_ids(before), byte_ids("done it"), [2], "perplexity")
    assert scores.values[0] == pytest.approx(expected, rel=2e-5)


def test_real_rows_and_a_real_model(shared: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Real sub-word tokens: the answer's are those whose characters lie in it, whatever stands before."""
    pool = load_pool(shared / "data" / "pools" / "common_sense_heldout.jsonl.gz", on_bad_row="skip")
    rows = pool.eligible[:60].tolist()
    originals = pool.source.originals(rows)
    few = make_pool([{key: row[key] or "" for key in ("instruction", "input", "output")} for row in originals])
    scores = IFD(model=str(tiny_base), device="cpu", max_length=400).fit(few).score(few)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    seen = {"scored": 0, "above": 0, "long": 0}
    for number, row in enumerate(few.source.originals(range(len(few)))):
        text = "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)
        read = tokenizer(text, return_offsets_mapping=True)
        ids = read["input_ids"]
        begin = len(text) - len(row["output"])
        first = next(t for t, (_, end) in enumerate(read["offset_mapping"]) if end > begin)
        if ids[0] != start:
            ids, first = [start, *ids], first + 1
        if len(ids) > 400:
            assert scores.reasons[number].startswith("truncated: ")
            seen["long"] += 1
            continue
        alone = [start, *ids[first:]]
        expected = math.exp(naive_loss(model, ids, first) - naive_loss(model, alone, 1))
        if expected > 1:
            assert scores.reasons[number].startswith("ratio above 1: ")
            assert float(scores.reasons[number].split()[3].rstrip(",")) == pytest.approx(expected, rel=1e-3)
            seen["above"] += 1
        else:
            assert scores.values[number] == pytest.approx(expected, rel=1e-4)
            seen["scored"] += 1
    assert seen["scored"] > 20
    assert seen["above"] > 0


def test_what_cannot_be_scored_has_a_reason(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    rows = [
        {"instruction": "", "input": "", "output": "no question"},
        {"instruction": "a", "input": "", "output": "x" * 600},
        {"instruction": "a" * 600, "input": "", "output": "x"},
        {"instruction": "a", "input": "", "output": "y" * 40_000},
        *ROWS[:4],
    ]
    pool = make_pool(rows)
    scores = IFD(model=str(folder), device="cpu").fit(pool).score(pool)
    assert scores.reasons[0] == "no question to compare the answer with"
    for row in (1, 2, 3):  # the model has 512 positions
        assert scores.reasons[row] == "truncated: the row has more than 512 tokens"
    assert scores.tokens is not None
    assert scores.tokens[:4].tolist() == [11, 512, 512, 512]
    assert all(value <= 1 for value in scores.values[4:] if not np.isnan(value))


def test_a_row_of_the_models_very_length_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "gpt2")
    rows = [{"instruction": "a", "input": "", "output": "x" * length} for length in (509, 510)]
    scores = raw_ratios(folder, monkeypatch, rows)  # start token, a, line break, answer: 512 and 513
    assert not np.isnan(scores.values[0])
    assert list(scores.reasons) == [1]


def test_settings_and_pools_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model", "llama"))
    pool = make_pool(ROWS)
    for settings, said in (
        ({"ratio": "odds"}, "ratio='odds'"),
        ({"compat": "old"}, "compat='old'"),
        ({"model": str(tmp_path / "absent")}, "absent"),
        ({"prompt": str(tmp_path / "absent.txt")}, "absent.txt"),
        ({"max_length": 0}, "max_length=0"),
    ):
        with pytest.raises(UserError, match=said):
            IFD(**{"model": folder, **settings}).score(pool)
    with pytest.raises(UserError, match="plain text"):
        IFD(model=folder).score(make_pool([{"text": "only text"}]))
    for text, said in (("no place", "no {question}"), ("{question} {answer}", "must not see")):
        (tmp_path / "prompt.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            IFD(model=folder, prompt=str(tmp_path / "prompt.txt")).score(pool)


def test_a_checkpoint_without_its_head_is_refused_not_scored_with_a_random_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    tiny_model("llama").model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"lacks 1 tensors of its language model \(lm_head.weight"):
        IFD(model=str(folder), device="cpu").score(make_pool(ROWS))


def test_tied_embeddings_are_no_missing_head(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    scores = IFD(model=str(folder), device="cpu").score(make_pool(ROWS))
    assert (~np.isnan(scores.values)).any()


def test_a_head_that_siftune_cannot_apply_goes_through_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose own logits are not hidden states times head: the model's are taken, and a warning says so once."""
    folder = save_tiny(tmp_path / "model", "llama")
    lm = CausalLM(str(folder), device="cpu")
    model = lm.parts.causal
    original = type(model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    ids = [np.array(byte_ids("<bos>" + text), np.int32) for text in ("one", "another", "and more")]
    spans = [(1, len(row)) for row in ids]
    with pytest.warns(UserWarning, match="one row at a time"):
        found = mean_losses(lm, ids, spans)
    monkeypatch.undo()
    plain = tiny_model("llama").double()
    for row, loss in zip(ids, found, strict=True):
        out = 2 * plain(torch.tensor([row.tolist()])).logits[0].detach()
        expected = torch.nn.functional.cross_entropy(out[:-1], torch.tensor(row[1:].tolist()))
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_every_position_comes_once_and_the_logits_never_stand_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftune.models import causal_lm as module

    monkeypatch.setattr(module, "LOGITS", {"cpu": 261 * 7, "cuda": 261 * 7})
    lm = CausalLM(str(save_tiny(tmp_path / "model", "llama")), device="cpu", token_budget=64)
    ids = [np.array(byte_ids("<bos>" + "x" * length), np.int32) for length in (1, 30, 7, 12)]
    spans = [(0, 2), (3, 20), (0, 0), (11, 12)]
    seen = []
    for owner, position, block in logits(lm, ids, spans):
        assert len(block) <= 7
        seen += list(zip(owner.tolist(), position.tolist(), strict=True))
    assert sorted(seen) == [(row, place) for row, (first, last) in enumerate(spans) for place in range(first, last)]


def test_the_key_moves_with_weights_ratio_prompt_and_length(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "one", "llama"))
    other = str(save_tiny(tmp_path / "two", "llama", seed=1))
    (tmp_path / "prompt.txt").write_text("{question}:")
    settings: list[dict[str, Any]] = [
        {"model": folder},
        {"model": other},
        {"model": folder, "ratio": "loss"},
        {"model": folder, "compat": "paper"},
        {"model": folder, "prompt": str(tmp_path / "prompt.txt")},
        {"model": folder, "max_length": 100},
    ]
    keys = [IFD(**said).feature_task(for_fit=False).key for said in settings]
    assert len(set(keys)) == len(keys)
    assert IFD(model=folder).feature_task(for_fit=False).key == keys[0]


def test_the_command_line_scores_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from siftune.cli.main import main

    folder = save_tiny(tmp_path / "model", "llama")
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["select", "ifd", str(tmp_path / "pool.jsonl"), "--model", str(folder), "--ratio", "loss", "--keep", "2"]
    words += ["--run", str(tmp_path / "run"), "--device", "cpu", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["info"]["ratio"] == "loss"
    assert facts["rows"]["kept"] == 2
    assert facts["rows"]["reasons"].keys() <= {"ratio above 1"}
    assert main(words) == 0
    assert all(stage["status"] == "reused" for stage in json.loads(capsys.readouterr().out)["stages"])
