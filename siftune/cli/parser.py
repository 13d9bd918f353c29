"""Parse the words of a command line and the keys of a YAML file into checked values: one `jsonargparse` parser per command.

The words are separated by the command's own table of options into one text per option; `jsonargparse` checks these
texts and a file's values by the same call, so that Python's argparse, which changes between versions, reads no word.
Order of precedence: command line, then `--config`, then the field's default. Every invalid input is a `UserError` of
one sentence that repeats the input. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..errors import UserError
from ..runs.options import Option, pairs, read_config, unknown


class HelpRequested(Exception):
    """`--help` was among the words."""


@dataclass(frozen=True)
class Command:
    """The options of one command."""

    name: str
    """With the method where there is one: `select daar`."""
    usage: str
    about: str
    options: Sequence[Option]
    positional: str | None = None
    """The option that takes the words without dashes: `pool`, `run`."""
    fixed: Sequence[str] = ("command", "method")
    """Keys that a configuration file may hold besides the options; they are read earlier."""
    examples: Sequence[str] = ()

    @property
    def where(self) -> str:
        """As the user calls it."""
        return f"siftune {self.name}"

    @cached_property
    def by_name(self) -> Mapping[str, Option]:
        """The options by name."""
        return {option.name: option for option in self.options}

    def help(self) -> str:
        """The text of `--help`: usage, every option in its group with its default, examples."""
        return str(_Parser(self).format_help())

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The value of every option. Raises `UserError`, or `HelpRequested`."""
        parser = _Parser(self)
        given = parser.check_texts(self.texts(words))
        values = parser.check_config(given.get("config"))
        for name, value in given.items():
            values[name] = {**(values[name] or {}), **value} if self.by_name[name].repeats else value
        return {option.name: values[option.name] for option in self.options}

    def texts(self, words: Sequence[str]) -> dict[str, Any]:
        """The text of each option among the words, True for a switch; words without dashes may be in any place.

        Raises `UserError`, or `HelpRequested`.

        >>> command.texts(["a.jsonl", "--keep", "3", "--quiet"])
        {'keep': '3', 'quiet': True, 'pool': ['a.jsonl']}
        """
        texts: dict[str, Any] = {}
        arguments: list[str] = []
        remaining = iter(words)
        for word in remaining:
            if word == "--":
                arguments += remaining
            elif word in ("-h", "--help"):
                raise HelpRequested
            elif not word.startswith("-") or word == "-":
                arguments.append(word)
            else:
                option, text = self._option(word, remaining)
                if option.repeats:
                    text = {**texts.get(option.name, {}), **_setting(option, text, self.where)}
                texts[option.name] = text
        return texts | self._arguments(arguments, texts)

    def _option(self, word: str, following: Iterator[str]) -> tuple[Option, Any]:
        """The option that a word with dashes names, and its text: after the equals sign, or the next word."""
        flag, equals, text = word.partition("=")
        flags = {option.flag: option for option in self.options if not option.is_list}
        if flag not in flags:
            raise unknown(flag, [*flags, "--help"], what="option", where=self.where)
        option = flags[flag]
        if not option.is_switch:
            return option, text if equals else self._next_value(option, next(following, None))
        if equals:
            raise UserError(f"{flag} is a switch and has no value, got {text!r}; remove it to turn it off")
        return option, True

    def _next_value(self, option: Option, word: str | None) -> str:
        """The word after an option as its value, unless it has dashes and is neither a number nor a phrase."""
        if word is not None and (not word.startswith("-") or word == "-" or " " in word or _is_number(word)):
            return word
        if option.repeats:
            raise UserError(f"{option.flag} (nothing) is not KEY=VALUE; see {self.where} --help")
        shown = option.name if option.name == self.positional else option.flag
        raise UserError(f"{shown} needs a value ({option.expects}); see {self.where} --help")

    def _arguments(self, words: list[str], texts: Mapping[str, Any]) -> dict[str, Any]:
        """The words without dashes as the value of the option that takes them."""
        name = self.positional
        if not words:
            return {}
        if name is None:
            raise UserError(f"{self.where} has no argument {words[0]!r}; see {self.where} --help")
        if self.by_name[name].is_list:
            return {name: words}
        every = [texts[name], *words] if name in texts else words
        if len(every) > 1:
            raise UserError(f"{self.where} has one argument {name}, got {' and '.join(every)}")
        return {name: words[0]}


class _Parser(ArgumentParser):
    """jsonargparse's parser of one command: types, defaults and the text of `--help`; errors are one sentence."""

    def __init__(self, command: Command) -> None:
        examples = "\n".join(["examples:", *(f"  {line}" for line in command.examples)]) if command.examples else None
        super().__init__(
            prog=command.where,
            usage=command.usage,
            description=command.about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            exit_on_error=False,
            default_env=False,
            allow_abbrev=False,
            add_help=False,
        )
        self.command = command
        self.given: dict[str, Any] = {}
        """What is being checked, as written on the command line or in a configuration, for errors."""
        groups: dict[str, Any] = {}
        for option in command.options:
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(option.group)
            groups[option.group].add_argument(option.flag, **_how(option, hidden=option.name == command.positional))

    def check_texts(self, texts: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the options on the command line, without defaults."""
        return self._check(texts, defaults=False)

    def check_config(self, path: str | None) -> dict[str, Any]:
        """Every option's value from a configuration file, its default where the file has none."""
        config = {} if path is None else read_config(path)
        known = [name for name in self.command.by_name if name != "config"]
        config = {name: value for name, value in config.items() if name not in self.command.fixed}
        for name in config:
            if name not in known:
                raise UserError(f"{path}: {unknown(name, known, what='key', where=self.command.where)}")
        return self._check(config, defaults=True)

    def _check(self, given: Mapping[str, Any], *, defaults: bool) -> dict[str, Any]:
        self.given = dict(given)
        values = {name: _short(self.command.by_name[name], value) for name, value in given.items()}
        return dict(self.parse_object(values, defaults=defaults).as_dict())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """An error of jsonargparse as one sentence that names the option and its value."""
        where = self.command.where
        for option in self.command.options:
            shown = option.name if option.name == self.command.positional else option.flag
            if option.name in self.given and f'"{option.name}' in message:
                raise UserError(f"{shown} {self.given[option.name]} is not {option.expects}; see {where} --help")
        raise UserError(f"{where}: {' '.join(message.split())}; see {where} --help") from ex


def _how(option: Option, *, hidden: bool) -> dict[str, Any]:
    """The arguments of `add_argument`."""
    how: dict[str, Any] = {"default": option.default, "help": argparse.SUPPRESS if hidden else _help(option)}
    return how | ({"action": "store_true"} if option.is_switch else {"type": option.type, "metavar": _metavar(option)})


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _short(option: Option, value: Any) -> Any:
    """The value of a short form: `a=1,b=2` for a mapping, one text for a list of one."""
    if option.is_list:
        return [value] if isinstance(value, str) else value
    if not option.is_mapping:
        return value
    try:
        return pairs(value)
    except UserError as error:
        raise UserError(f"{option.flag} {error}") from error


def _setting(option: Option, text: str, where: str) -> dict[str, Any]:
    """One KEY=VALUE; a value may hold commas and brackets, so there is one for each time that the option is passed."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{option.flag} {text or '(nothing)'} is not KEY=VALUE; see {where} --help")
    return {key.strip(): _json_or_text(option, value) if "Any" in str(option.type) else value}


def _json_or_text(option: Option, text: str) -> Any:
    """A value of any type: JSON where it is, else a text. An incomplete list or mapping, and several pairs, are refused."""
    try:
        return json.loads(text)
    except ValueError as error:
        if text.startswith(("{", "[")):
            raise UserError(
                f"{option.flag} {text!r} is not JSON ({error}); close every bracket and quote names"
            ) from None
        if not text or re.search(r",\s*\w+=", text):
            raise UserError(
                f"{option.flag} {text!r} is not one value; pass {option.flag} KEY=VALUE for each key"
            ) from None
        return text


def _metavar(option: Option) -> str:
    words = {
        "a whole number": "N",
        "a number": "X",
        "true or false": "BOOL",
        "pairs name=value": "A=B,...",
        "KEY=VALUE": "KEY=VALUE",
    }
    if option.expects.startswith("one of "):
        return "{" + option.expects.removeprefix("one of ").replace(", ", ",") + "}"
    return words.get(option.expects, option.name.split("_")[-1].upper())


def _help(option: Option) -> str:
    text = re.sub(r"\bNone\b", "left out", option.help.replace("`", ""))  # an option that is not set
    shown = option.default
    if not option.is_switch and shown is not None and shown != [] and "default" not in text:
        text += f" (default: {shown})"
    return text.replace("%", "%%")
