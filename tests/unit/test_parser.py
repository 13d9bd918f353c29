"""How the words of a command line become one text per option, in the same way under every version of Python."""

from __future__ import annotations

import argparse
from typing import Any

import jsonargparse
import pytest

from siftune.cli import parser
from siftune.cli.parser import Command, HelpRequested
from siftune.errors import UserError
from siftune.runs.options import KeepOptions, SelectOptions, options_of

SELECT = Command("select random", "usage", "about", options_of(SelectOptions), "pool")
KEEP = Command("keep", "usage", "about", options_of(KeepOptions), "run")


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], {}),
        (["a", "--keep", "3", "b"], {"pool": ["a", "b"], "keep": "3"}),
        (["--keep=3", "a"], {"pool": ["a"], "keep": "3"}),
        (["--keep", "3", "--keep", "4"], {"keep": "4"}),
        (["--quiet", "a"], {"pool": ["a"], "quiet": True}),
        (["--out", "-"], {"out": "-"}),
        (["-", "a"], {"pool": ["-", "a"]}),
        (["--seed", "-3"], {"seed": "-3"}),
        (["--worker-cpus", "-1e-3"], {"worker_cpus": "-1e-3"}),
        (["--out", "- two words"], {"out": "- two words"}),
        (["--out=--x"], {"out": "--x"}),
        (["--out="], {"out": ""}),
        (["--columns=a=b,c=d"], {"columns": "a=b,c=d"}),
        (["a", "--", "--keep", "3"], {"pool": ["a", "--keep", "3"]}),
    ],
)
def test_one_text_for_each_option(words: list[str], texts: dict[str, Any]) -> None:
    assert SELECT.texts(words) == texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kep", "3"], "has no option --kep; did you mean --keep?"),
        (["-k", "3"], "has no option -k"),
        (["-5"], "has no option -5"),
        (["--keep.x=3"], "has no option --keep.x"),
        (["--kee=3"], "has no option --kee; did you mean --keep?"),
        (["--out", "--keep", "3"], "--out needs a value"),
        (["--out", "--", "a"], "--out needs a value"),
        (["--out"], "--out needs a value"),
        (["--quiet=yes"], "--quiet is a switch and has no value, got 'yes'"),
        (["--pool", "a"], "has no option --pool"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        SELECT.texts(words)
    assert message in str(error.value)


def test_one_argument_by_name_and_by_place_is_refused() -> None:
    assert KEEP.texts(["--run", "a"]) == {"run": "a"}
    with pytest.raises(UserError, match="has one argument run, got a and b"):
        KEEP.texts(["--run", "a", "b"])


@pytest.mark.parametrize("words", [["--help"], ["a", "-h"], ["--keep", "3", "--help", "--kep"]])
def test_help(words: list[str]) -> None:
    with pytest.raises(HelpRequested):
        SELECT.texts(words)
    assert SELECT.texts(["--", "--help"]) == {"pool": ["--help"]}


def test_nothing_private_of_argparse_or_jsonargparse_is_replaced() -> None:
    replaced = {name for name in vars(parser._Parser) if name.startswith("_") and not name.startswith("__")}
    known = {*dir(argparse.ArgumentParser), *dir(jsonargparse.ArgumentParser)}
    assert not replaced & known
