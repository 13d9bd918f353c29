"""Deita against its naive definitions: one prompt at a time in float64, and the walk as a double loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.errors import UserError
from siftune.offline import deita_walk
from siftune.offline.deita import DeitaC, DeitaD, DeitaQ
from siftune.offline.deita_walk import unlike
from siftune.offline.rating import Turn, rating_tokens, turns_of
from tests.pools import make_pool
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

COMPLEX = "How hard: {question}\nScore:"
GOOD = "Q {instruction} I {input} A {answer}\nScore: "
ROWS: list[dict[str, Any]] = [
    {"instruction": "Add {input} up.", "input": "1 and 2", "output": "{question} is 3"},
    {"instruction": "Name a colour.", "input": "", "output": "Blue: \u6d77."},
] + [{"instruction": "q" * (3 + 5 * i), "input": "", "output": "ab " * (1 + i % 7)} for i in range(10)]
TALK = [
    ("system", "Brief."),
    ("user", "Hi"),
    ("assistant", "Ho"),
    ("user", "And?"),
    ("assistant", "No"),
    ("assistant", "!"),
]
CHAT = [{"messages": [{"role": role, "content": content} for role, content in TALK]}] + [
    {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in (1, 9)
]


@pytest.fixture
def scorer(tmp_path: Path) -> str:
    (tmp_path / "complex.txt").write_text(COMPLEX + "\n")
    (tmp_path / "good.txt").write_text(GOOD + "\n")
    return str(save_tiny(tmp_path / "scorer", "llama"))


def naive_rating(model: Any, prompt: str) -> float:
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        out = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double()
    p = torch.softmax(out[[tokenizer.convert_tokens_to_ids(str(k)) for k in range(1, 7)]], 0)
    return float(sum(k * p[k - 1] for k in range(1, 7)))


def question(row: dict[str, Any]) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def test_deita_c_and_q_equal_the_naive_definition(scorer: str, tmp_path: Path) -> None:
    pool, model = make_pool(ROWS), tiny_model("llama").double()
    complexity = DeitaC(scorer=scorer, prompt=str(tmp_path / "complex.txt"), token_budget=128).fit(pool).score(pool)
    quality = DeitaQ(scorer=scorer, prompt=str(tmp_path / "good.txt"), token_budget=128).fit(pool).score(pool)
    for number, row in enumerate(ROWS):
        expected = naive_rating(model, "How hard: " + question(row) + "\nScore:")
        assert complexity.values[number] == pytest.approx(expected, rel=1e-5)
        expected = naive_rating(model, f"Q {row['instruction']} I {row['input']} A {row['output']}\nScore: ")
        assert quality.values[number] == pytest.approx(expected, rel=1e-5)
    assert np.ptp(complexity.values) > 0.01
    assert complexity.tokens is not None
    assert complexity.tokens[0] == len("Add {input} up.\n1 and 2\n{question} is 3")


@pytest.mark.parametrize(("turns", "join"), [("sum", sum), ("mean", np.mean), ("last", lambda found: found[-1])])
def test_every_turn_of_a_chat_is_rated(scorer: str, tmp_path: Path, turns: Any, join: Any) -> None:
    pool, model = make_pool(CHAT), tiny_model("llama").double()
    scores = DeitaQ(scorer=scorer, prompt=str(tmp_path / "good.txt"), turns=turns).fit(pool).score(pool)
    asked = [("Brief.\nHi", "Ho"), ("And?", "No\n!")]
    expected = join([naive_rating(model, f"Q {q} I  A {a}\nScore: ") for q, a in asked])
    assert scores.values[0] == pytest.approx(expected, rel=1e-5)


def test_turns_of_every_kind_of_row() -> None:
    rows = make_pool(CHAT).read([0])
    assert turns_of(rows[0]) == [Turn("Brief.\nHi", "", "Ho"), Turn("And?", "", "No\n!")]
    assert turns_of(make_pool(ROWS).read([0])[0]) == [Turn(ROWS[0]["instruction"], "1 and 2", ROWS[0]["output"])]


class Words:
    """A stand-in for a tokenizer: `known` maps a text to its ids."""

    def __init__(self, known: dict[str, list[int]]) -> None:
        self.known = known

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.known.get(text, [0])}

    def decode(self, ids: list[int]) -> str:
        return next((text for text, found in self.known.items() if found[-1:] == ids), "?")


def test_the_rating_tokens_are_looked_up_in_both_forms() -> None:
    both = {str(k): [10 + k] for k in range(1, 7)} | {f" {k}": [20 + k] for k in range(1, 7)}
    assert rating_tokens(Words(both), "m") == [[10 + k, 20 + k] for k in range(1, 7)]
    split = {str(k): [5, 10 + k] for k in range(1, 7)} | {f" {k}": [6, 10 + k] for k in range(1, 7)}
    assert rating_tokens(Words(split), "m") == [[10 + k] for k in range(1, 7)]
    half = {str(k): [10 + k] for k in range(1, 7)} | {f" {k}": [20 + k] for k in range(1, 4)}
    assert rating_tokens(Words(half), "m") == [[10 + k] for k in range(1, 7)]
    with pytest.raises(UserError, match="no single tokens for 1 to 6"):
        rating_tokens(Words({"1": [1]}), "m")


def test_both_forms_of_a_rating_share_its_probability(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from siftune.offline import rating

    ids = [[70, 80], [71, 81], [72, 82], [73, 83], [74, 84], [75, 85]]
    monkeypatch.setattr(rating, "rating_tokens", lambda *_: ids)
    pool = make_pool(ROWS[:1])
    method = DeitaC(scorer=scorer)
    found = method.score(pool).values[0]
    prompt = method.feature_task(for_fit=False).rater.prompt.fill(instruction="Add {input} up.", input="1 and 2")
    with torch.no_grad():
        out = tiny_model("llama").double()(torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])).logits[0, -1]
    mass = [sum(float(out[token].exp()) for token in same) for same in ids]
    assert found == pytest.approx(sum(k * m for k, m in enumerate(mass, 1)) / sum(mass), rel=1e-5)


def test_rows_that_cannot_be_rated_have_a_reason(scorer: str) -> None:
    rows = [{"instruction": "", "input": "", "output": "x"}, {"instruction": "y" * 900, "input": "", "output": "x"}]
    scores = DeitaQ(scorer=scorer).score(make_pool([*rows, ROWS[0]]))
    assert scores.reasons == {
        0: "no question to rate",
        1: "truncated: the scorer's prompt has more than 512 tokens",
    }
    assert not np.isnan(scores.values[2])


def test_what_cannot_be_used_is_one_sentence(scorer: str, tmp_path: Path) -> None:
    pool = make_pool(ROWS)
    for method, said in (
        (DeitaC(scorer=scorer, turns="all"), "turns='all'"),  # type: ignore[arg-type]
        (DeitaC(scorer=str(tmp_path / "absent")), "absent"),
        (DeitaC(scorer=scorer, prompt=str(tmp_path / "good.txt")), "must not see"),
        (DeitaQ(scorer=scorer, prompt=str(tmp_path / "complex.txt")), "no {answer}"),
        (DeitaD(complexity_scorer=scorer, quality_scorer=scorer, threshold=90), "threshold=90"),
        (DeitaD(complexity_scorer=scorer, quality_scorer=scorer, rest="keep"), "rest='keep'"),  # type: ignore[arg-type]
        (DeitaD(complexity_scorer=scorer, quality_scorer=scorer, layer=9), "layer=9"),
    ):
        with pytest.raises(UserError, match=said):
            method.score(pool)
    with pytest.raises(UserError, match="plain text"):
        DeitaC(scorer=scorer).score(make_pool([{"text": "only text"}]))


# --- the walk ---------------------------------------------------------------------------------------------------------


def naive_walk(vectors: np.ndarray, order: list[int], threshold: float) -> list[int]:
    kept: list[int] = []
    wide = vectors.astype(np.float64)
    for row in order:
        lengths = [np.linalg.norm(wide[row]) * np.linalg.norm(wide[other]) for other in kept]
        if all(
            (wide[row] @ wide[other]) / length < threshold if length else threshold > 0
            for other, length in zip(kept, lengths, strict=True)
        ):
            kept.append(row)
    return kept


def clumped(rows: int, width: int, seed: int, noise: float) -> np.ndarray:
    """Vectors around a few centres, so that many cosines lie on both sides of the threshold."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(max(1, rows // 8), width))
    return (centres[draw.integers(len(centres), size=rows)] + noise * draw.normal(size=(rows, width))).astype(
        np.float32
    )


@pytest.mark.parametrize(("rows", "width", "noise"), [(1, 4, 0.3), (300, 16, 0.35), (700, 64, 0.32), (500, 3, 0.5)])
@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_the_walk_keeps_what_the_double_loop_keeps(
    rows: int, width: int, noise: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deita_walk, "BLOCK", block)
    monkeypatch.setattr(deita_walk, "COLUMNS", 33)
    vectors = clumped(rows, width, rows, noise)
    order = np.random.default_rng(9).permutation(rows)
    kept, like = unlike(vectors, order, threshold=0.9)
    expected = naive_walk(vectors, order.tolist(), 0.9)
    assert order[kept].tolist() == expected
    assert (like[kept] == -1).all()
    for row, near in zip(order[~kept], like[~kept], strict=True):
        assert near in expected
        a, b = vectors[row].astype(np.float64), vectors[near].astype(np.float64)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.9
    if rows > 1:
        assert 1 < kept.sum() < rows


def test_cosines_within_float32_of_the_threshold_are_decided_in_float64() -> None:
    """Unit rows whose cosine to the first is 0.9 give or take a few parts in 10^9: float32 cannot tell them apart."""
    offsets = np.array([-3e-9, -1e-9, 1e-9, 3e-9])
    angles = np.arccos(0.9 + offsets)
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(64, 64)))[0]
    for side, angle in enumerate(angles, 1):
        vectors = np.stack([basis[0], np.cos(angle) * basis[0] + np.sin(angle) * basis[side]])
        kept, _ = unlike(vectors, np.arange(2), threshold=0.9)
        assert kept.tolist() == [True, bool(offsets[side - 1] < 0)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(50, 1000))
def test_walk_laws(seed: int, rows: int, thousandths: int) -> None:
    threshold = thousandths / 1000 - 1.7e-7  # no cosine of such vectors is within rounding of it
    draw = np.random.default_rng(seed)
    vectors = draw.integers(-2, 3, size=(rows, 3)).astype(np.float32)  # many copies, many zeros
    order = draw.permutation(rows)
    kept, like = unlike(vectors, order, threshold=threshold)
    assert order[kept].tolist() == naive_walk(vectors, order.tolist(), threshold)
    assert ((like >= 0) == ~kept).all()
    assert kept[0]


@pytest.mark.parametrize("rest", ["after", "drop"])
def test_deita_d_equals_its_naive_definition(scorer: str, tmp_path: Path, rest: Any) -> None:
    rows = [*ROWS, ROWS[3], {**ROWS[4], "output": ROWS[4]["output"] + "."}]
    pool, model = make_pool(rows), tiny_model("llama").double()
    prompts = {"complexity_prompt": str(tmp_path / "complex.txt"), "quality_prompt": str(tmp_path / "good.txt")}
    method = DeitaD(complexity_scorer=scorer, quality_scorer=scorer, rest=rest, threshold=0.99, **prompts)
    scores = method.fit(pool).score(pool)
    merit, vectors = [], []
    for row in rows:
        c = naive_rating(model, "How hard: " + question(row) + "\nScore:")
        merit.append(c * naive_rating(model, f"Q {row['instruction']} I {row['input']} A {row['output']}\nScore: "))
        ids = tiny_tokenizer()(question(row) + "\n" + row["output"])["input_ids"]
        with torch.no_grad():
            vectors.append(model.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy())
    order = sorted(range(len(rows)), key=lambda row: (-np.float32(merit[row]), row))
    first = naive_walk(np.array(vectors), order, 0.99)
    assert 1 < len(first) < len(rows)
    assert order[: len(first)] != first, "a row that is left out must stand before one that is kept"
    behind = [row for row in order if row not in first]
    expected = {row: -float(place) for place, row in enumerate(first + (behind if rest == "after" else []))}
    assert {row: float(v) for row, v in enumerate(scores.values) if not np.isnan(v)} == expected
    assert scores.info["rows_unlike"] == len(first)
    assert sorted(scores.reasons) == ([] if rest == "after" else sorted(behind))
    assert all(reason.startswith("too like a row that is kept: row ") for reason in scores.reasons.values())


def test_a_chats_merit_is_the_sum_of_its_turns_products(scorer: str, tmp_path: Path) -> None:
    pool, model = make_pool(CHAT), tiny_model("llama").double()
    prompts = {"complexity_prompt": str(tmp_path / "complex.txt"), "quality_prompt": str(tmp_path / "good.txt")}
    task = DeitaD(complexity_scorer=scorer, quality_scorer=scorer, **prompts).shard_task(pool)
    asked = [("Brief.\nHi", "Ho"), ("And?", "No\n!")]
    expected = sum(
        naive_rating(model, f"How hard: {q}\nScore:") * naive_rating(model, f"Q {q} I  A {a}\nScore: ")
        for q, a in asked
    )
    assert task(pool, pool.shards()[0]).columns["merit"][0] == pytest.approx(expected, rel=1e-5)


def test_the_command_line_takes_scorer_and_prompt(
    scorer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from siftune.cli.main import main

    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [str(tmp_path / "pool.jsonl"), "--keep", "4", "--device", "cpu", "--json"]
    ours = {"deita-q": ["--scorer", scorer, "--prompt", str(tmp_path / "good.txt")]}
    ours["deita-d"] = ["--complexity-scorer", scorer, "--quality-scorer", scorer, "--threshold", "0.95"]
    for name, own in ours.items():
        assert main(["select", name, *words, *own, "--run", str(tmp_path / name)]) == 0
        assert json.loads(capsys.readouterr().out)["rows"]["kept"] == 4
    (tmp_path / "good.txt").write_text("another {question} {answer}")
    again = ["select", "deita-q", *words, *ours["deita-q"], "--run", str(tmp_path / "deita-q")]
    assert main(again) == 2  # the prompt is part of what the run is
    assert "prompt" in capsys.readouterr().err
