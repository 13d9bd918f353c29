"""The embedded model (loads, is small, has learnt the corpus, writes rows on request) and the demo from end to end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from siftune import load_pool
from siftune.demo import corpus, embedded, story, tuning
from siftune.errors import UserError
from siftune.offline.daar.stage_one import StageOne
from siftune.records import Scores
from siftune.runs.options import SelectOptions
from siftune.runs.select import Selection
from siftune.runs.select import select as pipeline_select
from tools.demo import prompts, train_model


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded.model_folder()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.model_folder())


# --- the embedded model -----------------------------------------------------------------------------------------------


def test_the_model_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in embedded.model_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    assert sum(path.suffix == ".safetensors" for path in files) == 1


def test_a_lost_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "MODEL", tmp_path)
    with pytest.raises(UserError, match=r"lacks config\.json, model\.safetensors"):
        embedded.model_folder()


def test_model_and_tokenizer_agree(model: Any, tokenizer: Any) -> None:
    assert model.config.num_hidden_layers >= 4
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert AutoModel.from_pretrained(embedded.model_folder(), num_hidden_layers=3).config.num_hidden_layers == 3


def test_auto_tokenizer_is_the_tokenizer_that_was_trained(tokenizer: Any) -> None:
    stored = Tokenizer.from_file(str(embedded.model_folder() / "tokenizer.json"))
    texts = [row["instruction"] + "\n" + row["output"] for row in corpus.held_out(60, 0)]
    for text in [*texts, "  two  spaces\n\n\ttab é 漢字 🙂 12345", "<|im_start|>user\nhi<|im_end|>\n"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == stored.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_generation_marks_cover_the_answer_alone(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, answer in pairs if answer]) == "2 + 3 = 5<|im_end|>"


def test_fine_tuning_learns_the_answer_alone(tokenizer: Any) -> None:
    (row,) = tuning.tokenised(tokenizer, [{"instruction": "Add.", "input": "2, 3", "output": "5"}])
    assert tokenizer.decode(row["input_ids"]) == "### Question\nAdd.\n2, 3\n\n### Answer\n5<|endoftext|>"
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == "5<|endoftext|>"
    assert len(row["labels"]) == len(row["input_ids"]) == len(row["attention_mask"])


def test_the_model_has_learnt_the_corpus(model: Any, tokenizer: Any) -> None:
    log = json.loads((embedded.model_folder() / "training_log.json").read_text())
    loss = train_model.held_out_loss(model, tokenizer, count=100)
    assert loss < 0.25 * math.log(len(tokenizer))
    assert loss == pytest.approx(log["held_out_loss"], rel=0.15)  # the log's is over three times as many rows
    assert log["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_asked_for_rows_it_writes_rows_in_the_stated_form(model: Any, tokenizer: Any) -> None:
    request = [{"role": "user", "content": prompts.seed_request(prompts.DESCRIPTIONS["reasoning"][0])}]
    asked = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = model.generate(**asked, max_new_tokens=500, do_sample=True, temperature=0.9, eos_token_id=stop)
    answer = ids[0, asked["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    triples = re.findall(r"^Instruction: .+\nInput:.*(?:\n(?!Output:).*)*\nOutput: .+", text, re.M)
    assert len(triples) >= 2, text
    assert int(answer[-1]) == stop


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rows that the embedded model writes for the demo's four sentences."""
    model, cache = str(embedded.model_folder()), tmp_path_factory.mktemp("written")
    return StageOne(generator=model, domains=str(story.DOMAINS), seeds=None, model=model, seed=0, cache=cache).run()


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_at_least_nine_replies_in_ten_can_be_read(written: Path) -> None:
    facts = json.loads((written / "written.json").read_text())
    asked = sum(domain["requests"] for domain in facts["domains"].values())
    rejected = jsonl(written / "rejected.jsonl")
    readable = {row["asked"] for row in rejected if "row" in row}
    unreadable = {row["asked"] for row in rejected if "row" not in row} - readable
    assert asked >= 20
    assert len(unreadable) <= 0.1 * asked
    assert all(domain["rows"] == domain["wanted"] for domain in facts["domains"].values())


@pytest.mark.slow
def test_the_model_writes_rows_of_the_domain_it_is_asked_for(written: Path) -> None:
    known = corpus.rows(2000, seed=3)
    words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+"), LogisticRegression(C=30))
    words.fit([row["instruction"] + " " + row["input"] for row in known], [row["source"] for row in known])
    fresh = corpus.held_out(300, seed=4)
    told = words.predict([row["instruction"] + " " + row["input"] for row in fresh])
    assert np.mean(told == np.array([row["source"] for row in fresh])) > 0.9, "the yardstick itself must be good"
    rows = jsonl(written / "seeds.jsonl")
    found = words.predict([row["instruction"] + " " + row["input"] for row in rows])
    asked = np.array([row["domain"] for row in rows])
    assert np.mean(found == asked) > 0.8, list(zip(asked, found, strict=True))
    assert set(found) == set(corpus.DOMAINS), "the domains differ"


def test_a_few_steps_of_training_lower_the_loss(tmp_path: Path) -> None:
    log = train_model.train(tmp_path, steps=6, rows=2, length=64, rate=3e-3, vocabulary=400, seed=1)
    assert log["losses"][-1]["loss"] < log["uniform_loss"]
    assert {path.name for path in tmp_path.iterdir()} >= set(embedded.FILES)
    for folder in (tmp_path, embedded.model_folder()):  # transformers 4 knows no newer name
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        )


# --- what the demo says -----------------------------------------------------------------------------------------------


def test_offline_facts_count_by_hidden_label(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "output": "a", "source": "xxyy"[i]} for i in range(4)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = load_pool(tmp_path / "pool.jsonl", cache=tmp_path)
    values = np.array([0.1, 0.9, 0.8, 0.2], dtype=np.float32)
    scores = Scores(
        pool=pool,
        method="daar",
        values=values,
        domains=("x", "y"),
        pseudo_labels=np.array([0, 1, 1, 1], dtype=np.int16),
    )
    facts = story.offline_facts(scores.keep(count=2))
    assert facts["agreement"] == 0.75
    assert facts["composition"] == {
        "x": {"pool": 2, "kept": 1, "agreement": 0.5},
        "y": {"pool": 2, "kept": 1, "agreement": 1.0},
    }
    assert sum(facts["reward"]["pool"]) == 4
    assert sum(facts["reward"]["kept"]) == 2


def test_stage_seconds_add_up() -> None:
    manifest = {"stages": [{"name": "fit", "seconds": 2.0}, {"name": "score", "seconds": 1.0}]}
    assert story.stage_seconds(manifest, 5.0) == {"select: start": 2.0, "select: fit": 2.0, "select: score": 1.0}


# --- the demo itself --------------------------------------------------------------------------------------------------


def select(pool: Path, *, run: Path, keep: str, seed: int, cache: str | None, settings: Mapping[str, Any]) -> Selection:
    options = SelectOptions(pool=[str(pool)], keep=keep, run=str(run), seed=seed, cache=cache)
    return pipeline_select("daar", options, settings)


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    facts = story.run(tmp_path / "demo", select=select, count=400, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr().out
    for words in (
        "one sentence per domain",
        "rows written",
        "pseudo-label agrees",
        "Predicted reward",
        "held-out loss",
        "select: fit",
        "Run folder",
        "siftune keep",
    ):
        assert words in printed
    assert "\x1b" not in printed  # plain when piped
    chosen = [json.loads(line) for line in Path(facts["selected"]).read_text().splitlines()]
    assert len(chosen) == facts["offline"]["kept"] == 80
    assert all(row in corpus.rows(400, 0) for row in chosen)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == facts
    runs = facts["online"]["runs"]
    assert runs["plain"]["candidates"] == facts["online"]["trained_rows"] == 8
    assert runs["uds"]["candidates"] == 32
    assert all(math.isfinite(run["loss"]) for run in runs.values())


@pytest.mark.slow
def test_quiet_prints_the_path_and_json_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = story.run(tmp_path / "demo", select=select, count=200, steps=0, quiet=True)
    assert capsys.readouterr().out == facts["selected"] + "\n"
    again = story.run(tmp_path / "demo", select=select, count=200, steps=0, json=True)  # a rerun is welcome
    assert json.loads(capsys.readouterr().out) == again
    assert again["offline"] == facts["offline"]


@pytest.mark.slow
def test_pseudo_labels_of_the_default_corpus_agree_mostly_but_not_perfectly(tmp_path: Path) -> None:
    facts = story.run(tmp_path / "demo", select=select, steps=0, quiet=True)
    assert 0.7 < facts["offline"]["agreement"] < 0.99
    assert facts["offline"]["kept"] == 1200
    assert all(share["kept"] > 0 for share in facts["offline"]["composition"].values())
