"""Fuzzed rows and files through the command line: never a traceback, never a row lost, counts that add up.

Sound rows of every format are mangled byte by byte and value by value by a seeded fuzzer, and selected from as any pool;
configuration files, seeds files and budgets are mangled too. The short run is 10,000 rows, the soak twenty times that, in 2,000 files.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftune.budget import parse_keep
from siftune.errors import UserError
from siftune.runs.options import read_config
from tests.faults.said import Said, add_up, count, refused, siftune

SOUND = [
    b'{"instruction": "Add 2 and 3.", "input": "", "output": "5", "source": "sums", "n": [1.5, null, true]}',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \\ud83d\\ude00"}]}',
    b'{"prompt": "caf\xc3\xa9", "completion": "\xf0\x9f\x98\x80"}',
    b'{"text": "plain \\u0000 text"}',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1", '
    b'"function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "7", "tool_call_id": "1"}, '
    b'{"role": "assistant", "content": [{"type": "text", "text": "b"}], "weight": 1}], "tools": [{"name": "f"}]}',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "weight": 0.5}',
]
HOSTILE = [
    *(b'{"instruction": ' + value + b', "output": "x"}' for value in (b"1e999", b"-0", b"NaN", b"9" * 5000, b"[[[[[[]]]]]]")),
    b'{"instruction": "a", "output": "' + b"w" * 70_000 + b'"}',
    b'{"instruction": "a", "output": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"output": "x", "output": "y", "instruction": "twice"}',
    b'{"instruction": "\\ud800", "output": "lone surrogate"}',
    b'{"instruction": "a", "output": "   \\n\\t "}',
    b'{"__proto__": {"x": 1}, "instruction": "a", "output": "b"}',
    b"[1, 2, 3]", b'"text"', b"null", b"true", b"{}", b"\xff\xfe\x00", b"<html>", b"--keep", b"\x1b[31mred\x1b[0m",
]  # fmt: skip


def mangle(draw: random.Random, raw: bytes) -> bytes:
    """A few bytes or pieces of a row changed, doubled, moved or lost."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place : place + draw.randint(1, 6)]
            case 2:
                data[place:place] = data[place : place + draw.randint(1, 8)]
            case 3:
                data[place:place] = draw.choice([b'"', b"\\", b"{", b"}", b",", b":", b"\0", b"\r", b"\xc3", b"null"])
            case _:
                data[place:place] = draw.choice(HOSTILE)[:40]
    return bytes(data).replace(b"\n", b" ")


def fuzzed_rows(draw: random.Random, rows: int) -> list[bytes]:
    kind = draw.choice(SOUND)
    made = []
    for index in range(rows):
        sound = kind.replace(b"a", str(index).encode(), 1) if draw.random() < 0.2 else kind
        made.append(
            draw.choice(HOSTILE) if draw.random() < 0.1 else mangle(draw, sound) if draw.random() < 0.7 else sound
        )
    return made


def fuzz_files(tmp_path: Path, seed: int, *, files: int, rows: int) -> None:
    """Select from pools of fuzzed rows; what was read is checked against the lines that were written."""
    draw = random.Random(seed)
    for index in range(files):
        folder = tmp_path / f"fuzz-{index}"
        folder.mkdir()
        lines = fuzzed_rows(draw, rows)
        packed = index % 4 == 3
        path = folder / ("pool.jsonl.gz" if packed else "pool.jsonl")
        data = b"\n".join(lines)
        path.write_bytes(gzip.compress(data) if packed else data)
        words = ["select", "random", path, "--keep", "10%", "--run", folder / "run", "--cache", folder / "cache"]
        words += ["--on-bad-row", "skip", "--duplicates", draw.choice(["keep", "drop"]), "--json"]
        said = siftune(words)
        kept_words(said)
        expected = sum(1 for line in lines if line.rstrip(b"\r") and not line.rstrip(b"\r").isspace())
        if said.code == 0:
            assert add_up(folder / "run")["rows"] == expected, "a row was lost"
            assert json.loads(said.out)["rows"]["read"] == expected
        else:
            refused(said)
        count("fuzzed rows through siftune select", len(lines))
        shutil.rmtree(folder)


def kept_words(said: Said) -> None:
    assert said.code in (0, 2), said
    assert "Traceback" not in said.err
    assert "\x1b" not in said.err + said.out, "a row's escape codes reach the terminal"


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_ten_thousand_fuzzed_rows(tmp_path: Path) -> None:
    fuzz_files(tmp_path, 1, files=40, rows=250)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_fuzzed_rows(tmp_path: Path) -> None:
    fuzz_files(tmp_path, 2, files=2000, rows=100)


# --- files other than pools -------------------------------------------------------------------------------------------

CONFIG = b"method: random\npool: [pool.jsonl]\nkeep: 20%\nseed: 3\nquota: null\non-bad-row: skip\norder: score\n"
SEEDS = b'{"domain": "sums", "instruction": "1 add", "output": "2"}\n{"domain": "birds", "instruction": "wren", "output": "egg"}\n'
DOMAINS = b"sums: Adding numbers.\nbirds:\n  description: Small birds.\n  threshold: 0.9\n"


def damaged(sound: bytes) -> st.SearchStrategy[bytes]:
    """The file cut, or with a few pieces overwritten."""
    pieces = st.sampled_from(
        [b"\n", b": ", b"- ", b"&a ", b"*a", b"!!python/name:os.system ", b"{", b"[", b"'", b"\0", b"\xff"]
    )
    edits = st.lists(st.tuples(st.integers(0, len(sound)), st.integers(0, 6), st.one_of(pieces, st.binary(max_size=4))), max_size=3)  # fmt: skip

    def edit(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(sound)
        for place, length, put in changes:
            data[place : place + length] = put
        return bytes(data)

    return edits.map(edit)


def fuzz_file(sound: bytes, examples: int, use: Callable[[bytes], Said], what: str) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(damaged(sound))
    def once(data: bytes) -> None:
        said = use(data)
        kept_words(said)
        if said.code:
            refused(said)
        count(what)

    once()


def test_fuzzed_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_configurations(tmp_path, monkeypatch, 60)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_fuzzed_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_configurations(tmp_path, monkeypatch, 5000)


def fuzz_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join([SOUND[0]] * 30))

    def use(data: bytes) -> Said:
        (tmp_path / "config.yaml").write_bytes(data)
        return siftune(["select", "--config", "config.yaml", "--dry-run", "--cache", tmp_path / "cache"])

    fuzz_file(CONFIG, examples, use, "fuzzed configuration files")


def test_fuzzed_seeds_and_domains(tmp_path: Path) -> None:
    fuzz_seeds_and_domains(tmp_path, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_fuzzed_seeds_and_domains(tmp_path: Path) -> None:
    fuzz_seeds_and_domains(tmp_path, 2000)


def fuzz_seeds_and_domains(tmp_path: Path, examples: int) -> None:
    from tests.tiny import save_tiny

    model = save_tiny(tmp_path / "model", layers=3)
    (tmp_path / "pool.jsonl").write_bytes(b"\n".join([SOUND[0]] * 30))
    common = ["select", "daar", tmp_path / "pool.jsonl", "--model", model, "--dry-run", "--cache", tmp_path / "cache"]

    def seeds(data: bytes) -> Said:
        (tmp_path / "seeds.jsonl").write_bytes(data)
        return siftune([*common, "--seeds", tmp_path / "seeds.jsonl"])

    def domains(data: bytes) -> Said:
        (tmp_path / "domains.yaml").write_bytes(data)
        return siftune([*common, "--generator", "http://127.0.0.1:9/v1#m", "--domains", tmp_path / "domains.yaml"])

    fuzz_file(SEEDS, examples, seeds, "fuzzed seeds files")
    fuzz_file(DOMAINS, examples, domains, "fuzzed domain files")


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=12), st.from_regex(r"[-+]?[0-9./% ]{0,14}", fullmatch=True), st.integers(), st.floats())
)
def test_any_budget_is_an_amount_or_one_sentence(said: Any) -> None:
    try:
        amount = parse_keep(said)
    except UserError as error:
        assert "keep=" in str(error)  # noqa: PT017
        return
    assert 0 <= amount.rows(1000) <= 1000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_bytes_as_yaml_are_a_mapping_or_one_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_config(str(path)), dict)
    except UserError as error:
        assert "any.yaml" in str(error)  # noqa: PT017
