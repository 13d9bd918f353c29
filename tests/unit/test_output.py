"""No character of a row, a name, an option or a server's reply steers the terminal: everything printed is made visible."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from siftune.cli.main import main
from siftune.cli.terminal import Bars, show_rounds, show_selection
from siftune.demo import show
from siftune.output import as_json, say, single_line, visible
from siftune.screen import console
from tests.faults.inputs import WORDS, inter, write_inputs
from tests.hostile import hostile

SOURCE = Path(__file__).resolve().parents[2] / "siftune"
ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "csi": "\x1b[2J\x1b[31mred",
    "c1": "\x9b31mred",
    "bidi": "\u202eexe.txt",
    "delete": "abc\x7f\x08\x08",
    "markup": "[red]loud[bold]",
}
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(params=list(ATTACKS.values()), ids=list(ATTACKS))
def attack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clean(printed: str) -> str:
    """What was printed, without a single character that steers a terminal."""
    assert not (steering := STEERING.findall(printed)), f"{steering} in {printed!r}"
    return printed


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """A command's exit code and all that it printed; nothing of it steers the terminal."""
    code = main(list(words))
    captured = capsys.readouterr()
    assert "internal error" not in captured.err, captured.err
    return code, clean(captured.out) + clean(captured.err)


def write_pool(path: str, attack: str = "", rows: int = 20) -> str:
    lines = [
        {"instruction": f"add {index}{attack}", "input": "", "output": f"{attack}{index}"} for index in range(rows)
    ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# --- the functions --------------------------------------------------------------------------------------------------


def test_every_control_and_direction_character_is_named() -> None:
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x2028, 0x202E, 0x2066, 0xD800]))
    assert STEERING.sub("", visible(every)) == visible(every)
    assert visible(every.replace("\r", "")).count("\n") == 1
    assert "\n" not in single_line(every)
    assert visible("\x1b\x9b\u202e") == "[U+001B][U+009B][U+202E]"
    assert visible("tab\tand\nline stay, and so do ü, 漢字, \u200d and [red]") == (
        "tab\tand\nline stay, and so do ü, 漢字, \u200d and [red]"
    )


def test_json_escapes_them_and_reads_back_the_same(attack: str) -> None:
    value = {attack: [attack, "\udc80", "\U000e0041", "ü"]}
    text = as_json(value)
    assert clean(text)
    assert "ü" in text
    assert json.loads(text) == value


def test_a_message_is_one_line_and_a_prompt_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb\r\nc")
    say("a\nb", multiline=True, end="")
    say("x\n\x1b", error=True)
    assert capsys.readouterr() == ("a b c\na\nb", "x [U+001B]\n")


# --- commands -------------------------------------------------------------------------------------------------------


def test_a_row(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pool("pool.jsonl", attack)
    code, shown = ran(capsys, "select", "alpagasus", "pool.jsonl", "--judge-url", "http://127.0.0.1:1/v1", "--dry-run")
    assert code == 0
    assert visible(attack) in shown, "a preview shows the row's text"
    assert "\nanswer" in shown.lower() or shown.count("\n") > 20, "a prompt keeps its lines"
    assert ran(capsys, "select", "random", "pool.jsonl", "--run", "r")[0] == 0


def test_a_bad_row(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [{"role": attack, "content": attack}]}, {attack: 1}, [attack]]
    Path("pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert ran(capsys, "select", "random", "pool.jsonl")[0] == 2
    Path("raw.jsonl").write_text('{"instruction": "' + attack + "\n", encoding="utf-8")
    assert ran(capsys, "select", "random", "raw.jsonl")[0] == 2


def test_a_file_name(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    pool = write_pool(f"pool{attack}.jsonl")
    words = ("select", "random", pool, "--run", f"run{attack}", "--out", f"out{attack}.jsonl")
    assert ran(capsys, *words, "--dry-run")[0] == 0
    code, shown = ran(capsys, *words)
    assert code == 0
    assert visible(f"out{attack}.jsonl") in shown.replace("\n", "")
    assert visible(f"run{attack}/manifest.json") in shown.replace("\n", "")
    assert visible(f"out{attack}.jsonl\n") == ran(capsys, *words, "--quiet")[1]
    assert json.loads(ran(capsys, *words, "--json")[1])["out"] == f"out{attack}.jsonl"
    assert ran(capsys, "keep", f"run{attack}", "--keep", "3", "--out", f"k{attack}.jsonl")[0] == 0
    assert ran(capsys, "report", f"run{attack}")[0] == 0
    assert ran(capsys, "report", f"no{attack}")[0] == 2
    assert ran(capsys, "select", "random", f"absent{attack}.jsonl")[0] == 2
    Path(f"bad{attack}.jsonl").write_text("{oops\n")
    assert ran(capsys, "select", "random", f"bad{attack}.jsonl")[0] == 2


def test_a_yaml_key_and_value(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pool("pool.jsonl")
    for name, value in (("key", {attack: 1}), ("value", {"keep": attack}), ("method", {"method": attack})):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(value, allow_unicode=False))
        assert ran(capsys, "select", "--config", f"{name}.yaml")[0] == 2
        assert ran(capsys, "select", "random", "pool.jsonl", "--config", f"{name}.yaml")[0] == (name != "method") * 2
        assert ran(capsys, "train", f"{name}.yaml")[0] == 2
        assert ran(capsys, "compare", f"{name}.yaml")[0] == 2
        assert ran(capsys, "evaluate", "absent", "--suite", f"{name}.yaml")[0] == 2
    Path("raw.yaml").write_text(f"keep: {attack}\nkee: 1\n", encoding="utf-8")
    assert ran(capsys, "select", "random", "pool.jsonl", "--config", "raw.yaml")[0] == 2


@pytest.mark.parametrize(
    "words",
    [
        ["ATTACK"],
        ["select", "ATTACK"],
        ["select", "random", "pool.jsonl", "--ATTACK"],
        ["select", "random", "pool.jsonl", "--keep", "ATTACK"],
        ["select", "random", "pool.jsonl", "--quota", "ATTACK=5%"],
        ["select", "random", "pool.jsonl", "--columns", "ATTACK=b"],
        ["select", "random", "pool.jsonl", "--format", "ATTACK"],
        ["select", "random", "pool.jsonl", "--shards", "ATTACK"],
        ["select", "daar", "pool.jsonl", "--model", "ATTACK", "--seeds", "ATTACK"],
        ["select", "alpagasus", "pool.jsonl", "--judge-url", "ATTACK"],
        ["plan", "ATTACK", "--model", "ATTACK"],
        ["train", "ATTACK", "--set", "sft.ATTACK=1"],
        ["train", "recipe.yaml", "--set", "ATTACK"],
        ["score-reference", "ATTACK", "--reference", "ATTACK"],
        ["evaluate", "ATTACK", "--held-out", "ATTACK=pool.jsonl"],
        ["loop", "daar", "pool.jsonl", "--model", "m", "--tune", "tune {ATTACK}"],
        ["compare", "ATTACK", "--set", "ATTACK=1"],
        ["keep", "ATTACK", "--out", "a.jsonl"],
        ["methods", "ATTACK"],
        ["demo", "--rows", "ATTACK"],
    ],
    ids=lambda words: "-".join(words[:4]),
)
def test_an_options_value(words: list[str], attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_pool("pool.jsonl")
    code, shown = ran(capsys, *(word.replace("ATTACK", attack) for word in words))
    assert code == 2
    assert shown.startswith("siftune: ")
    assert shown.count("\n") == 1


def test_a_domain(attack: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORDS, f"new{attack}", ["wren", "nest", "seven"])
    write_inputs(here, 60)
    capsys.readouterr()
    words = inter(here, here / "run", here / "cache")
    code, shown = ran(capsys, *(word for word in words if word != "--quiet"))
    assert code == 0
    assert visible(f"new{attack}") in shown
    assert ran(capsys, *words, "--quota", f"{attack}=5%")[0] == 2


def test_a_server(attack: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    write_pool("pool.jsonl", rows=3)
    with hostile({}, lambda body: attack) as server:
        server.models = [f"m{attack}"]
        words = ("select", "alpagasus", "pool.jsonl", "--judge-url", server.url, "--run", "a", "--cache", "c")
        assert ran(capsys, *words)[0] == 2, "no reply can be read"

        def refuse(self: Any, step: Any, body: Any, question: str) -> None:
            self._send(404, {"error": {"message": attack, "type": attack}})

        monkeypatch.setattr("tests.hostile._Handler._behave", refuse)
        code, shown = ran(capsys, *words[:-3], "b", "--cache", "d")
        assert code == 2
        assert re.findall("[a-z]+", attack)[-1] in shown, "the server's words reach the user"


def test_warnings_and_faults(attack: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str]) -> int:
        warnings.warn(f"a\n{attack}", stacklevel=1)
        raise RuntimeError(f"b\n{attack}")

    monkeypatch.setattr("siftune.cli.methods.run", run)
    monkeypatch.setattr("siftune.cli.main.warnings.filterwarnings", lambda *_, **__: warnings.simplefilter("always"))
    assert main(["methods"]) == 1
    assert clean(capsys.readouterr().err).count("\n") == 3
    monkeypatch.setenv("SIFTUNE_TRACEBACK", "1")
    assert main(["methods"]) == 1
    assert "Traceback" in clean(capsys.readouterr().err)


# --- what needs a long run to be printed ----------------------------------------------------------------------------


def printers(attack: str) -> list[Callable[[], None]]:
    rows = {"kept": 1, "read": 2, "usable": 2, "duplicates": 0, "reasons": {attack: 1}}
    rows["domains"] = {attack: {"pool": 1, "kept": 1}}
    stage = {"name": attack, "status": attack, "seconds": 1.0, "counts": {attack: 1}}
    manifest = {"rows": rows, "stages": [stage], "peak_memory_mb": 1, "info": {}}
    round_ = {"round": 1, "probe_accuracy": None, "domains": {attack: 1}, "rows": rows, "tune_seconds": 1.0}
    written = {"rows": 1, "requests": 1, "first": {"instruction": attack, "input": attack, "output": attack}}
    return [
        lambda: show_selection(manifest, out=attack, following=[attack]),
        lambda: show_rounds(console(), [{**round_, "tuned": attack}]),
        lambda: show.Screen(silent=False).written({"folder": attack, "domains": {attack: written}}),
        lambda: console().line(f"round 1: choosing with {attack}"),
    ]


@pytest.mark.parametrize("index", range(4))
def test_summaries(index: int, attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    printers(attack)[index]()
    assert visible(attack) in clean(capsys.readouterr().out)


def test_a_bars_label(attack: str) -> None:
    bars = Bars()
    bars.start(attack, 2)
    assert bars._shown is not None
    assert bars._shown.tasks[0].description == visible(attack)
    bars.close()


def test_emoji_codes_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    console().line("runs/:warning:/a")
    assert capsys.readouterr().out == "runs/:warning:/a\n"


# --- the one way out ------------------------------------------------------------------------------------------------

WAYS_OUT = {"print": {"output.py"}, "Console": {"screen.py"}, "print_exc": set(), "write": set()}


def calls(path: Path) -> set[str]:
    """Which of the ways to a terminal a file calls: `print`, a Rich `Console`, `sys.stdout.write` and its like."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name in ("print", "Console", "rich.print", "traceback.print_exc", "traceback.print_exception"):
            names.add(name.rpartition(".")[2])
        if name in ("sys.stdout.write", "sys.stderr.write", "sys.__stdout__.write", "sys.__stderr__.write"):
            names.add("write")
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Console" for base in node.bases):
            names.add("Console")
    return names


def test_nothing_else_in_the_package_prints(tmp_path: Path) -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        for name in calls(path):
            assert str(path.relative_to(SOURCE)) in WAYS_OUT[name], f"{path} calls {name}; use siftune.output.say"
    assert calls(SOURCE / "output.py") == {"print"}
    assert calls(SOURCE / "screen.py") == {"Console"}
    (tmp_path / "new.py").write_text("import sys\nprint(1)\nsys.stderr.write('x')\nclass A(Console): ...\n")
    assert calls(tmp_path / "new.py") == {"print", "write", "Console"}
