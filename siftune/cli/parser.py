"""Parse the words of a command line and the keys of a YAML file into checked values: one `jsonargparse` parser per command.

Order of precedence: command line, then `--config`, then the field's default. Every invalid input is a `UserError` of
one sentence that repeats the input. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
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
        given = parser.parse_args(words, defaults=False).as_dict()
        values = parser.parse_config(given["config"] if given.get("config") else None)
        for name, value in given.items():
            values[name] = {**(values[name] or {}), **value} if self.by_name[name].repeats else value
        return {option.name: values[option.name] for option in self.options}


class _Parser(ArgumentParser):
    """jsonargparse's parser of one command. Its own part: words without dashes in any place, the short form of a
    mapping, and errors as one sentence."""

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
        """The text of each option of the command line, or a configuration's values, for errors."""
        groups: dict[str, Any] = {}
        for option in command.options:
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(option.group)
            groups[option.group].add_argument(option.flag, **_how(option, hidden=option.name == command.positional))
        self.add_argument("-h", "--help", action=_Help, nargs=0, help=argparse.SUPPRESS)

    def parse_config(self, path: str | None) -> dict[str, Any]:
        """Every option's value from a configuration file, its default where the file has none."""
        config = {} if path is None else read_config(path)
        known = [name for name in self.command.by_name if name != "config"]
        self.given = {name: value for name, value in config.items() if name not in self.command.fixed}
        for name in self.given:
            if name not in known:
                raise UserError(f"{path}: {unknown(name, known, what='key', where=self.command.where)}")
        values = {name: _short(self.command.by_name[name], value) for name, value in self.given.items()}
        return dict(self.parse_object(values).as_dict())

    # --- what argparse calls --------------------------------------------------------------------------------------

    def _parse_known_args(self, arg_strings: list[str], namespace: Any, **how: Any) -> tuple[Any, list[str]]:
        """argparse leaves over the words that are no option and no value of one: the positional option takes them."""
        for word in arg_strings[: arg_strings.index("--") if "--" in arg_strings else None]:
            if re.match(r"--[^\s=]*[.]", word):  # jsonargparse would set a key inside the option's value
                raise self._unknown_option(word)
        namespace, words = super()._parse_known_args(arg_strings, namespace, **how)
        dashes = words.index("--") if "--" in words else len(words)
        for word in words[:dashes]:
            if word.startswith("-") and word != "-":
                raise self._unknown_option(word)
        if positional := [*words[:dashes], *words[dashes + 1 :]]:
            self._place(namespace, positional)
        return namespace, []

    def _place(self, namespace: Any, words: list[str]) -> None:
        where, name = self.command.where, self.command.positional
        if name is None:
            raise UserError(f"{where} has no argument {words[0]!r}; see {where} --help")
        if not self.command.by_name[name].is_list and len(words) > 1:
            raise UserError(f"{where} has one argument {name}, got {' and '.join(words)}")
        setattr(namespace, name, words if self.command.by_name[name].is_list else words[0])

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """The text of an option, kept for errors; the short form of a mapping as the mapping."""
        text = super()._get_values(action, words)
        option = self.command.by_name.get(action.dest)
        if option is None or option.is_switch:
            return text
        if option.is_list:
            raise self._unknown_option(option.flag)
        if option.repeats:
            text = {**self.given.get(option.name, {}), **_setting(option, text, self.command.where)}
        self.given[option.name] = text
        return _short(option, text)

    def _unknown_option(self, flag: str) -> UserError:
        flags = [option.flag for option in self.command.options if not option.is_list]
        return unknown(flag.partition("=")[0], [*flags, "--help"], what="option", where=self.command.where)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """An error of argparse or jsonargparse as one sentence that names the option and its value."""
        where = self.command.where
        for option in self.command.options:
            shown = option.name if option.name == self.command.positional else option.flag
            if isinstance(ex, argparse.ArgumentError) and option.flag in str(ex.argument_name).split("/"):
                if option.is_switch:
                    value = message.rpartition("argument ")[2]
                    raise UserError(f"{shown} is a switch and has no value, got {value}; remove it to turn it off")
                if option.repeats:
                    raise UserError(f"{shown} (nothing) is not KEY=VALUE; see {where} --help")
                raise UserError(f"{shown} needs a value ({option.expects}); see {where} --help")
            if option.name in self.given and f'"{option.name}' in message:
                raise UserError(f"{shown} {self.given[option.name]} is not {option.expects}; see {where} --help")
        raise UserError(f"{where}: {' '.join(message.split())}; see {where} --help") from ex


class _Help(argparse.Action):
    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise HelpRequested


def _how(option: Option, *, hidden: bool) -> dict[str, Any]:
    """The arguments of `add_argument`."""
    how: dict[str, Any] = {"default": option.default, "help": argparse.SUPPRESS if hidden else _help(option)}
    return how | ({"action": "store_true"} if option.is_switch else {"type": option.type, "metavar": _metavar(option)})


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
