"""`siftune.testing`: our own methods pass, broken ones fail with the reason, a package of somebody else's is listed and runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from siftune import registry
from siftune.cli.main import main
from siftune.errors import UserError
from siftune.offline.base import OfflineMethod
from siftune.offline.length import Length
from siftune.offline.random import Random as OfflineRandom
from siftune.online.base import Batch, Measured, ModelScored
from siftune.online.maxloss import MaxLoss
from siftune.online.simple import Random, Regular
from siftune.online.uds import UDS
from siftune.records import Pool, RowScores, Shard, ShardResult
from siftune.testing import check_offline_method, check_online_method

DOCS = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"


@pytest.mark.parametrize("method", [OfflineRandom(seed=3), Length()], ids=lambda method: method.name)
def test_our_offline_methods_pass(method: OfflineMethod) -> None:
    check_offline_method(method)


@pytest.mark.parametrize(
    "method", [Regular(), Random(keep=2), MaxLoss(keep=2), UDS(keep=2)], ids=lambda method: method.name
)
def test_our_online_methods_pass(method: Any) -> None:
    check_online_method(method)


@dataclass(frozen=True)
class Broken:
    fault: str
    key: str = "broken"

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        score = np.arange(len(shard), dtype=np.float32)
        if self.fault == "no reason":
            score[3] = np.nan
        if self.fault == "global random":
            score[:] = np.random.rand(len(shard))  # noqa: NPY002
        return ShardResult({"score": score})


@dataclass(kw_only=True, eq=False)
class BrokenMethod(OfflineMethod):
    name: ClassVar[str] = "broken"
    fault: str
    """What is wrong with it."""

    def shard_task(self, pool: Pool) -> Broken:
        return Broken(self.fault)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("no reason", "needs a reason"), ("global random", "numpy's global random state")],
)
def test_a_broken_offline_method_fails_with_the_reason(fault: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_offline_method(BrokenMethod(fault=fault))


@dataclass(kw_only=True, eq=False)
class Padded(ModelScored):
    """Reads padding, which no score may."""

    name: ClassVar[str] = "padded"

    side: str = "right"
    """Where the padding is that it reads; on the left it reads only a first token."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        zeros = batch["input_ids"] == 0
        columns = zeros.double().mean(1) if self.side == "right" else zeros[:, 0].double()
        return Measured(len(zeros), {"zeros": columns, "tokens": torch.ones(len(zeros))})

    def combine(self, measured: Measured) -> RowScores:
        return RowScores(measured.columns["zeros"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_broken_online_method_fails_with_the_reason(side: str) -> None:
    with pytest.raises(AssertionError, match=f"padding on the {side} enters"):
        check_online_method(Padded(keep=2, side=side))


# --- a package of somebody else's ---------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package of docs/add-a-method.md as pip would have installed it, and one that cannot be imported."""
    blocks = re.findall(r"```(toml|python)\n(.*?)```", DOCS.read_text(), flags=re.S)
    (project,) = [text for kind, text in blocks if kind == "toml"]
    (module,) = [text for kind, text in blocks if kind == "python" and "class AnswerWords(" in text]
    (line,) = re.findall(r"^answer-words = \"(.*)\"$", project, flags=re.M)
    (tmp_path / "word_scores.py").write_text(module)
    for name, points in (("word-scores", f"answer-words = {line}"), ("broken-scores", "lost = no_such_module:Lost")):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    yield tmp_path
    sys.modules.pop("word_scores", None)
    registry._installed.cache_clear()


def test_the_documented_package_is_listed_selected_and_passes(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    out, err = capsys.readouterr()
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert listed["answer-words"]["summary"] == "words of the answer, up to a number"
    assert listed["answer-words"]["side"] == "offline"
    assert "the method lost of the package broken-scores cannot be used" in err
    assert "lost" not in listed
    assert main(["select", "--help"]) == 0
    assert "answer-words" in capsys.readouterr().out
    assert main(["select", "answer-words", "--help"]) == 0
    assert "--cap" in capsys.readouterr().out

    pool = site / "rows.jsonl"
    pool.write_text("".join(json.dumps({"instruction": "q?", "output": "word " * n}) + "\n" for n in (1, 5, 3)))
    words = ["select", "answer-words", str(pool), "--keep", "1", "--cap", "4", "--run", str(site / "run"), "--quiet"]
    assert main([*words, "--cache", str(site / "cache"), "--out", str(site / "out.jsonl")]) == 0
    assert json.loads((site / "out.jsonl").read_text())["output"].split() == ["word"] * 5
    check_offline_method(registry.find("offline", "answer-words").load()())


def test_a_package_that_cannot_be_used_is_named_and_stops_nothing_else(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"the method lost of the package broken-scores cannot be used .*no_such_module"
    ):
        registry.find("offline", "lost")
    assert registry.find("offline", "random").target == "siftune.offline.random:Random"
    assert main(["select", "lost", "pool.jsonl"]) == 2
    assert "broken-scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("point", "reason"),
    [("random = siftune.offline.random:Random", "name already"), ("other = siftune.offline.random:Random", "same name"),
     ("plain = builtins:dict", "not a subclass of siftune.OfflineMethod")],
)  # fmt: skip
def test_an_entry_point_that_is_no_new_method_is_refused(site: Path, point: str, reason: str) -> None:
    (site / "broken_scores-1.0.dist-info" / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{point}\n")
    _, failures = registry._installed()
    assert reason in failures[point.split(" ", maxsplit=1)[0]]
    assert registry.find("offline", "random").load() is OfflineRandom
