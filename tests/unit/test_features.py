"""Features against a naive definition: the whole model in float64, one row at a time, no padding, no truncated load."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from siftune.errors import UserError
from siftune.models import tokenise as tokenising
from siftune.models.backbone import Backbone
from siftune.models.features import NO_TOKENS, NOT_FINITE, FeatureTask, batches, extract
from siftune.models.tokenise import tokenise
from siftune.records import Pool, Row, Shard
from tests.tiny import save_tiny

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"]
TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog, and then it rests for a while under the old oak tree.",
    "Two words",
    "x" * 97,
    "Añadir: ünïcode, 漢字, emoji 🙂 and\nnew lines\t tabs.",
    "The quick brown fox jumps over the lazy dog, and then it rests for a while under the old oak trees",
]


def naive(folder: Path, texts: list[str], layer: int, length: int = 10_000) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Full model, float64, eager attention: mean of the embedding output; mean of norm(hidden_states[layer])."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    embeddings, hiddens, tokens = [], [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            state = states[layer] if layer == model.config.num_hidden_layers else norm(states[layer])
            embeddings.append(model.get_input_embeddings()(ids)[0].mean(0).numpy())
            hiddens.append(state[0].mean(0).numpy())
        tokens.append(ids.shape[1])
    return np.stack(embeddings), np.stack(hiddens), tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_naive_definition(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    found = extract(Backbone(str(folder), layer=2), TEXTS, token_budget=150)
    embedding, hidden, tokens = naive(folder, TEXTS, layer=2)
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.hidden, hidden, atol=2e-5, rtol=1e-5)
    assert found.tokens.tolist() == tokens
    assert found.hidden.dtype == found.embedding.dtype == np.float32
    assert not found.reasons
    assert not found.truncated.any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bf16_is_near_the_definition(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    found = extract(Backbone(str(folder), layer=2, dtype="bfloat16"), TEXTS)
    embedding, hidden, _ = naive(folder, TEXTS, layer=2)
    np.testing.assert_allclose(found.embedding, embedding, atol=0.01 * np.abs(embedding).max())
    np.testing.assert_allclose(found.hidden, hidden, atol=0.05 * np.abs(hidden).max())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rows_longer_than_a_sliding_window(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    texts = ["word " * 60, "several words " * 20, "b"]
    found = extract(Backbone(str(folder), layer=3), texts)
    _, hidden, _ = naive(folder, texts, layer=3)
    np.testing.assert_allclose(found.hidden, hidden, atol=2e-5, rtol=1e-5)


def test_batching_never_changes_a_row(llama: Path) -> None:
    backbone = Backbone(str(llama), layer=3)
    texts = [f"{'word ' * (7 * i % 23)}number {i}" for i in range(40)]
    one = extract(backbone, texts, token_budget=1)
    for budget in (64, 300, 100_000):
        many = extract(backbone, texts, token_budget=budget)
        np.testing.assert_allclose(many.hidden, one.hidden, atol=1e-5)
        np.testing.assert_allclose(many.embedding, one.embedding, atol=1e-5)
    permuted = np.random.default_rng(0).permutation(len(texts))
    shuffled = extract(backbone, [texts[i] for i in permuted], token_budget=300)
    np.testing.assert_allclose(shuffled.hidden, one.hidden[permuted], atol=1e-5)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(batches(np.array(lengths, np.int32), budget))
    rows = [row for batch in found for row in batch]
    assert sorted(rows) == [row for row, length in enumerate(lengths) if length]
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget for batch in found)
    assert rows == sorted(rows, key=lambda row: (-lengths[row], row))


def test_what_has_no_features_says_why(llama: Path) -> None:
    found = extract(Backbone(str(llama)), ["", "fine", ""])
    assert found.reasons == {0: NO_TOKENS, 2: NO_TOKENS}
    assert np.isnan(found.hidden[[0, 2]]).all()
    assert np.isnan(found.embedding[[0, 2]]).all()
    assert np.isfinite(found.hidden[1]).all()
    assert found.tokens.tolist() == [0, 4, 0]
    backbone = Backbone(str(llama))
    backbone.network.get_input_embeddings().weight[int(tokenise(backbone, ["Q"])[0].ids[0])] = torch.inf
    broken = extract(backbone, ["a clean text", "Q"])
    assert broken.reasons == {1: NOT_FINITE}
    assert np.isnan(broken.hidden[1]).all()
    assert np.isfinite(broken.hidden[0]).all()
    assert len(extract(backbone, [])) == 0


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", vocabulary=100)
    with pytest.raises(UserError, match="use the model's own tokenizer"):
        extract(Backbone(str(folder)), ["漢"])


def test_long_rows_are_cut_and_counted(llama: Path) -> None:
    backbone = Backbone(str(llama), max_length=16)
    found = extract(backbone, ["y" * 16, "y" * 17, "z" * 1_000_000])
    assert found.tokens.tolist() == [16, 16, 16]
    assert found.truncated.tolist() == [False, True, True]
    _, hidden, _ = naive(llama, ["y" * 16], layer=3)
    np.testing.assert_allclose(found.hidden[:2], np.stack([hidden[0]] * 2), atol=2e-5)


def test_positions_of_the_model_bound_the_length(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt2", n_positions=24)
    backbone = Backbone(str(folder), max_length=1024)
    assert backbone.length == 24
    found = extract(backbone, ["w" * 500])
    assert found.tokens.tolist() == [24]
    assert found.truncated.all()


def merging_tokenizer(folder: Path, spaces: str) -> None:
    """A small trained BPE whose merges cross anything (no pre-tokenizer) or words only."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if spaces == "words":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
    corpus = ["the cat sat on the mat and the dog ran after the cat  again and again \n\n and the end"] * 4
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("spaces", ["words", "anything"])
def test_cutting_a_long_text_first_never_shows(spaces: str, llama: Path, tmp_path: Path) -> None:
    merging_tokenizer(tmp_path, spaces)
    backbone = Backbone(str(llama), max_length=8)
    backbone._loaded["tokenizer"] = AutoTokenizer.from_pretrained(tmp_path)
    words = ["the", " cat", "  again", "\n\n", " ", "sat on", "mat and the dog", "again again"]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(words), min_size=30, max_size=400), st.integers(1, 6))
    def same(parts: list[str], cut: int) -> None:
        text = "".join(parts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenising, "CUT_CHARACTERS", 4 * cut)
            found = tokenise(backbone, [text])[0]
        whole = backbone.tokenizer(text)["input_ids"]
        assert found.ids.tolist() == whole[:8]
        assert found.truncated == (len(whole) > 8)

    same()


def test_a_million_characters_cost_no_more_than_the_cut(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(str(llama), max_length=64)
    seen: list[int] = []
    inner = backbone.tokenizer

    class Counting:
        def __call__(self, texts: Any, **options: Any) -> Any:
            seen.extend(map(len, texts))
            return inner(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    backbone._loaded["tokenizer"] = Counting()
    assert tokenise(backbone, ["some words " * 100_000])[0].truncated
    assert max(seen[1:]) <= tokenising.CUT_CHARACTERS * 64  # the first call asks what opens a text


def test_no_second_beginning_of_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = save_tiny(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backbone = Backbone(str(folder))
    backbone._loaded["tokenizer"] = tokenizer
    plain, opened, empty = tokenise(backbone, ["hi", "<bos>hi", "<bos>"])
    assert plain.ids.tolist() == opened.ids.tolist()
    assert plain.ids[0] == 2
    assert len(plain.ids) == 3
    assert len(empty.ids) == 0


def test_every_real_token_once_and_no_padding(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(str(llama))
    seen: list[tuple[int, ...]] = []
    forward = backbone.network.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(backbone.network, "forward", counting)
    done: list[int] = []
    extract(backbone, ["ab" * n for n in (5, 5, 5, 9, 9)], token_budget=40, progress=done.append)
    assert seen == [(2, 18), (3, 10)], "one pass, equal lengths together"
    assert sum(done) == 5


class Rows:
    """A pool's rows from a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, rows: Any) -> list[Row]:
        return [Row(row, f"{row:032x}", "", "", self.texts[row]) for row in rows]


def test_a_shard_of_features(llama: Path) -> None:
    texts = [f"row {i} " * (1 + i % 5) for i in range(600)] + [""]
    pool = Pool(Rows(texts), "text", "f", {301: "unparsable line 302", 5: "duplicate"})  # type: ignore[arg-type]
    task = pickle.loads(pickle.dumps(FeatureTask(Backbone(str(llama), layer=2))))
    result = task(pool, Shard(0, 300, 601))
    assert {name: len(values) for name, values in result.columns.items()} == {
        "hidden": 301,
        "embedding": 301,
        "tokens": 301,
        "truncated": 301,
    }
    assert result.reasons == {600: NO_TOKENS}
    alone = extract(Backbone(str(llama), layer=2), texts[302:304])
    np.testing.assert_allclose(result.columns["hidden"][2:4], alone.hidden, atol=1e-5)
    np.testing.assert_allclose(result.columns["embedding"][2:4], alone.embedding, atol=1e-5)
    assert np.isnan(result.columns["hidden"][1]).all()
    assert result.columns["tokens"][1] == -1
    assert "embedding" not in FeatureTask(Backbone(str(llama)), embedding=False)(pool, Shard(0, 0, 5)).columns


def test_the_key_of_a_task_is_its_content(llama: Path) -> None:
    backbone = Backbone(str(llama))
    assert FeatureTask(backbone).key == FeatureTask(Backbone(str(llama))).key
    others = [
        FeatureTask(backbone, embedding=False).key,
        FeatureTask(backbone, token_budget=64).key,
        FeatureTask(Backbone(str(llama), layer=2)).key,
    ]
    assert len({FeatureTask(backbone).key, *others}) == 4


def test_the_real_model(tiny_base: Path) -> None:
    found = extract(Backbone(str(tiny_base)), TEXTS)
    embedding, hidden, tokens = naive(tiny_base, TEXTS, layer=3)
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-5)
    np.testing.assert_allclose(found.hidden, hidden, atol=1e-4, rtol=1e-4)
    assert found.tokens.tolist() == tokens
    short: Any = AutoModel.from_pretrained(tiny_base, num_hidden_layers=3)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_base)(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        state = short(input_ids=ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found.hidden[1], state.numpy(), atol=1e-4)
