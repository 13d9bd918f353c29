"""Domain descriptions: the shipped ones, a user's file, and one sentence for every mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from siftune.demo import corpus, story
from siftune.errors import UserError
from siftune.offline.daar.descriptions import fill, read_descriptions
from tools.demo import prompts


def test_the_papers_four_domains_are_shipped() -> None:
    found = read_descriptions()
    assert found.names == ("common_sense", "reasoning", "mathematics", "coding")
    assert [domain.threshold for domain in found.domains] == [None, None, 0.90, None]


def test_the_seed_request_names_its_domain_and_forbids_the_others() -> None:
    found = read_descriptions({"law": "Questions of law.", "music": "Notes and {harmony}.", "food": "Recipes."})
    (_, system), (role, request) = found.seed_messages(found.domains[0], 5)
    assert role == "user"
    assert "training data" in system
    assert "Write 5 training examples" in request
    assert "The domain: Questions of law." in request
    for other in ('"music": Notes and {harmony}.', '"food": Recipes.'):
        assert f"Do not write anything that belongs to {other}" in request
    assert 'belongs to "law":' not in request


def test_the_augment_request_shows_rows_as_text_only() -> None:
    found = read_descriptions()
    shown = [{"instruction": "Print {examples}.", "input": "", "output": "{description}"}] * 2
    request = found.augment_messages(found.domains[3], shown)[-1][1]
    assert request.count("Instruction: Print {examples}.") == 2
    assert "Output: {description}" in request
    assert "unlike every one of them" in request


def test_own_prompts_replace_only_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "domains.yaml"
    path.write_text("prompts:\n  system: ''\n  seeds: 'Give {count} of: {description}'\n")
    found = read_descriptions(path)
    assert found.names[0] == "common_sense"
    assert found.seed_messages(found.domains[0], 2)[0][1].startswith("Give 2 of: General knowledge")
    assert "Do not write" in found.augment_messages(found.domains[0], [])[0][1]


def test_fill_is_one_pass() -> None:
    assert fill("{a}{b}{ c}{d}", {"a": "{b}", "b": "{a}"}) == "{b}{a}{ c}{d}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("law: Only one.", "holds 1 domain; describe at least 2"),
        ("- law\n- music", "holds a list"),
        ("law: [", "is not YAML"),
        ("no: Norwegian.\nmusic: Notes.", "the key False, which YAML does not read as text; put it in quotes"),
        ("law:\nmusic: Notes.", "gives the domain 'law' no description"),
        ("law: {descripton: x}\nmusic: y", "domain law has an unknown key 'descripton'; did you mean description?"),
        ("law: {description: x, threshold: 85}\nmusic: y", "domain law: threshold=85 is not a cosine"),
        ("a/b: x\nmusic: y", "names a domain 'a/b'"),
        ("domains: {law: x, music: y}\nprompt: {}", "unknown key 'prompt'; did you mean prompts?"),
        ("prompts: {seeds: 'Write {cuont} rows of {description}'}", "holds {cuont}, which is not one of"),
        ("prompts: {augment: 'Another {description}'}", "the prompt augment lacks {examples}"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_descriptions(path)
    assert said in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_an_absent_file_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"domains nowhere.yaml cannot be read: No such file"):
        read_descriptions("nowhere.yaml")


def test_the_demos_file_is_the_wording_its_model_was_trained_on() -> None:
    found = read_descriptions(story.DOMAINS)
    assert found.names == tuple(prompts.DESCRIPTIONS)
    first = {name: sentences[0] for name, sentences in prompts.DESCRIPTIONS.items()}
    rows = corpus.seed_rows(3, seed=0)[:3]
    for domain in found.domains:
        assert domain.description == first[domain.name]
        avoid = [sentence for name, sentence in first.items() if name != domain.name]
        asked = prompts.seed_request(domain.description, count=5, avoid=avoid)
        assert found.seed_messages(domain, 5) == (("user", asked),)
        more = prompts.variation_request(domain.description, rows, avoid=avoid)
        assert found.augment_messages(domain, rows) == (("user", more),)
