"""Inter- and intra-diversity against a naive definition in float64: loops over rows, tokens and domains."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from siftune.engines.local import LocalEngine
from siftune.errors import UserError
from siftune.models.backbone import Backbone
from siftune.models.features import extract
from siftune.models.store import Store
from siftune.models.tokenise import tokenise
from siftune.offline.centroids import look_up
from siftune.offline.domain_diversity import InterDiversity, IntraDiversity, places, read_band
from siftune.records import Pool
from tests.pools import make_pool
from tests.tiny import save_tiny

DOMAINS = ("code", "common_sense", "math", "reasoning")


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[dict[str, Any]]:
    """100 rows of each of the four real pools, in turn; a few without a label, one with an odd one."""
    read = []
    for domain in DOMAINS:
        with gzip.open(shared / "data" / "pools" / f"{domain}_heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
            some = [json.loads(line) for line, _ in zip(lines, range(100), strict=False)]
        read.append([{key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in some])
    mixed = [
        {**row, "kind": domain} for some in zip(*read, strict=True) for domain, row in zip(DOMAINS, some, strict=True)
    ]
    mixed[5] = {name: value for name, value in mixed[5].items() if name != "kind"}
    mixed[6]["kind"] = "  "
    mixed[7]["kind"] = ["math"]
    mixed[8]["kind"] = " code\n"
    return mixed


@pytest.fixture(scope="module")
def pool(rows: list[dict[str, Any]]) -> Pool:
    return make_pool(rows)


@pytest.fixture(scope="module")
def naive(rows: list[dict[str, Any]], tiny_base: Path) -> dict[str, Any]:
    """phi of every labelled row and the global figures, from the stored table and the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    weights = load_file(tiny_base / "model.safetensors")
    table = next(tensor for name, tensor in weights.items() if "embed_tokens" in name).double().numpy()
    means: dict[int, Any] = {}
    label = {number: row["kind"].strip() for number, row in enumerate(rows) if number not in (5, 6, 7)}
    for number in label:
        row = rows[number]
        text = "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)
        ids = tokenizer(text, truncation=True, max_length=512)["input_ids"]
        means[number] = sum(table[token] for token in ids) / len(ids)
    centre = {d: sum(means[n] for n in label if label[n] == d) / sum(v == d for v in label.values()) for d in DOMAINS}

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = [(a, b) for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1 :]]
    return {
        "label": label,
        "intra": {n: cosine(means[n], centre[label[n]]) for n in label},
        "inter": {n: sum(cosine(means[n], centre[d]) for d in DOMAINS if d != label[n]) for n in label},
        "distance": float(np.mean([np.linalg.norm(centre[a] - centre[b]) for a, b in pairs])),
        "variance": {
            d: float(np.mean([np.linalg.norm(means[n] - centre[d]) ** 2 for n in label if label[n] == d]))
            for d in DOMAINS
        },
    }


def method(cls: Any, tiny_base: Path, **more: Any) -> Any:
    return cls(model=str(tiny_base), label_column="kind", device="cpu", **more)


@pytest.mark.parametrize(("cls", "phi", "sign"), [(InterDiversity, "inter", -1), (IntraDiversity, "intra", 1)])
def test_phi_of_every_real_row(
    cls: Any, phi: str, sign: int, pool: Pool, tiny_base: Path, naive: dict[str, Any]
) -> None:
    scores = method(cls, tiny_base).fit(pool).score(pool)
    rows = sorted(naive["label"])
    np.testing.assert_allclose(scores.values[rows], [sign * naive[phi][row] for row in rows], rtol=2e-5, atol=2e-6)
    assert sorted(scores.reasons) == [5, 6, 7]
    assert scores.reasons[5] == "no label: column kind is absent"
    assert scores.domains == DOMAINS
    assert scores.pseudo_labels is not None
    assert [DOMAINS[label] for label in scores.pseudo_labels[rows]] == [naive["label"][row] for row in rows]
    assert scores.info["centroid_distance"] == pytest.approx(naive["distance"], rel=1e-6)
    for domain in DOMAINS:
        assert scores.info["domain_variance"][domain] == pytest.approx(naive["variance"][domain], rel=1e-5)
    assert scores.info["domain_rows"] == {d: list(naive["label"].values()).count(d) for d in DOMAINS}


@pytest.mark.parametrize(("cls", "phi", "best_first"), [(InterDiversity, "inter", 1), (IntraDiversity, "intra", -1)])
def test_the_five_bands_are_fifths_of_every_domain(
    cls: Any, phi: str, best_first: int, pool: Pool, tiny_base: Path, naive: dict[str, Any]
) -> None:
    held: list[int] = []
    for low in (0, 20, 40, 60, 80):
        scores = method(cls, tiny_base, band=f"{low}-{low + 20}").fit(pool).score(pool)
        kept = scores.keep(fraction=1.0).rows.tolist()
        expected = []
        for domain in DOMAINS:
            own = sorted(
                (row for row in naive["label"] if naive["label"][row] == domain),
                key=lambda r: best_first * naive[phi][r],
            )
            expected += [row for place, row in enumerate(own) if low * len(own) <= 100 * place < (low + 20) * len(own)]
        assert len(set(kept) ^ set(expected)) <= 2, "but for ties to float32's rounding"
        assert sum(reason == f"outside the band {low}-{low + 20} of its domain" for reason in scores.reasons.values())
        facts = scores.info["bands"][f"{low}-{low + 20}"]
        assert facts["rows"] == len(kept)
        assert facts["mean_phi"] == pytest.approx(np.mean([naive[phi][row] for row in kept]), rel=1e-4)
        held += kept
    assert sorted(held) == sorted(naive["label"])


def test_a_quota_over_the_labels_is_the_first_band(pool: Pool, tiny_base: Path) -> None:
    whole = method(IntraDiversity, tiny_base).fit(pool).score(pool)
    band = method(IntraDiversity, tiny_base, band="0-20").fit(pool).score(pool)
    by_quota = set(whole.keep(quota={"*": "20%"}).rows.tolist())
    in_band = set(band.keep(fraction=1.0).rows.tolist())
    assert by_quota <= in_band
    assert len(in_band) - len(by_quota) <= len(DOMAINS)


def test_several_shards_and_a_stored_fit_give_the_same_bits(
    rows: list[dict[str, Any]], pool: Pool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = method(InterDiversity, tiny_base).fit(pool)
    expected = whole.score(pool).values
    whole.save(tmp_path)
    loaded = InterDiversity.load(tmp_path, model=str(tiny_base), label_column="kind", device="cpu")
    assert loaded.score(pool).values.tobytes() == expected.tobytes()
    monkeypatch.setattr("siftune.records.SHARD_ROWS", 90)
    assert len(pool.shards()) == 5

    class Backwards(LocalEngine):
        def run(self, task: Any, pool: Any, shards: Any, *, label: str) -> Any:
            return super().run(task, pool, list(shards)[::-1], label=label)

    found = []
    for engine in (LocalEngine(Store(tmp_path / "one")), Backwards(Store(tmp_path / "two"))):
        cut = method(InterDiversity, tiny_base)
        cut.engine = engine
        found.append(cut.fit(pool).score(pool).values)
    assert found[0].tobytes() == found[1].tobytes()
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_look_up_is_the_embedding_mean_that_features_give(family: str, tmp_path: Path) -> None:
    backbone = Backbone(str(save_tiny(tmp_path / "model", family)), layer=1, device="cpu")
    texts = ["one", "a longer text \u6d77", "", "x" * 300]
    tokenised = tokenise(backbone, texts)
    means = look_up(backbone, [row.ids for row in tokenised], token_budget=32)
    np.testing.assert_allclose(means, extract(backbone, texts).embedding, rtol=1e-5, atol=1e-6)
    assert np.isnan(means[2]).all()


def test_layer_n_takes_the_hidden_states(pool: Pool, tiny_base: Path) -> None:
    few = make_pool(pool.source.originals(range(40)))
    scores = method(IntraDiversity, tiny_base, layer=2).fit(few).score(few)
    backbone = Backbone(str(tiny_base), layer=2, device="cpu", max_length=512)
    rows = [row for row in range(40) if row not in (5, 6, 7)]
    originals = few.source.originals(rows)
    texts = ["\n".join(p for p in (r["instruction"], r["input"], r["output"]) if p) for r in originals]
    hidden = extract(backbone, texts).hidden.astype(np.float64)
    labels = np.array([row["kind"].strip() for row in originals])
    for index, row in enumerate(rows):
        centre = hidden[labels == labels[index]].mean(axis=0)
        cosine = hidden[index] @ centre / np.linalg.norm(hidden[index]) / np.linalg.norm(centre)
        assert scores.values[row] == pytest.approx(cosine, rel=1e-5)


def row(kind: Any, number: int = 0) -> dict[str, Any]:
    return {"instruction": f"word {number}", "input": "", "output": f"answer {kind} {number}", "kind": kind}


def test_numbers_are_labels_and_an_unknown_label_of_another_pool_has_a_reason(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model", "llama"))
    fitted = IntraDiversity(model=folder, label_column="kind").fit(make_pool([row(1), row(1, 1), row(2, 2)]))
    scores = fitted.score(make_pool([row(2), row(3), row(True), row({"a": 1})]))
    assert scores.domains == ("1", "2")
    assert scores.reasons == {
        1: "unknown label: 3 was not in the pool that was fitted",
        2: "no label: column kind holds none",
        3: "no label: column kind holds none",
    }


def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny(tmp_path / "model", "llama"))
    two, one = make_pool([row("a"), row("b", 1)]), make_pool([row("a"), row("a", 1)])
    for settings, pool, said in (
        ({"band": "20"}, two, "band='20'"),
        ({"band": "60-40"}, two, "band='60-40'"),
        ({"band": "80-120"}, two, "band='80-120'"),
        ({"layer": -1}, two, "layer=-1"),
        ({"layer": 9}, two, "layer=9"),
        ({"label_column": "absent"}, two, "no row has a label in column 'absent'"),
        ({}, one, "at least 2 domains"),
        ({}, make_pool([row("a"), row("b\nc", 1)]), "holds text, not domains"),
        ({}, make_pool([row("a"), row("b" * 101, 1)]), "holds text, not domains"),
    ):
        with pytest.raises(UserError, match=said):
            InterDiversity(**{"model": folder, "label_column": "kind", **settings}).fit(pool)
    assert IntraDiversity(model=folder, label_column="kind").fit(one).score(one).domains == ("a",)
    with pytest.raises(UserError, match="not fitted"):
        InterDiversity(model=folder, label_column="kind").score(two)
    monkeypatch.setattr("siftune.offline.domain_diversity.MOST_DOMAINS", 1)
    with pytest.raises(UserError, match="more than 1 labels"):
        InterDiversity(model=folder, label_column="kind").fit(two)


def test_bands_and_places() -> None:
    assert read_band("0-20") == (0, 20)
    assert read_band("80%\N{EN DASH}100%") == (80, 100)
    assert read_band(None) is None
    values = np.array([1, 3, np.nan, 3, 2, 0], np.float32)
    found = places(values, np.array([0, 0, 0, 0, 1, 0], np.int16))
    np.testing.assert_array_equal(found, [0.5, 0.0, np.nan, 0.25, 0.0, 0.75])


def test_the_command_line_takes_label_column_and_band(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from siftune.cli.main import main

    folder = str(save_tiny(tmp_path / "model", "llama"))
    rows = [row("ab"[number % 2], number) for number in range(40)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = ["select", "inter-diversity", str(tmp_path / "pool.jsonl"), "--model", folder, "--label-column", "kind"]
    words += ["--band", "20-40", "--keep", "100%", "--run", str(tmp_path / "run"), "--device", "cpu", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"]["kept"] == 8
    assert facts["rows"]["domains"] == {"a": {"pool": 20, "kept": 4}, "b": {"pool": 20, "kept": 4}}
    (tmp_path / "run" / "scores.safetensors").unlink()
    assert main(words) == 0  # the stored centroids are read, not fitted again
    stages = {stage["name"]: stage["status"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["fit"] == "reused"
    assert stages["score"] == "computed"


def test_a_quota_over_labels_at_select(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels stand in the pool, so a quota over them is known before any weight is read, and cut per label."""
    from siftune.cli.main import main

    folder = save_tiny(tmp_path / "model", "llama")
    rows = [row("aab"[number % 3], number) for number in range(60)] + [{**row("a"), "kind": None}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = ["select", "intra-diversity", str(tmp_path / "pool.jsonl"), "--model", str(folder), "--device", "cpu"]
    words += ["--label-column", "kind", "--run", str(tmp_path / "run")]
    assert main([*words, "--quota", "a=5,b=50%", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"]["domains"] == {"a": {"pool": 40, "kept": 5}, "b": {"pool": 20, "kept": 10}}
    kept = {json.loads(line)["instruction"] for line in (tmp_path / "run" / "selected.jsonl").open()}
    fitted = IntraDiversity(model=str(folder), label_column="kind", device="cpu").fit(make_pool(rows))
    phi = fitted.score(make_pool(rows)).values
    best = {label: sorted((-phi[n], n) for n, each in enumerate(rows) if each["kind"] == label) for label in "ab"}
    assert kept == {rows[n]["instruction"] for _, n in best["a"][:5] + best["b"][:10]}
    (folder / "model.safetensors").write_bytes(b"no weights")
    for said, sentence in (
        (["--quota", "c=5"], "--quota names the domain 'c', which is not one of a, b"),
        (["--target-mix", "a=1", "--keep", "10%"], "--target-mix needs p(domain | row)"),
        (["--keep", "10%", "--label-column", "absent", "--dry-run"], "no row has a label in column 'absent'"),
    ):
        assert main([*words, *said]) == 2
        assert sentence in capsys.readouterr().err
