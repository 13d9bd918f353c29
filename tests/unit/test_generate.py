"""A local chat model: a reply hangs on its request alone, ends where it should, and its draws follow the softmax."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from siftune.errors import UserError
from siftune.models import sampling
from siftune.models.generate import Ending, Reply, Request, check_generator, open_generator, request_key
from siftune.models.journal import Journal, Journaled
from siftune.models.sampling import TransformersGenerator, draw
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat"), "llama")


@pytest.fixture(scope="module")
def generator(folder: Path) -> TransformersGenerator:
    made = open_generator(str(folder), device="cpu")
    assert isinstance(made, TransformersGenerator)
    return made


def ask(key: str, text: str, **settings: object) -> Request:
    given: dict[str, object] = {"seed": 7, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 24, **settings}
    return Request(key=key, messages=(("user", text),), **given)  # type: ignore[arg-type]


def answers(generator: TransformersGenerator, requests: list[Request]) -> dict[str, Reply]:
    return {reply.key: reply for reply in generator.replies(requests)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_reply_does_not_hang_on_its_batch(family: str, tmp_path: Path) -> None:
    generator = TransformersGenerator(str(save_tiny(tmp_path, family)), device="cpu")
    requests = [ask(str(i), "word " * (3 * i + 1), seed=i, max_new_tokens=12 + i) for i in range(6)]
    together = answers(generator, requests)
    alone = {r.key: answers(generator, [r])[r.key] for r in requests}
    backwards = answers(replace(generator, rows=2), requests[::-1])
    assert together == alone == backwards
    assert len({reply.text for reply in together.values()}) == 6


def ends_at(character: str) -> object:
    """A rule: the reply ends before the first such character."""
    return lambda text: Ending(text.index(character), "stop") if character in text else None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rule_ends_its_own_reply_alone_whatever_the_batch(family: str, tmp_path: Path) -> None:
    generator = TransformersGenerator(str(save_tiny(tmp_path, family)), device="cpu")
    plain = [ask(str(i), "word " * (i + 1), seed=i, max_new_tokens=40) for i in range(4)]
    free = answers(generator, plain)
    ruled = [replace(request, end_rule=ends_at(free[request.key].text[9])) for request in plain[:2]] + plain[2:]  # type: ignore[arg-type]
    together = answers(generator, ruled)
    assert together == {r.key: answers(generator, [r])[r.key] for r in ruled}
    for key in "01":
        assert together[key].text == free[key].text[: free[key].text.index(free[key].text[9])]
        assert together[key].completion_tokens % sampling.CHECK_EVERY == 0
        assert together[key].finish_reason == "stop"
    assert [together[key] for key in "23"] == [free[key] for key in "23"]


def test_a_reply_is_handed_out_as_it_ends_and_its_row_costs_nothing_more(
    generator: TransformersGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = generator.network.forward

    def counted(*args: object, **more: object) -> object:
        rows.append(len(more["input_ids"]))  # type: ignore[arg-type]
        return forward(*args, **more)

    monkeypatch.setattr(generator.network, "forward", counted)
    caps = {"a": 3, "b": 20, "c": 9}
    replies = generator.replies([ask(key, "Hello", seed=ord(key), max_new_tokens=cap) for key, cap in caps.items()])
    assert next(replies).key == "a"
    assert rows == [3] * 3
    assert [reply.key for reply in replies] == ["c", "b"]
    assert rows == [3] * 3 + [2] * 6 + [1] * 11


def test_replies_that_ended_before_a_kill_are_in_the_journal(generator: TransformersGenerator, tmp_path: Path) -> None:
    requests = [ask(str(i), "Hello", seed=i, max_new_tokens=5 * (i + 1)) for i in range(4)]
    free = answers(generator, requests)
    with Journal(tmp_path / "replies.jsonl") as journal:
        for number, _ in enumerate(Journaled(generator, journal).replies(requests), start=1):
            assert len((tmp_path / "replies.jsonl").read_bytes().splitlines()) == number
            if number == 2:
                break
    with Journal(tmp_path / "replies.jsonl") as journal:
        resumed = Journaled(generator, journal)
        assert {reply.key: reply for reply in resumed.replies(requests)} == free
        assert (resumed.counts.sent, resumed.counts.reused) == (2, 2)


def test_seed_and_only_the_seed_changes_a_reply(generator: TransformersGenerator) -> None:
    torch.manual_seed(1)
    first = answers(generator, [ask("a", "Hello"), ask("b", "Hello", seed=8)])
    state = torch.random.get_rng_state()
    second = answers(generator, [ask("a", "Hello")])
    assert first["a"] == second["a"]
    assert first["a"].text != first["b"].text
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state was used"


def test_the_prompt_is_the_chat_template(generator: TransformersGenerator) -> None:
    request = Request(key="a", messages=(("system", "Be brief."), ("user", "Hi")))
    said = tiny_tokenizer().decode(generator.prompt(request))
    assert said == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_greedy_equals_a_naive_loop_without_a_cache(generator: TransformersGenerator) -> None:
    request = ask("a", "What is two and two?", temperature=0.0, max_new_tokens=10)
    ids = generator.prompt(request)
    model, new = tiny_model("llama"), []
    with torch.no_grad():
        for _ in range(10):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    expected = tiny_tokenizer().decode([t for t in new if t not in (1, 4)], skip_special_tokens=True)
    assert answers(generator, [request])["a"].text == expected


def test_stop_strings_end_a_reply_and_are_not_part_of_it(generator: TransformersGenerator) -> None:
    free = answers(generator, [ask("a", "Hello", max_new_tokens=40)])["a"]
    assert free.finish_reason == "length"
    assert free.completion_tokens == 40
    stop = free.text[10:13]
    place = free.text.index(stop)
    cut, other = answers(
        generator, [ask("a", "Hello", max_new_tokens=40, stop=(stop,)), ask("b", "Hello", max_new_tokens=40)]
    ).values()
    assert (cut.text, cut.finish_reason) == (free.text[:place], "stop")
    assert other.text == free.text
    assert cut.completion_tokens < 40


def test_the_end_of_turn_ends_a_reply(generator: TransformersGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = generator._cached.get("ends")
    if ends is None:
        answers(generator, [ask("a", "x", max_new_tokens=1)])
        ends = generator._cached["ends"]
    assert set(ends) == {1, 4}  # <eos>, and <|im_end|> which the template writes after an answer
    request = ask("a", "Hello", max_new_tokens=40)
    free = answers(generator, [request])["a"]
    token = tiny_tokenizer()(free.text[5], add_special_tokens=False)["input_ids"][0]
    monkeypatch.setitem(generator._cached, "ends", [*ends, token])
    cut = answers(generator, [request, ask("b", "a longer prompt here", max_new_tokens=40)])["a"]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(free.text[5])]


def test_a_prompt_without_room_is_refused_and_the_others_go_on(generator: TransformersGenerator) -> None:
    replies = answers(generator, [ask("long", "x" * 600), ask("tight", "x" * 470), ask("short", "x")])
    assert replies["long"].finish_reason == "refused"
    assert "512 positions" in str(replies["long"].error)
    assert replies["tight"].completion_tokens < 24
    assert replies["short"].error is None
    assert all(reply.final for reply in replies.values())


def test_a_base_model_without_template_gets_plain_text(tmp_path: Path) -> None:
    generator = TransformersGenerator(str(save_tiny(tmp_path, "gpt2", template=False)), device="cpu")
    request = ask("a", "Once upon a time")
    assert tiny_tokenizer(template=False).decode(generator.prompt(request)) == "Once upon a time\n"
    assert answers(generator, [request])["a"].completion_tokens > 0


def test_draws_follow_the_softmax_cut_at_top_p() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9], dtype=torch.float64)
    p = np.exp(logits.numpy() / 0.8) / np.exp(logits.numpy() / 0.8).sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.9)) + 1]
    expected = np.zeros(5)
    expected[kept] = p[kept] / p[kept].sum()
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count
    temperature, top_p = torch.full((count, 1), 0.8), torch.full((count, 1), 0.9)
    tokens = draw(logits.expand(count, -1), temperature, top_p, uniform)
    found = np.bincount(tokens.flatten().numpy(), minlength=5) / count
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.min() == 0


def test_sorting_only_the_likeliest_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=chance) * torch.linspace(0.2, 6, 64)[:, None]
    logits[::3] = (logits[::3] * 2).round() / 2  # many equal ones
    logits[5] = 0.0
    temperature, top_p, uniform = (torch.rand(64, 1, generator=chance, dtype=torch.float64) for _ in range(3))
    temperature[::7], top_p[::5] = 0.0, 1.0
    monkeypatch.setattr(sampling, "LIKELIEST", 300)
    complete = draw(logits, temperature, top_p, uniform)
    for likeliest in (1, 8, 40):
        monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
        for row in range(64):
            one = slice(row, row + 1)
            assert draw(logits[one], temperature[one], top_p[one], uniform[one]) == complete[row]
    assert complete[5].item() == draw(logits[5:6], temperature[5:6], top_p[5:6], uniform[5:6]).item()


def test_nan_logits_are_a_sentence() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(UserError, match="NaN"):
        draw(torch.tensor([[float("nan"), 1.0]]), one, one, one)


def test_keys_hang_on_the_model_and_the_question(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path, "llama", seed=1)
    first, again, changed = (TransformersGenerator(str(f), device="cpu").key for f in (folder, folder, other))
    assert first == again != changed
    assert request_key(first, ask("a", "x")) == request_key(first, ask("b", "x"))
    assert request_key(first, ask("a", "x")) != request_key(first, ask("a", "x", seed=1))
    assert request_key(first, ask("a", "x")) == request_key(first, ask("a", "x", end_rule=ends_at(".")))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("./nowhere", "generator='./nowhere' is not a folder here"),
        ("ftp://host/v1", "not a supported address"),
        (" ", "names no model"),
        ("http:///v1", "not a server's address"),
        ("http://me:secret@host/v1", "OPENAI_API_KEY"),
    ],
)
def test_names_that_cannot_be_used(spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_generator(spec)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
