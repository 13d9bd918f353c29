"""A row as token ids and labels: which tokens have labels, exactly, in both forms and at every length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.data.formats import BadRow
from siftune.demo.embedded import model_folder
from siftune.errors import UserError
from siftune.models.tokenize_rows import Encoder, answer_tokens, check_text
from siftune.records import Row
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
NO_SYSTEM = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}" + UNMARKED
REWRITING = "{{ 'turns: ' + (messages | length | string) }}" + UNMARKED
UPPER = (
    "{{ (messages | length | string) }}{%- for m in messages %}{{ '<|im_start|>' + m['content'] | upper }}{%- endfor %}"
)

ALPACA = Row(0, "", "Add the numbers.", "1 + 1", "It is 2.")
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4 it is"},
)
CHAT = Row(1, "", "…", "", "4 it is", TURNS)
PLAIN = Row(2, "", "", "", "Once upon a time.")


def split_by_label(tokenizer: object, row: Row, text: str, length: int = 400) -> tuple[str, str]:
    """The text without labels and the text of the labels; shapes are checked."""
    ids, labels = answer_tokens(row, tokenizer, text=text, max_length=length)
    assert len(ids) == len(labels) <= length
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert labels[0] == -100
    assert labels[-1] == ids[-1]
    skipped = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    taken = [label for label in labels if label != -100]
    return tokenizer.decode(skipped), tokenizer.decode(taken)  # type: ignore[attr-defined]


def test_a_prompt_is_the_question_a_newline_the_answer_and_the_end() -> None:
    assert split_by_label(tiny_tokenizer(), ALPACA, "prompt") == ("Add the numbers.\n1 + 1\n", "It is 2.<eos>")


def test_auto_takes_the_template_where_there_is_one() -> None:
    expected = ("<|im_start|>user\nAdd the numbers.\n1 + 1<|im_end|>\n<|im_start|>assistant\n", "It is 2.<|im_end|>")
    assert split_by_label(tiny_tokenizer(), ALPACA, "auto") == expected
    assert split_by_label(tiny_tokenizer(), ALPACA, "chat") == expected
    assert split_by_label(tiny_tokenizer(template=False), ALPACA, "auto") == split_by_label(
        tiny_tokenizer(), ALPACA, "prompt"
    )


@pytest.mark.parametrize("template", [UNMARKED, REWRITING])
def test_without_marks_the_last_answer_and_its_end_have_labels(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    before, after = split_by_label(tokenizer, ALPACA, "chat")
    assert after == "It is 2.<|im_end|>"
    assert before.endswith("1 + 1<|im_end|>\n<|im_start|>assistant\n")
    before, after = split_by_label(tokenizer, CHAT, "chat")
    assert after == "4 it is<|im_end|>"
    assert "assistant\n2<|im_end|>" in before


def test_marks_and_no_marks_agree_to_the_token_on_one_turn() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = UNMARKED
    for row in (ALPACA, Row(3, "", "Write\n\n", "", "  \n two \n")):
        assert answer_tokens(row, bare, text="chat", max_length=99) == answer_tokens(
            row, tiny_tokenizer(), text="chat", max_length=99
        )


def test_with_marks_every_answer_has_labels() -> None:
    before, after = split_by_label(tiny_tokenizer(), CHAT, "auto")
    assert after == "2<|im_end|>4 it is<|im_end|>"
    assert before.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_without_a_system_turn_gets_it_in_the_users() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    before, after = split_by_label(tokenizer, CHAT, "chat")
    assert before.startswith("<|im_start|>user\nBe brief.\n\n1 + 1?<|im_end|>")
    assert after == "4 it is<|im_end|>"


def test_messages_as_a_prompt_are_their_turns_and_the_last_answer() -> None:
    row = Row(
        4,
        "",
        "Be brief.\n1 + 1?",
        "",
        "2",
        tuple(
            {"role": role, "content": text}
            for role, text in (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))
        ),
    )
    assert split_by_label(tiny_tokenizer(template=False), row, "prompt") == ("Be brief.\n1 + 1?\n", "2<eos>")


def test_plain_text_has_labels_but_for_its_first_token() -> None:
    for text in ("auto", "prompt"):
        assert split_by_label(tiny_tokenizer(), PLAIN, text) == ("O", "nce upon a time.<eos>")
    with pytest.raises(BadRow, match="no question"):
        answer_tokens(PLAIN, tiny_tokenizer(), text="chat", max_length=99)


def test_the_tokenizers_own_opening_stands_in_front_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # opens and ends every text by itself
        single="<bos> $A <eos>", pair="<bos> $A $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 2
    ids, labels = answer_tokens(ALPACA, tokenizer, text="prompt", max_length=99)
    assert (ids.count(2), ids.count(1)) == (1, 1)
    assert (ids[0], ids[-1], labels[0]) == (2, 1, -100)
    ids, _ = answer_tokens(ALPACA, tokenizer, text="chat", max_length=99)
    assert 2 not in ids
    assert 1 not in ids
    assert split_by_label(tokenizer, PLAIN, "prompt") == ("<bos>", "Once upon a time.<eos>")


def test_a_token_that_would_grow_into_the_answer_has_no_label() -> None:
    """Tokens before the answer are those of the question alone, also where the tokenizer would join both."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "a": 1, "\n": 2, "b": 3, "\nb": 4}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer("a\nb")["input_ids"] == [1, 4]
    assert answer_tokens(Row(0, "", "a", "", "b"), tokenizer, text="prompt", max_length=9) == (
        [1, 2, 3, 0],
        [-100, -100, 3, 0],
    )


def test_rows_are_cut_on_the_right_and_say_so() -> None:
    whole, labels = answer_tokens(ALPACA, tiny_tokenizer(), text="prompt", max_length=400)
    before = labels.count(-100)
    for length in range(1, len(whole) + 3):
        encode = Encoder(tiny_tokenizer(), "prompt", length)
        if length <= before:
            with pytest.raises(
                BadRow, match=f"no answer tokens after truncation: {before} tokens come before the answer"
            ):
                encode(ALPACA)
        else:
            found = encode(ALPACA)
            assert found.input_ids == whole[:length]
            assert found.labels == labels[:length]
            assert found.cut == (length < len(whole))
            assert found.label_tokens == min(length, len(whole)) - before


def test_an_answer_that_the_template_rewrites_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = UPPER
    with pytest.raises(BadRow, match="drops or rewrites"):
        answer_tokens(ALPACA, tokenizer, text="chat", max_length=99)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(BadRow, match="chat template refuses the row: never"):
        answer_tokens(CHAT, tokenizer, text="chat", max_length=99)


@given(question=st.text(max_size=12), answer=st.text(min_size=1, max_size=12), text=st.sampled_from(["chat", "prompt"]))
def test_all_of_any_answer_has_labels_and_nothing_else(question: str, answer: str, text: str) -> None:
    question = "Q" + "".join(c for c in question if not "\ud800" <= c <= "\udfff")
    answer = "".join(c for c in answer if not "\ud800" <= c <= "\udfff") or "A"
    end = "<|im_end|>" if text == "chat" else "<eos>"
    assert split_by_label(tiny_tokenizer(), Row(0, "", question, "", answer), text)[1] == answer + end


def test_what_the_model_sees_when_asked_is_what_comes_before_the_answer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    ids, labels = answer_tokens(ALPACA, tokenizer, text="chat", max_length=200)
    turns = [{"role": "user", "content": ALPACA.question}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert ids[: len(asked)] == list(asked)
    assert labels.count(-100) == len(asked)


def test_forms_that_rows_and_model_cannot_take_are_refused() -> None:
    bare, chat = tiny_tokenizer(template=False), tiny_tokenizer()
    for said, tokenizer, format, why in (
        ("chats", chat, "alpaca", "text='chats' is not known; use one of auto, chat, prompt"),
        ("chat", bare, "alpaca", "model='m' has none; set text: prompt"),
        ("auto", bare, "messages", "the rows are messages and model='m' has no chat template"),
        ("chat", chat, "text", "rows of plain text have none"),
    ):
        with pytest.raises(UserError, match=why):
            check_text(said, tokenizer, model="m", format=format)
    for said, tokenizer, format in (("auto", bare, "alpaca"), ("prompt", bare, "messages"), ("auto", chat, "text")):
        check_text(said, tokenizer, model="m", format=format)
    with pytest.raises(UserError, match="this tokenizer has none"):
        Encoder(bare, "chat", 9)
