"""What counts as a secret, and that nothing which writes or prints lets one through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siftune.errors import UserError
from siftune.files import write_json
from siftune.models.server import OpenAIGenerator
from siftune.redaction import MASK, is_secret_key, mask_patterns, redact, redact_text, shortened
from siftune.runs.folder import RunFolder, identity, read_manifest
from siftune.runs.options import write_yaml
from siftune.sft.model_card import model_card
from tests.hostile import hostile

SECRET = "sk-planted-5d1c0a77b2e94f36"


@pytest.mark.parametrize(
    "key",
    ["hub_token", "token", "api_key", "apiKey", "X-Api-Key", "Authorization", "proxy-authorization", "password", "secret",
     "client_secret", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "use_auth_token", "private_key", "OPENAI_API_KEY"],
)  # fmt: skip
def test_keys_that_hold_secrets_are_known_in_any_spelling(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    ["eos_token", "pad_token", "tokens", "max_new_tokens", "trained_tokens", "stop_at", "key", "keep", "secretary",
     "hub_model_id", "score_tokens", "token_accuracy", "passwords_file"],
)  # fmt: skip
def test_other_keys_are_left_alone(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:pw-1@host/v1", "http://***@host/v1"),
        ("https://host/v1?api_key=k1&n=2", "https://host/v1?api_key=***&n=2"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ('{"authorization": "Basic YWJj"}', '{"authorization": "***"}'),
        ("invalid: Bearer abc123def456", "invalid: Bearer ***"),
        ("python tune.py --api-key k1 --out x", "python tune.py --api-key *** --out x"),
        ("env HF_TOKEN=k1 python tune.py", "env HF_TOKEN=*** python tune.py"),
        ("tune.py --api-key $OPENAI_API_KEY --pad-token x", "tune.py --api-key $OPENAI_API_KEY --pad-token x"),
        ("mail me@host, a=b, keep=20%, 3 == 3", "mail me@host, a=b, keep=20%, 3 == 3"),
        ("http://127.0.0.1:8000/v1#model", "http://127.0.0.1:8000/v1#model"),
    ],
)
def test_secrets_inside_a_text_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask_patterns(text) == masked


def test_values_of_the_environments_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIFTUNE_TEST_API_KEY", SECRET)
    monkeypatch.setenv("OTHER_TOKEN", SECRET + "-longer")
    monkeypatch.setenv("SHORT_TOKEN", "none")
    assert redact_text(f"no {SECRET}-longer, no {SECRET}, none") == "no ***, no ***, none"
    assert redact({"rows": [f"x{SECRET}"], "n": 3, "pair": (1, SECRET)}) == {
        "rows": ["x***"],
        "n": 3,
        "pair": (1, MASK),
    }


def test_a_domain_of_such_a_name_keeps_its_counts() -> None:
    domains = {"secret": {"pool": 3, "kept": 1}}
    assert redact({"rows": {"domains": domains}}) == {"rows": {"domains": domains}}


def test_a_message_is_masked_before_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for before in range(180, 200):
        assert "sk-planted" not in shortened("x" * before + SECRET, 200)


@pytest.mark.parametrize("before", [150, 165, 175, 180, 185])
def test_a_servers_error_is_masked_before_it_is_cut(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    from siftune.models.server import _short

    sentence = _short(ValueError("y" * before + " " + SECRET + " and more words " * 9))
    assert "sk-pl" not in sentence
    assert len(sentence) <= 200


def test_no_error_and_no_reply_of_a_server_holds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    from tests.unit.test_server import QUICK, asked

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with hostile({"a": ["400"]}, lambda body: f"your key is {SECRET}") as server:
        replies = list(OpenAIGenerator(server.url, **QUICK).replies(asked("a", "b")))  # type: ignore[arg-type]
        assert any(SECRET in headers for headers in server.headers_seen)
    assert len(replies) == 2
    assert SECRET not in repr(replies)
    with hostile({"a": ["401"]}) as server, pytest.raises(UserError) as caught:
        list(OpenAIGenerator(server.url, **QUICK).replies(asked("a")))  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


CONFIG = {
    "command": "train",
    "sft": {"hub_token": SECRET, "learning_rate": 1e-4},
    "model_kwargs": {"token": SECRET},
    "request": {"headers": {"Authorization": f"Bearer {SECRET}", "X-Api-Key": SECRET}},
    "extra_body": [{"nested": {"password": SECRET}}],
    "judge_url": f"http://me:{SECRET}@host/v1?api_key={SECRET}",
}


def test_every_writer_masks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", CONFIG)
    (tmp_path / "a.yaml").write_text(write_yaml(CONFIG))
    for path in tmp_path.iterdir():
        assert SECRET not in path.read_text()
        assert MASK in path.read_text()
    assert json.loads((tmp_path / "a.json").read_text())["sft"]["learning_rate"] == 1e-4


def test_a_run_folder_masks_its_configuration_and_resumes(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path / "run", config=CONFIG, inputs={"pool": "1"}) as run:
            run.finish(note=f"http://me:{SECRET}@host/v1")
    for path in (tmp_path / "run").iterdir():
        assert SECRET not in path.read_text()
    assert read_manifest(tmp_path / "run")["config"]["sft"] == {"hub_token": MASK, "learning_rate": 1e-4}


def test_another_key_is_no_other_run() -> None:
    def of(secret: str) -> str:
        return identity({"model_kwargs": {"token": secret}}, {})

    assert of("hf_one") == of("hf_two")
    assert of("hf_one") != identity({"model_kwargs": {}}, {})


def test_the_model_card_masks() -> None:
    facts = {
        "recipe": {"model": "base", "train": ["rows.jsonl"], **CONFIG},
        "yaml": write_yaml(CONFIG),
        "adapter": False,
        "rows": {"read": 1, "used": 1, "tokens": 1, "label_tokens": 1, "cut": 0, "beyond": 0, "reasons": {}},
        "selection": [
            {"file": "f", "method": "alpagasus", "settings": {"judge_url": CONFIG["judge_url"]}, "read": 1, "kept": 1,
             "domains": {}},
        ],
        "tokens": dict.fromkeys(
            ("candidates", "trained_rows", "trained_tokens", "trained_label_tokens", "forward_tokens"), 1
        ),
        "train_loss": 1.0,
        "steps": 1,
        "seconds": 1.0,
        "preset": None,
        "versions": {},
        "siftune": "0",
    }  # fmt: skip
    assert SECRET not in model_card(facts)


def test_every_error_sentence_masks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from siftune.cli.main import main

    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in str(UserError(f"the hub says {SECRET}; try again"))
    for words in (["select", "random", f"{SECRET}.jsonl"], ["train", "--set", f"sft.hub_token=[{SECRET}"], [SECRET]):
        assert main(words) == 2
    assert SECRET not in capsys.readouterr().err


def test_a_fault_and_a_traceback_mask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from siftune.cli import main as cli

    def fails(words: list[str]) -> int:
        raise RuntimeError(f"broken at {SECRET}")

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SIFTUNE_TRACEBACK", "1")
    monkeypatch.setattr(cli, "_dispatch", fails)
    assert cli.main(["methods"]) == 1
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert SECRET not in written
