"""One bad row never ends a run: templates that raise or never end, tokenizers that panic, lines beyond memory.

Rows of chats are selected from, planned, trained on, scored and measured with a template that fails on some of them; each
gets a reason, and every other row has what it has without them.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from siftune.data import chat_template, parse
from siftune.data.chat_template import Overrun, Refusal, apply_template, check_template, limited
from siftune.data.load import load_pool
from siftune.engines.local import LocalEngine
from siftune.errors import UserError
from siftune.models.backbone import Backbone
from siftune.models.causal_lm import CausalLM
from siftune.models.features import FeatureTask
from siftune.models.tokenise import tokenise
from siftune.models.tokenize_rows import Encoder
from siftune.offline.base import SerialEngine, gather
from siftune.offline.ifd import IFD
from siftune.offline.prompts import Prompt
from siftune.offline.rating import Rater
from siftune.records import Pool, Row, Shard
from tests.failing import PanicException
from tests.faults.said import add_up, refused, siftune
from tests.tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer

FAILING = {
    "zero": ("{{ 1 // 0 }}", "chat template fails: ZeroDivisionError: integer division or modulo by zero"),
    "recurse": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template fails: RecursionError: "),
    "memory": ("{{ 'x' * 100000000000000 }}", "chat template fails: MemoryError"),
    "undefined": ("{{ nothing.at.all }}", "chat template fails: UndefinedError: 'nothing' is undefined"),
}
TEMPLATE = (
    "{%- for m in messages %}"
    + "".join(f"{{%- if '{word}' in m['content'] %}}{code}{{%- endif %}}" for word, (code, _) in FAILING.items())
    + "{%- endfor %}"
    + CHAT_TEMPLATE
)
BAD = {5: "zero", 9: "recurse", 14: "memory", 21: "undefined"}
ROWS = 40


def write_chats(path: Path, bad: dict[int, str] = BAD, rows: int = ROWS) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            question = f"{index} {bad.get(index, 'plus')} {index * 7 % 5}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"it is {index}"}]
            file.write(json.dumps({"messages": turns, "kind": "ab"[index % 2]}) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pool.jsonl` of chats, and `model/` with the failing template."""
    folder = tmp_path_factory.mktemp("failing")
    write_chats(folder / "pool.jsonl")
    save_tiny(folder / "model", layers=2, width=16)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


def expect(reasons: dict[int, str]) -> None:
    assert reasons.keys() == BAD.keys()
    for row, word in BAD.items():
        assert reasons[row].startswith(FAILING[word][1]), reasons[row]


def reasons_in(table: Path) -> dict[int, str]:
    rows = pq.read_table(table, columns=["row", "reason"]).to_pylist()
    return {row["row"]: row["reason"] for row in rows if row["reason"] is not None}


# --- the commands -----------------------------------------------------------------------------------------------------


def test_select_leaves_the_failing_rows_out_and_no_other_row_changes(folder: Path, tmp_path: Path) -> None:
    words = ["select", "inter-diversity", folder / "pool.jsonl", "--model", folder / "model", "--label-column", "kind"]
    common = ["--layer", "1", "--keep", "20%", "--quiet", "--cache", tmp_path / "cache"]
    result = siftune([*words, *common, "--run", tmp_path / "run"])
    assert result.code == 0, result
    assert "Traceback" not in result.err
    add_up(tmp_path / "run")
    expect(reasons_in(tmp_path / "run" / "rows.parquet"))

    backbone, pool = Backbone(str(folder / "model"), layer=1), load_pool(folder / "pool.jsonl")
    left_out = Pool(pool.source, pool.format, pool.fingerprint, dict.fromkeys(BAD, "bad"))
    features, reasons = gather(pool, SerialEngine().run(FeatureTask(backbone), pool, pool.shards(), label="f"))
    expected, _ = gather(left_out, SerialEngine().run(FeatureTask(backbone), left_out, pool.shards(), label="f"))
    expect(reasons)
    sound = [row for row in range(ROWS) if row not in BAD]
    assert features["hidden"][sound].tobytes() == expected["hidden"][sound].tobytes()


@pytest.mark.slow
def test_workers_give_failing_rows_the_same_reasons(folder: Path) -> None:
    pool, task = load_pool(folder / "pool.jsonl"), FeatureTask(Backbone(str(folder / "model"), layer=1))
    shards = [Shard(0, 0, 20), Shard(1, 20, ROWS)]
    columns, reasons = gather(pool, LocalEngine(workers=2).run(task, pool, shards, label="features"))
    expect(reasons)
    serial, _ = gather(pool, SerialEngine().run(task, pool, shards, label="features"))
    assert columns["hidden"].tobytes() == serial["hidden"].tobytes()


def test_plan_says_how_many_rows_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    result = siftune(
        ["plan", folder / "pool.jsonl", "--model", folder / "model", "--layer", "1", "--sample", str(ROWS),
         "--seeds", folder / "pool.jsonl", "--cache", tmp_path / "cache", "--json"]
    )  # fmt: skip
    assert result.code == 0, result
    measured = json.loads(result.out)["measured"]
    assert (measured["sample_rows"], measured["sample_rows_left_out"]) == (ROWS - len(BAD), len(BAD))
    assert "4 of the sample's 40 rows cannot be tokenised" in result.err
    assert "pool.jsonl, line 6: chat template fails: ZeroDivisionError" in result.err


def test_train_score_reference_and_held_out_leave_the_failing_rows_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    sft = {"per_device_train_batch_size": 4, "max_steps": 1, "max_length": 96, "save_strategy": "no"}
    recipe: dict[str, Any] = {
        "model": str(folder / "model"),
        "train": str(folder / "pool.jsonl"),
        "eval": {"held": str(folder / "pool.jsonl")},
        "sft": {**sft, "gradient_checkpointing": False},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    result = siftune(["train", "recipe.yaml", "--run", "run", "--quiet", "--cache", "cache"])
    assert result.code == 0, result
    expect(reasons_in(Path("run/rows.parquet")))
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["rows"]["reasons"] == {"chat template fails": len(BAD)}
    assert manifest["info"]["held_out"]["held"]["skipped"] == {"chat template fails": len(BAD)}

    words = ["score-reference", "recipe.yaml", "--reference", folder / "model", "--out", "table.parquet"]
    result = siftune([*words, "--cache", "cache", "--quiet"])
    assert result.code == 0, result
    assert pq.read_metadata("table.parquet").num_rows == ROWS - len(BAD)


def test_losses_and_ratings_leave_the_failing_rows_out(folder: Path) -> None:
    pool = load_pool(folder / "pool.jsonl")
    reasons = IFD(model=str(folder / "model")).score(pool).reasons
    expect({row: reason for row, reason in reasons.items() if not reason.startswith("ratio above 1")})
    rater = Rater(CausalLM(str(folder / "model")), Prompt("{question} {answer}"))
    _, reasons, _ = rater.ratings(pool, list(range(ROWS)))
    expect(reasons)


def test_a_generator_refuses_a_prompt_that_its_template_fails_on(folder: Path) -> None:
    from siftune.models.generate import Request
    from siftune.models.sampling import TransformersGenerator

    asked = [
        Request(key=str(index), messages=(("user", text),), seed=1, max_new_tokens=2)
        for index, text in enumerate(["hello", "zero", "good day"])
    ]
    replies = {reply.key: reply for reply in TransformersGenerator(str(folder / "model"), device="cpu").replies(asked)}
    assert replies["1"].error == FAILING["zero"][1]
    assert replies["1"].finish_reason == "refused"
    assert replies["0"].error is None
    assert replies["2"].error is None


# --- tokenizers -------------------------------------------------------------------------------------------------------


def panicking(tokenizer: Any, error: BaseException) -> Any:
    """The tokenizer, raising `error` where a text holds POISON."""
    inner = tokenizer.__class__

    class Panics(inner):  # type: ignore[misc, valid-type]
        def __call__(self, text: Any, *more: Any, **options: Any) -> Any:
            if "POISON" in str(text):
                raise error
            return super().__call__(text, *more, **options)

    tokenizer.__class__ = Panics
    return tokenizer


TEXTS = [f"text {index}" + (" POISON" if index in (3, 300) else "") for index in range(400)]


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), MemoryError(), ValueError("bad")])
def test_texts_that_the_tokenizer_fails_on_are_isolated(folder: Path, error: BaseException) -> None:
    backbone = Backbone(str(folder / "model"), layer=1)
    expected = tokenise(backbone, TEXTS)
    panicking(backbone.tokenizer, error)
    for index, (one, sound) in enumerate(zip(tokenise(backbone, TEXTS), expected, strict=True)):
        if "POISON" in TEXTS[index]:
            assert one.reason is not None
            assert one.reason.startswith(f"tokenizer fails: {type(error).__name__}")
            assert not len(one.ids)
        else:
            assert one.reason is None
            assert one.ids.tolist() == sound.ids.tolist()
    lm = CausalLM(str(folder / "model"))
    sequences = lm.encode(TEXTS)
    panicking(lm.tokenizer, error)
    for text, encoded, sound in zip(TEXTS, lm.encode(TEXTS), sequences, strict=True):
        assert (encoded.reason is not None) == ("POISON" in text)
        assert encoded.reason is not None or encoded.ids.tolist() == sound.ids.tolist()


@pytest.mark.parametrize("text", ["prompt", "chat"])
def test_training_leaves_out_rows_that_the_tokenizer_panics_on(text: str, tmp_path: Path) -> None:
    write_chats(tmp_path / "pool.jsonl", {2: "POISON"})
    pool = load_pool(tmp_path / "pool.jsonl")
    encode = Encoder(panicking(tiny_tokenizer(), PanicException("overflow")), text, 200)
    plain = Encoder(tiny_tokenizer(), text, 200)
    for row, result in encode.over(pool, range(ROWS)):
        if row == 2:
            assert str(result) == (
                f"{'tokenizer' if text == 'prompt' else 'chat template'} fails: PanicException: overflow"
            )
        else:
            assert result == plain(pool.read([row])[0])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure_of_a_row(folder: Path, stop: type[BaseException]) -> None:
    backbone = Backbone(str(folder / "model"), layer=1)
    panicking(backbone.tokenizer, stop())
    with pytest.raises(stop):
        tokenise(backbone, TEXTS)
    encode = Encoder(backbone.tokenizer, "prompt", 99)
    with pytest.raises(stop):
        encode(Row(0, "", "POISON", "", "x"))


def test_a_tokenizer_without_an_unknown_token_fails_on_single_rows_alone(tmp_path: Path) -> None:
    words = ["<pad>", "<eos>", "<bos>", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))  # type: ignore[call-arg]
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_model(layers=1, width=16, vocabulary=len(words)).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(tmp_path / "model")
    rows = [
        {"instruction": "a b", "output": "c" if index != 7 else "unknown", "kind": "ab"[index % 2]}
        for index in range(20)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "select",
        "inter-diversity",
        f"{tmp_path}/pool.jsonl",
        "--model",
        f"{tmp_path}/model",
        "--label-column",
        "kind",
    ]
    result = siftune([*words, "--layer", "1", "--keep", "5", "--run", tmp_path / "run", "--cache", tmp_path / "cache"])
    assert result.code == 0, result
    (reason,) = reasons_in(tmp_path / "run" / "rows.parquet").items()
    assert reason[0] == 7
    assert reason[1].startswith("tokenizer fails: ")


# --- limits of a template ---------------------------------------------------------------------------------------------

ENDLESS = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
}
GROWING = "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
TURNS = [{"role": "user", "content": "Hi"}]


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
@pytest.mark.parametrize("in_thread", [False, True], ids=["main", "thread"])
def test_a_template_without_an_end_is_stopped(template: str, in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    raised: list[BaseException] = []

    def render() -> None:
        try:
            apply_template(with_template(template), TURNS, tokenize=False)
        except BaseException as error:
            raised.append(error)

    if in_thread:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join(60)
    else:
        render()
    assert isinstance(raised[0], Overrun)
    assert str(raised[0]) == "chat template fails: it took more than 0.2 seconds"
    assert apply_template(with_template("{{ messages[0]['content'] }}"), TURNS, tokenize=False) == "Hi"


def test_a_template_that_doubles_its_text_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MEMORY", 2**26)
    monkeypatch.setattr(chat_template, "SECONDS", 60.0)
    with pytest.raises(Overrun, match=r"more than 0\.0625 GiB of memory"):
        apply_template(with_template(GROWING), TURNS, tokenize=False)


def test_a_rendered_text_may_exceed_its_messages_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_ADDED", 1000)
    with pytest.raises(Overrun, match="its text is 2,000 characters for a row of 2"):
        apply_template(with_template("{{ messages[0]['content'] * 1000 }}"), TURNS, tokenize=False)
    long = [{"role": "user", "content": "x" * 5000}]
    assert len(apply_template(with_template("{{ messages[0]['content'] }}"), long, tokenize=False)) == 5000


def test_a_stop_that_comes_late_is_raised_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.03)
    monkeypatch.setattr(chat_template, "TICK", 0.001)

    def busy(rounds: int) -> int:
        return sum(index % 7 for index in range(rounds))

    outcomes = {True: 0, False: 0}
    for rounds in range(0, 1_000_000, 50_000):
        try:
            limited(lambda rounds=rounds: busy(rounds), characters=0)  # type: ignore[misc]
            outcomes[True] += 1
        except Overrun:
            outcomes[False] += 1
        busy(20_000)
    assert all(outcomes.values()), outcomes


def test_renders_that_are_stopped_too_often_are_the_templates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_ADDED", 10)
    monkeypatch.setattr(chat_template, "MOST_OVERRUNS", 2)
    monkeypatch.setattr(chat_template, "_OVERRUNS", iter(range(1, 100)))
    tokenizer = with_template("{{ messages[0]['content'] * 100 }}")
    for _ in range(2):
        with pytest.raises(Overrun):
            apply_template(tokenizer, TURNS, tokenize=False)
    with pytest.raises(UserError, match=r"exceeded its limits 3 times .* fix it in the model's folder"):
        apply_template(tokenizer, TURNS, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"cannot be parsed \(line 1: .*fix it in the model's folder"),
        ("{{ 10 ** 10 ** 10 }}", r"uses the operator \*\*"),
        (ENDLESS["loop"], r"cannot be used \(chat template fails: it took more than"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence_that_names_the_models_folder(
    folder: Path, tmp_path: Path, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    tokenizer = with_template(template)
    with pytest.raises(UserError, match=message):
        check_template(tokenizer)
    save_tiny(tmp_path / "model", layers=1, width=16)
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["select", "ifd", folder / "pool.jsonl", "--model", tmp_path / "model", "--cache", tmp_path / "cache"]
    sentence = refused(siftune([*words, "--keep", "5", "--run", tmp_path / "run"]))
    assert f"chat template of model='{tmp_path / 'model'}'" in sentence


def test_a_refusal_is_no_failure_and_markdown_no_operator() -> None:
    with pytest.raises(Refusal, match="chat template refuses the row: no system"):
        apply_template(with_template("{{ raise_exception('no system') }}"), TURNS, tokenize=False)
    check_template(with_template("**bold** {{ '**' }}{{ raise_exception('no') }}"))
    check_template(tiny_tokenizer(template=False))


def test_a_template_whose_every_row_fails_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=1, width=16)
    with_template("{{ 1 // 0 }}").save_pretrained(tmp_path / "model")
    words = ["select", "ifd", folder / "pool.jsonl", "--model", tmp_path / "model", "--cache", tmp_path / "cache"]
    sentence = refused(siftune([*words, "--keep", "5", "--run", tmp_path / "run"]))
    assert "no row has a score (40 chat template fails)" in sentence


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_half_downloaded_model_is_one_sentence(tmp_path: Path) -> None:
    write_chats(tmp_path / "pool.jsonl", {})
    save_tiny(tmp_path / "model", layers=1, width=16)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    rest = ["--model", tmp_path / "model", "--keep", "5", "--cache", tmp_path / "cache", "--run", tmp_path / "run"]
    labels = ["--label-column", "kind", "--layer", "1"]
    for words in (["ifd"], ["inter-diversity", *labels]):
        sentence = refused(siftune(["select", words[0], tmp_path / "pool.jsonl", *words[1:], *rest]))
        assert f"{tmp_path / 'model'}" in sentence
        assert "incomplete or damaged" in sentence
    pytest.importorskip("trl")
    recipe = {"model": str(tmp_path / "model"), "train": str(tmp_path / "pool.jsonl"), "sft": {"max_steps": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["train", tmp_path / "recipe.yaml", "--run", tmp_path / "trained", "--cache", tmp_path / "cache", "--quiet"]
    assert "incomplete or damaged" in refused(siftune(words))


def test_a_line_beyond_the_limit_is_a_bad_row_that_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "LONGEST_ROW", 1000)
    good = json.dumps({"text": "good"}).encode()
    long = json.dumps({"text": "x" * 5000}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, long, good, json.dumps({"text": "y" * 900}).encode(), long]))
    pool = load_pool(tmp_path / "a.jsonl", on_bad_row="skip")
    expected = f"too large: a line of {len(long) + 1:,} bytes, above 1,000"
    assert dict(pool.reasons) == {1: expected, 4: expected.replace("5,013", "5,012")}
    assert [line for _, line in pool.source.locations(range(5))] == [1, 2, 3, 4, 5]


def test_a_row_that_memory_does_not_suffice_for_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from siftune.data import build

    class Short:
        def decode(self, text: str) -> Any:
            if "huge" in text:
                raise MemoryError
            return json.loads(text)

    canonical = build.canonical_json

    def short_canonical(value: Any) -> str:
        if value.get("text") == "wide":
            raise MemoryError
        return canonical(value)

    monkeypatch.setattr(parse, "_DECODER", Short())
    monkeypatch.setattr(build, "canonical_json", short_canonical)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in ("a", "huge", "b", "wide")))
    pool = load_pool(tmp_path / "a.jsonl", on_bad_row="skip")
    assert dict(pool.reasons) == {
        1: "too large: memory ran out over 16 characters",
        3: "too large: memory ran out over its values",
    }


def test_memory_that_runs_out_over_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from siftune.data import sources

    def short(stream: Any) -> Any:
        raise MemoryError
        yield

    monkeypatch.setattr(sources, "json_lines", short)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    words = [
        "select",
        "random",
        tmp_path / "a.jsonl",
        "--keep",
        "1",
        "--run",
        tmp_path / "r",
        "--cache",
        tmp_path / "c",
    ]
    assert f"{tmp_path / 'a.jsonl'} cannot be read: memory ran out" in refused(siftune(words))


def test_memory_and_panics_elsewhere_are_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from siftune.cli import main

    def raising(error: BaseException) -> Any:
        def dispatch(words: list[str]) -> int:
            raise error

        return dispatch

    monkeypatch.setattr(main, "_dispatch", raising(MemoryError()))
    assert "out of memory" in refused(siftune(["select"]))
    monkeypatch.setattr(main, "_dispatch", raising(PanicException("overflow")))
    result = siftune(["select"])
    assert result.code == 1
    assert "Traceback" not in result.err
    monkeypatch.setattr(main, "_dispatch", raising(SystemExit(3)))
    with pytest.raises(SystemExit):
        siftune(["select"])
