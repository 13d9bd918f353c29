"""`siftune.open_ledger` and `siftune ledger`: each answer equals the one counted line by line, and bad input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

import siftune
from siftune.cli.main import main
from siftune.errors import UserError
from siftune.hook.ledger import Ledger
from siftune.reports.run_ledger import open_ledger
from siftune.reports.spikes import find_spikes
from tests.browser.runs import rows_of, trained_run, write_jsonl

STEPS, CANDIDATES, ROWS = 30, 6, 40
SPIKE = 21


def made_run(folder: Path) -> list[dict[str, Any]]:
    """A trainer's OUTPUT_DIR whose step `SPIKE` jumped, and its lines; the last five rows are never read."""
    draw = np.random.default_rng(3)
    ledger, lines = Ledger(folder / "siftune"), []
    for step in range(1, STEPS + 1):
        picked = draw.choice(ROWS - 5, CANDIDATES, replace=False).tolist()
        kept = (draw.random(CANDIDATES) < 0.5).tolist()
        kept[0] = True
        loss = [float(value) * (8 if step == SPIKE else 1) for value in 2 + 0.1 * draw.random(CANDIDATES)]
        first = ledger.add(
            step, [0] * CANDIDATES, token_ids=[f"{row:016d}".encode() for row in picked], rows=picked,
            total=[1.0] * CANDIDATES, parts={}, kept=kept, reasons={},
        )  # fmt: skip
        trained = [index for index in range(CANDIDATES) if kept[index]]
        ledger.add_losses([first + index for index in trained], torch.tensor([loss[index] for index in trained]))
        lines += [
            {"step": step, "row": row, "kept": keep, "loss": one if keep else None}
            for row, keep, one in zip(picked, kept, loss, strict=True)
        ]
    ledger.flush(STEPS)
    ledger.merge()
    return lines


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pool.jsonl", rows_of(ROWS))
    return made_run(tmp_path / "run")


def opened() -> Any:
    return siftune.open_ledger("run", rows="pool.jsonl")


def test_rows_of_some_steps_have_their_loss_and_text(lines: list[dict[str, Any]]) -> None:
    ledger, pool = opened(), rows_of(ROWS)
    answer = ledger.texts(ledger.trained(SPIKE - 1, SPIKE)).to_pylist()
    expected = [line for line in lines if SPIKE - 1 <= line["step"] <= SPIKE and line["kept"]]
    assert [(line["step"], line["row"]) for line in answer] == [(line["step"], line["row"]) for line in expected]
    assert [line["loss"] for line in answer] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert [line["answer"] for line in answer] == [pool[line["row"]]["output"] for line in expected]
    assert len(ledger.trained()) == sum(line["kept"] for line in lines)
    with pytest.raises(UserError, match=r"steps 5\.\.4: the first step is above the last"):
        ledger.trained(5, 4)


def test_the_spike_is_the_step_that_jumped(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    spikes = opened().spikes().to_pylist()
    assert [spike["step"] for spike in spikes] == [SPIKE]
    assert spikes[0]["rows"] == sum(line["kept"] for line in lines if line["step"] == SPIKE)
    assert spikes[0]["loss"] == pytest.approx(np.mean([x["loss"] for x in lines if x["step"] == SPIKE and x["kept"]]))
    page = siftune.report(tmp_path / "run", rows="pool.jsonl", map_rows=0).read_text(encoding="utf-8")
    assert "Loss spikes" in page
    assert f">{SPIKE}<" in page
    highest = max((x for x in lines if x["step"] == SPIKE and x["kept"]), key=lambda line: line["loss"])
    assert f"row {highest['row']}" in page


def test_a_constant_loss_noise_and_a_slow_rise_are_no_spikes() -> None:
    assert find_spikes(np.full(40, 2.0)) == []
    assert find_spikes(2 + 0.01 * np.random.default_rng(0).random(200)) == []
    assert find_spikes(np.linspace(2, 3, 200)) == []
    assert find_spikes(np.array([2.0] * 7 + [9.0])) == []
    assert find_spikes(np.array([2.0] * 10 + [np.inf, 2.0])) == [(10, 2.0)]


def test_loss_over_time_by_label_is_the_mean_of_its_rows(lines: list[dict[str, Any]]) -> None:
    ledger, pool = opened(), rows_of(ROWS)
    for part in ledger.losses("topic").to_pylist():
        inside = [
            line["loss"] for line in lines
            if line["kept"] and part["first_step"] <= line["step"] <= part["last_step"]
            and pool[line["row"]]["topic"] == part["label"]
        ]  # fmt: skip
        assert part["rows"] == len(inside)
        assert part["loss"] == pytest.approx(np.mean(inside))
    assert sum(ledger.losses("topic")["rows"].to_pylist()) == sum(line["kept"] for line in lines)
    everything = ledger.losses().to_pylist()
    assert (everything[0]["first_step"], everything[-1]["last_step"]) == (1, STEPS)
    assert {part["label"] for part in everything} == {"all rows"}
    with pytest.raises(UserError, match=r"--by topics is no label column .* known: topic; did you mean topic"):
        ledger.losses("topics")


def test_never_and_often_count_every_row(lines: list[dict[str, Any]]) -> None:
    ledger = opened()
    trained = {row: sum(line["kept"] for line in lines if line["row"] == row) for row in range(ROWS)}
    candidate = {row: sum(1 for line in lines if line["row"] == row) for row in range(ROWS)}
    never = ledger.never().to_pylist()
    assert {line["row"] for line in never} == {row for row, times in trained.items() if not times}
    assert all(line["candidate"] == candidate[line["row"]] for line in never)
    assert [line["token_id"] for line in never if line["row"] >= ROWS - 5] == [None] * 5
    often = ledger.often().to_pylist()
    assert {line["row"]: line["trained"] for line in often} == {row: n for row, n in trained.items() if n}
    assert [line["trained"] for line in often] == sorted((line["trained"] for line in often), reverse=True)
    for line in often:
        of_row = [x for x in lines if x["row"] == line["row"] and x["kept"]]
        assert (line["first_step"], line["last_step"]) == (of_row[0]["step"], of_row[-1]["step"])
        assert (line["first_loss"], line["last_loss"]) == pytest.approx((of_row[0]["loss"], of_row[-1]["loss"]))


def test_forgetting_is_the_loss_now_less_the_loss_when_last_trained(lines: list[dict[str, Any]]) -> None:
    ledger = opened()
    now = {f"{row:016d}".encode().hex(): 3.0 + 0.01 * row for row in range(ROWS) if row != 4}
    answer = ledger.forgotten(now).to_pylist()
    last = {line["row"]: line for line in lines if line["kept"] and line["row"] != 4}
    assert {line["row"] for line in answer} == set(last)
    for line in answer:
        assert line["last_step"] == last[line["row"]]["step"]
        assert line["change"] == pytest.approx(3.0 + 0.01 * line["row"] - last[line["row"]]["loss"])
    changes = [line["change"] for line in answer]
    assert changes == sorted(changes, reverse=True)
    with pytest.raises(UserError, match=r"none of the trained rows is in the table of losses now \(1 rows\)"):
        ledger.forgotten({"00" * 16: 1.0})


def test_answers_are_exported_and_rows_written_as_a_pool(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    ledger, pool = opened(), rows_of(ROWS)
    table = ledger.texts(ledger.often())
    ledger.export(table, "often.parquet")
    ledger.export(table, "often.csv")
    assert pq.read_table("often.parquet").to_pylist() == table.to_pylist()
    assert pyarrow.csv.read_csv("often.csv")["row"].to_pylist() == table["row"].to_pylist()
    count = ledger.write(ledger.trained(), "kept.jsonl")
    rows = sorted({line["row"] for line in lines if line["kept"]})
    written = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert count == len(rows)
    assert written == [pool[row] for row in rows]
    for path, message in (
        ("pool.jsonl", "is the same as the training rows"),
        ("run/kept.jsonl", "the run folder"),
        ("kept.txt", "its suffix is not known"),
    ):
        with pytest.raises(UserError, match=message):
            ledger.write(ledger.trained(), path)
    with pytest.raises(UserError, match=r"--out often.txt must end in \.parquet or \.csv"):
        ledger.export(table, "often.txt")


def test_a_row_equal_to_one_that_was_read_is_not_called_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pool = rows_of(ROWS)
    made_run(tmp_path / "run")
    first_read = int(open_ledger("run").lines.row[0])
    pool[ROWS - 1] = dict(pool[first_read])
    write_jsonl(tmp_path / "pool.jsonl", pool)
    unread = [line["row"] for line in opened().never().to_pylist() if line["token_id"] is None]
    assert unread == list(range(ROWS - 5, ROWS - 1))


def test_a_ledger_without_losses_answers_all_but_the_questions_on_loss(tmp_path: Path) -> None:
    ledger = open_ledger(trained_run(tmp_path / "old"))
    assert len(ledger.often())
    assert ledger.trained(1, 3)["loss"].null_count == len(ledger.trained(1, 3))
    for question in (ledger.losses, lambda: ledger.forgotten({})):
        with pytest.raises(UserError, match="holds no loss in training"):
            question()
    with pytest.raises(UserError, match="cannot be read; pass their file with --rows"):
        ledger.write(ledger.trained(), tmp_path / "kept.jsonl")


def test_packed_lines_are_not_taken_for_rows_of_a_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "siftune")
    ledger.add(
        1, [0, 0], token_ids=[b"a" * 16, b"b" * 16], rows=[0, 0], total=[1.0, 2.0], parts={}, kept=[True, True],
        segments=[0, 1], reasons={},
    )  # fmt: skip
    ledger.flush(1)
    ledger.merge()
    pool = write_jsonl(tmp_path / "pool.jsonl", rows_of(4))
    with pytest.raises(UserError, match="was handed packed lines, and the ledger numbers those"):
        open_ledger(tmp_path / "run", rows=str(pool))


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        code = main(["ledger", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_the_summary_and_the_rows_of_a_step(
        self, lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = self.run(capsys, "run", "--rows", "pool.jsonl")
        assert code == 0
        assert "30 steps, 180 candidates" in out
        assert "steps whose loss jumped: 1" in out
        assert "matched to the file by position" in err
        code, out, _ = self.run(capsys, "run", "--steps", str(SPIKE), "--json", "--rows", "pool.jsonl")
        answer = json.loads(out)
        assert [line["row"] for line in answer["answer"]] == [
            x["row"] for x in lines if x["step"] == SPIKE and x["kept"]
        ]
        assert answer["answer"][0]["question"].startswith("Question ")

    def test_files(self, lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
        words = ("run", "--rows", "pool.jsonl", "--show", "never", "--write", "never.jsonl", "--out", "never.csv")
        code, out, _ = self.run(capsys, *words, "--limit", "2", "--quiet")
        assert code == 0
        assert out.splitlines() == ["never.csv", "never.jsonl"]
        trained = {line["row"] for line in lines if line["kept"]}
        assert len(Path("never.jsonl").read_text().splitlines()) == ROWS - len(trained)
        code, out, _ = self.run(capsys, "run", "--show", "loss", "--by", "topic", "--rows", "pool.jsonl")
        assert code == 0
        assert "chess" in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "needs a run folder"),
            (("absent",), "absent is not a folder"),
            (("run", "--steps", "5-9"), "--steps 5-9 is not a step or a range of steps; write 120 or 120..130"),
            (("run", "--steps", "9..5"), "the first step is above the last"),
            (("run", "--steps", "5", "--show", "never"), "--steps 5 is for --show trained, and --show is never"),
            (("run", "--by", "topic"), "--by topic is for --show loss"),
            (("run", "--show", "forgotten"), "needs --now: every row's loss under the trained model"),
            (("run", "--now", "x.parquet"), "--now x.parquet is for --show forgotten"),
            (("run", "--show", "forgotten", "--now", "x.txt"), "--now x.txt must end in .parquet or .safetensors"),
            (("run", "--show", "loss", "--write", "x.jsonl"), "--show loss has no rows to write"),
            (("run", "--limit", "0"), "--limit must be >= 1, got 0"),
            (("run", "--write", "x.jsonl"), "cannot be read; pass their file with --rows"),
            (("run", "--show", "nevr"), "one of trained, spikes, loss, never, often, forgotten"),
        ],
    )
    def test_bad_input_is_one_sentence(
        self, lines: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
    ) -> None:
        code, _, err = self.run(capsys, *words)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
