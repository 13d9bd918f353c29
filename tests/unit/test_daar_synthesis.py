"""The writing stage: which rows are kept, that it ends, that it is determined by the replies, that it resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.models.generate import Reply, Request
from siftune.models.journal import Journal, Journaled
from siftune.offline.daar.acceptance import embedder
from siftune.offline.daar.descriptions import read_descriptions
from siftune.offline.daar.plain import plain_messages
from siftune.offline.daar.seeds import read_seeds
from siftune.offline.daar.synthesis import Synthesis, Writing
from siftune.offline.daar.written import SEEDS, write_rejected
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TWO = read_descriptions({"law": "Questions of law.", "music": "Musical notation."})
QUICK = Synthesis(rows=12, attempts=60)
TOPICS = [f"topic{number}" for number in range(40)]


def bag(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """Features of a text: how often each topic stands in it, and a little of its own."""
    counts = [[text.split().count(topic) for topic in TOPICS] for text in texts]
    own = [np.random.default_rng(list(text.encode())).normal(scale=0.2, size=8) for text in texts]
    return np.hstack([np.array(counts), np.array(own)]).astype(np.float32)


class Writer:
    """A model that writes rows about topics drawn by the request's seed; `topics` of them, so that some are alike."""

    key = "writer"

    def __init__(self, *, topics: int = 40, words: int = 3, answer: Any = None, dies_after: int = 10**9) -> None:
        self.topics, self.words, self.answer, self.dies_after = topics, words, answer, dies_after
        self.asked: list[Request] = []

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        some = list(requests)
        random.Random(len(some)).shuffle(some)
        for request in some:
            if len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            made = self.answer(request) if self.answer else self.write(request)
            yield made if isinstance(made, Reply) else Reply(key=request.key, text=made)

    def write(self, request: Request) -> str:
        chance = random.Random(request.seed)
        count = 5 if "Write 5" in request.messages[-1][1] else 1
        rows = []
        for number in range(count):
            topics = " ".join(chance.choices(TOPICS[: self.topics], k=self.words))
            rows.append(f"{number + 1}.\nInstruction: Say {chance.random()} {topics}\nInput:\nOutput: Done.\n")
        return "\n".join(rows)


def written(writer: Any, how: Synthesis = QUICK, **more: Any) -> Any:
    return Writing(TWO, writer, bag, how, seed=more.pop("seed", 0), **more).run()


def text(row: dict[str, Any]) -> str:
    return f"{row['instruction']}\n{row['output']}"


def cosine(first: str, second: str) -> float:
    a, b = bag([first, second]).astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_every_row_kept_is_unlike_all_kept_before_it() -> None:
    found = written(Writer(topics=6))
    assert {len(rows) for rows in found.rows.values()} == {12}
    compared = 0
    for rows in found.rows.values():
        assert [row["how"] for row in rows[:5]] == ["seed"] * 5
        for place, row in enumerate(rows):
            nearest = max((cosine(text(row), text(other)) for other in rows[:place]), default=None)
            assert row["similarity"] == (None if nearest is None else pytest.approx(nearest, abs=1e-4))
            if row["how"] == "further":
                assert nearest is not None
                assert nearest < 0.85
                compared += 1
    assert compared >= 10
    near = [item for item in found.rejected if item.reason.startswith("too similar")]
    assert near
    for item in near:
        assert item.row is not None
        rows = found.rows[item.domain]
        assert max(cosine(text(item.row), text(row)) for row in rows) >= 0.85


def test_no_reply_vanishes_without_a_reason() -> None:
    writer = Writer(topics=6)
    found = written(writer)
    rows = sum(5 if "/seeds/" in request.key else 1 for request in writer.asked)
    assert sum(len(rows) for rows in found.rows.values()) + len(found.rejected) == rows
    assert not any("does not sample" in said for said in found.notes)
    assert all(item.reason and item.text for item in found.rejected)


def test_a_domain_that_cannot_reach_its_number_relaxes_tau_and_says_so() -> None:
    writer = Writer(topics=3, words=2)
    found = written(writer, replace(QUICK, attempts=30))
    assert len(writer.asked) <= 2 * (30 + 5)
    for name, rows in found.rows.items():
        facts = found.facts[name]
        relaxed = [row for row in rows if row["how"] == "relaxed"]
        assert facts["relaxed"] == len(relaxed) > 0
        assert [row["how"] for row in rows] == sorted(
            (row["how"] for row in rows), key=["seed", "further", "relaxed"].index
        )
        assert facts["threshold_used"] == pytest.approx(max(row["similarity"] for row in relaxed))
        assert 0.85 <= facts["threshold_used"] < 1
        kept = {text(row) for row in rows}
        assert len(kept) == len(rows), "a copy was let in"
        assert not [
            item for item in found.rejected if item.row and text(item.row) in kept and "too similar" in item.reason
        ]
        near = [text(item.row) for item in found.rejected if item.domain == name and "too similar" in item.reason]
        assert near, "something must be left over, or the order is not seen"
        before = [text(row) for row in rows if row["how"] != "relaxed"]
        candidates = [text(row) for row in relaxed] + near
        for row in relaxed:  # naive: the candidate with the smallest of the largest cosines, again and again
            largest = {one: max(cosine(one, other) for other in before) for one in candidates}
            assert largest[text(row)] == pytest.approx(min(largest.values()), abs=1e-9)
            before.append(text(row))
            candidates.remove(text(row))
    assert len(found.notes) >= 2
    assert "more were taken up to" in found.notes[0]


def test_copies_are_never_let_in_and_the_stage_still_ends() -> None:
    found = written(Writer(answer=lambda request: "Instruction: Say topic1\nOutput: Done."), replace(QUICK, attempts=8))
    assert {len(rows) for rows in found.rows.values()} == {1}
    assert "1 rows instead of 12" in found.notes[0]
    assert "1 different replies to 13 requests, so the generator does not sample" in found.notes[1]
    assert {item.reason.partition(":")[0] for item in found.rejected} == {"copy"}


def test_a_domains_own_tau_is_used() -> None:
    strict = read_descriptions({"law": {"description": "x", "threshold": 0.3}, "music": "y"})
    found = Writing(strict, Writer(topics=12), bag, QUICK, seed=0).run()
    further = {n: [r["similarity"] for r in rows if r["how"] == "further"] for n, rows in found.rows.items()}
    assert all(similarity < 0.3 for similarity in further["law"])
    assert any(similarity >= 0.3 for similarity in further["music"])


def test_requests_carry_the_papers_settings_and_show_three_kept_rows() -> None:
    writer = Writer()
    found = written(writer)
    first = [request for request in writer.asked if "/seeds/" in request.key]
    assert {(r.temperature, r.top_p, r.max_new_tokens) for r in first} == {(0.9, 0.95, 2048)}
    assert all("Instruction: Say" not in request.messages[-1][1] for request in first), "the first request is zero-shot"
    further = [request for request in writer.asked if "/further/" in request.key]
    assert {request.temperature for request in further} == {0.95}
    for request in further:
        domain = request.key.partition("/")[0]
        shown = [line for line in request.messages[-1][1].splitlines() if line.startswith("Instruction: Say")]
        kept = {"Instruction: " + row["instruction"] for row in found.rows[domain]}
        assert len(set(shown)) == 3
        assert set(shown) <= kept
    assert len({request.seed for request in writer.asked}) == len(writer.asked)


def test_the_same_replies_and_seed_give_the_same_rows_and_another_seed_others() -> None:
    one, two, other = written(Writer(topics=6)), written(Writer(topics=6)), written(Writer(topics=6), seed=1)
    assert (one.rows, one.rejected) == (two.rows, two.rejected)
    assert one.rows != other.rows


@pytest.mark.parametrize("dies_after", [0, 1, 3, 9, 20])
def test_killed_anywhere_it_resumes_and_asks_nothing_twice(tmp_path: Path, dies_after: int) -> None:
    whole = Writer(topics=6)
    expected = written(whole)
    dying, second = Writer(topics=6, dies_after=dies_after), Writer(topics=6)
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "r.jsonl") as journal:
        written(Journaled(dying, journal))
    with Journal(tmp_path / "r.jsonl") as journal:
        found = written(Journaled(second, journal))
    assert (found.rows, found.rejected) == (expected.rows, expected.rejected)
    keys = sorted((*request.messages, request.seed) for request in dying.asked + second.asked)
    assert keys == sorted((*request.messages, request.seed) for request in whole.asked)


def test_a_reply_that_never_came_stops_the_stage_with_a_way_out() -> None:
    def answer(request: Request) -> Any:
        if request.key == "music/further/2":
            return Reply(key=request.key, finish_reason="error", error="no reply in 6 tries: status 500")
        return Writer().write(request)

    with pytest.raises(UserError, match=r"music/further/2: no reply in 6 tries.*run the same command again"):
        written(Writer(answer=answer))


def test_refusals_and_unreadable_replies_are_kept_with_their_reason() -> None:
    def answer(request: Request) -> Any:
        if request.key.endswith("further/0"):
            return Reply(key=request.key, finish_reason="refused", error="status 400: no")
        if request.key.endswith("further/1"):
            return "I would rather not."
        return Reply(key=request.key, text=Writer().write(request), finish_reason="stop")

    found = written(Writer(answer=answer))
    reasons = {item.request: item.reason for item in found.rejected if item.row is None}
    assert reasons["law/further/0"] == "refused: status 400: no"
    assert reasons["music/further/1"] == "no row found: neither labels nor JSON"
    assert {len(rows) for rows in found.rows.values()} == {12}


def test_a_domain_without_any_row_is_one_sentence_and_its_replies_are_left(tmp_path: Path) -> None:
    writer = Writer(answer=lambda request: "No." if request.key.startswith("music") else Writer().write(request))
    writing = Writing(TWO, writer, bag, QUICK, seed=0)
    with pytest.raises(UserError, match=r"'music' in 65 replies \(65 x no row found: .*set generator to a larger"):
        writing.run()
    assert len([request for request in writer.asked if request.key.startswith("music")]) == 65, "the attempts end"
    path = write_rejected(tmp_path, writing.rejected)
    assert json.loads(path.read_text().splitlines()[0])["text"] == "No."


def test_too_few_first_rows_are_asked_for_again() -> None:
    def answer(request: Request) -> str:
        rows = Writer().write(request)
        return rows.split("\n2.\n")[0] if request.key == "law/seeds/0" else rows

    writer = Writer(answer=answer)
    found = written(writer)
    assert sorted(r.key for r in writer.asked if "/seeds/" in r.key) == ["law/seeds/0", "law/seeds/1", "music/seeds/0"]
    assert [row["how"] for row in found.rows["law"][:6]] == ["seed"] * 5 + ["further"]


def needs_plain_words(request: Request) -> str:
    """A small model: remarks instead of rows of music, unless it is asked in the plain form."""
    if "field of music" in request.messages[-1][1]:
        return Writer().write(request)
    return "What a question!" if request.key.startswith("music") else Writer().write(request)


def test_a_model_that_cannot_keep_to_the_form_is_asked_in_plainer_words() -> None:
    writer = Writer(answer=needs_plain_words)
    found = written(writer)
    music = [request for request in writer.asked if request.key.startswith("music")]
    assert music[0].key == "music/seeds/0"
    assert {request.key.split("/")[1] for request in music[1:]} == {"plain"}
    assert len({request.seed for request in music}) == len(music)
    assert {request.max_new_tokens for request in music[1:]} == {256}
    assert [row["how"] for row in found.rows["music"]] == ["seed"] * 4 + ["further"] * 8
    assert found.facts["music"]["plain_requests"] == len(music) - 1
    assert found.facts["law"]["plain_requests"] == 0
    assert not any("/plain/" in request.key for request in writer.asked if request.key.startswith("law"))
    assert found.rows["law"] == written(Writer()).rows["law"], "one domain's fallback changed another's rows"


def test_the_rows_that_show_the_plain_form_are_not_kept() -> None:
    shown = plain_messages(TWO.domains[1], TWO.names)[1][1]

    def answer(request: Request) -> str:
        return shown if request.key.endswith("plain/0") else needs_plain_words(request)

    found = written(Writer(answer=answer))
    assert [item.reason for item in found.rejected if item.row is None and "plain" in item.request] == [
        "copy: the row is the one that showed the form"
    ]


def test_fields_named_like_a_domain_do_not_show_the_plain_form() -> None:
    domains = read_descriptions({"cooking": "Recipes.", "music": "Notes."})
    turns = plain_messages(domains.domains[0], domains.names)
    assert ["cooking" in text for role, text in turns if role == "user"] == [False, False, True]


def test_a_domain_that_stays_short_is_one_sentence_with_counts_and_the_way_out() -> None:
    def answer(request: Request) -> str:
        if request.key.startswith("law") or request.key == "music/seeds/0":
            return Writer().write(request)
        number = int(request.key.split("/")[2])
        return f"No {number}." if number % 3 else f"Instruction: A {number}\nOutput: A {number}"

    found = written(Writer(answer=answer))
    assert found.notes == [
        "music: 5 rows instead of 12, the generator wrote no others in 61 requests (not used: 39 x no row found, 21 x "
        "output repeats the instruction); set generator to a larger model, pass rows of this domain with --seeds, or "
        "lower rows in the settings of the domains file"
    ]


def test_requests_end_once_their_rows_are_there() -> None:
    writer = Writer()
    written(writer)
    one = "Instruction: A\nOutput: B\n\nInstruction: C"
    for request in writer.asked:
        assert request.end_rule is not None
        assert (request.end_rule(one) is not None) == ("/further/" in request.key)


def test_a_reply_that_repeats_itself_is_torn_there() -> None:
    def answer(request: Request) -> Any:
        if request.key != "law/further/0":
            return Writer().write(request)
        return Reply(key=request.key, text="Instruction: A\nOutput: " + "B " * 400, finish_reason="repetition")

    found = written(Writer(answer=answer))
    assert [item.reason for item in found.rejected if item.request == "law/further/0"] == [
        "torn: the reply repeats itself"
    ]


def test_real_rows_join_the_set_and_save_requests() -> None:
    real = {"law": [{"instruction": f"Real {n}", "input": "", "output": f"topic{n} topic{n + 1}"} for n in range(6)]}
    plain, mixed = Writer(topics=6), Writer(topics=6)
    written(plain)
    found = written(mixed, real=real)
    assert [row["how"] for row in found.rows["law"]][:6] == ["real"] * 6
    assert found.facts["law"]["real"] == 6
    assert len(found.rows["law"]) == 12
    assert len(mixed.asked) < len(plain.asked)
    with pytest.raises(UserError, match="'food', which is not one of law, music"):
        written(Writer(), real={"food": real["law"]})


def test_files_are_readable_reusable_and_editable(tmp_path: Path) -> None:
    found = written(Writer(topics=6))
    path = found.write(tmp_path)
    assert path == tmp_path / SEEDS
    counts = {"law": 12, "music": 12}
    assert read_seeds(path).counts == read_seeds(tmp_path / "domains").counts == counts
    law = tmp_path / "domains" / "law.jsonl"
    lines = law.read_text().splitlines()
    assert set(json.loads(lines[0])) == {"domain", "instruction", "input", "output", "how", "similarity"}
    law.write_text("\n".join(lines[:-2]) + "\n")
    assert read_seeds(tmp_path / "domains").counts == {"law": 10, "music": 12}
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == len(found.rejected)
    assert json.loads((tmp_path / "written.json").read_text())["domains"]["law"]["rows"] == 12


@pytest.mark.parametrize("space", ["last-layer", "embedding"])
def test_the_acceptance_space_is_the_mean_over_real_tokens(tmp_path: Path, space: Any) -> None:
    texts = ["one text", "another, somewhat longer text"]
    found = embedder(str(save_tiny(tmp_path, "llama")), space, max_length=64, dtype="float32", device="cpu")(texts)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for row, said in zip(found, texts, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(said)["input_ids"]]), output_hidden_states=True).hidden_states
        expected = states[-1 if space == "last-layer" else 0][0].double().mean(dim=0).numpy()
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


def test_settings_of_a_file_are_checked() -> None:
    assert Synthesis.of({"rows": 9, "space": "embedding"}).rows == 9
    for settings, said in (
        ({"row": 9}, "unknown key 'row'; did you mean rows?"),
        ({"rows": 2}, "rows=2 is below seeds=5"),
        ({"threshold": 2}, r"threshold=2 is not in \(0, 1\]"),
        ({"space": "output"}, "space='output' is not known"),
        ({"at_once": 0}, "at_once=0"),
    ):
        with pytest.raises(UserError, match=said):
            Synthesis.of(settings)
