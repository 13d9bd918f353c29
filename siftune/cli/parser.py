"""Parse the words of a command line and the keys of a YAML file into checked values, with `jsonargparse` for the types.

Order of precedence: command line, then `--config`, then the field's default. Every invalid input is a `UserError` of
one sentence that repeats the input. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def help(self) -> str:
        """The text of `--help`: usage, every option in its group with its default, examples."""
        return str(self._parser().format_help())

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The value of every option. Raises `UserError`, or `HelpRequested`."""
        raw, positional = self._split(words)
        config = self._config(raw.pop("config")) if raw.get("config") else {}
        if self.positional and positional:
            self._place(raw, positional)
        elif positional:
            raise UserError(f"{self.where} has no argument {positional[0]!r}; see {self.where} --help")
        parser = self._parser()
        base = self._guarded(config, lambda: parser.parse_object(config))
        args = [f"--{name.replace('_', '-')}={value}" for name, value in raw.items() if not self._is_switch(name)]
        args += [self._option(name).flag for name in raw if self._is_switch(name)]
        values = self._guarded(raw, lambda: parser.parse_args(args, namespace=base))
        return {option.name: getattr(values, option.name) for option in self.options}

    # --- words ----------------------------------------------------------------------------------------------------

    def _split(self, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Options and the words without dashes, in any order."""
        raw: dict[str, str] = {}
        positional: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word in ("-h", "--help"):
                raise HelpRequested
            if word == "--":
                positional += rest
                break
            if not word.startswith("-") or word == "-":
                positional.append(word)
                continue
            flag, has_value, value = word.partition("=")
            option = self._option_named(flag)
            if option.is_switch:
                if has_value:
                    raise UserError(f"{flag} is a switch and has no value, got {value!r}; remove it to turn it off")
                raw[option.name] = ""
            elif has_value or rest:
                raw[option.name] = self._text(option, value if has_value else rest.pop(0))
            else:
                raise UserError(f"{flag} needs a value ({option.expects}); see {self.where} --help")
        return raw, positional

    def _option_named(self, flag: str) -> Option:
        named = [option for option in self.options if option.type != list[str]]
        for option in named:
            if flag == option.flag:
                return option
        flags = [option.flag for option in named]
        raise unknown(flag, [*flags, "--help"], what="option", where=self.where)

    def _text(self, option: Option, value: str) -> str:
        """The short form of a mapping as JSON; anything else as it is."""
        if "pairs" not in option.expects:
            return value
        try:
            read = pairs(value)
        except UserError as error:
            raise UserError(f"{option.flag} {error}") from error
        if isinstance(read, str):
            return read
        numeric = "float" in str(option.type) and "str" not in str(option.type).replace("dict[str", "", 1)
        return json.dumps({name: _number(text) if numeric else text for name, text in read.items()})

    def _place(self, raw: dict[str, str], positional: list[str]) -> None:
        assert self.positional is not None
        if self._option(self.positional).type == list[str]:
            raw[self.positional] = json.dumps(positional)
        elif len(positional) == 1:
            raw[self.positional] = positional[0]
        else:
            raise UserError(f"{self.where} has one argument {self.positional}, got {' and '.join(positional)}")

    # --- configuration files --------------------------------------------------------------------------------------

    def _config(self, path: str) -> dict[str, Any]:
        config = {name: value for name, value in read_config(path).items() if name not in self.fixed}
        known = [option.name for option in self.options if option.name != "config"]
        for name, value in config.items():
            if name not in known:
                raise UserError(f"{path}: {unknown(name, known, what='key', where=self.where)}")
            if self._option(name).type == list[str] and isinstance(value, str):
                config[name] = [value]
            elif isinstance(value, str) and "pairs" in self._option(name).expects:
                config[name] = json.loads(self._text(self._option(name), value))
        return config

    # --- jsonargparse ---------------------------------------------------------------------------------------------

    def _parser(self) -> Any:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(
            prog=self.where,
            usage=self.usage,
            description=self.about,
            epilog="\n".join(["examples:", *(f"  {line}" for line in self.examples)]) if self.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            exit_on_error=False,
            default_env=False,
            allow_abbrev=False,
            add_help=False,
        )
        groups: dict[str, Any] = {}
        for option in self.options:
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            more: dict[str, Any] = {"default": option.default, "help": argparse.SUPPRESS}
            if option.name != self.positional:
                more["help"] = _help(option)
            if option.is_switch:
                more["action"] = "store_true"
            else:
                more |= {"type": option.type, "metavar": _metavar(option)}
            groups[option.group].add_argument(option.flag, **more)
        return parser

    def _guarded(self, raw: dict[str, Any], parse: Any) -> Any:
        """Run jsonargparse; its errors become a `UserError` that names the option and its value."""
        try:
            return parse()
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            for option in self.options:
                if option.name in raw and f'"{option.name}' in str(error):
                    shown = option.name if option.name == self.positional else option.flag
                    raise UserError(
                        f"{shown} {raw[option.name]} is not {option.expects}; see {self.where} --help"
                    ) from error
            raise UserError(f"{self.where}: {' '.join(str(error).split())}; see {self.where} --help") from error

    def _option(self, name: str) -> Option:
        return next(option for option in self.options if option.name == name)

    def _is_switch(self, name: str) -> bool:
        return self._option(name).is_switch


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _metavar(option: Option) -> str:
    words = {"a whole number": "N", "a number": "X", "true or false": "BOOL", "pairs name=value": "A=B,..."}
    if option.expects.startswith("one of "):
        return "{" + option.expects.removeprefix("one of ").replace(", ", ",") + "}"
    return words.get(option.expects, option.name.split("_")[-1].upper())


def _help(option: Option) -> str:
    text = re.sub(r"\bNone\b", "left out", option.help.replace("`", ""))  # an option that is not set
    shown = option.default
    if not option.is_switch and shown is not None and shown != [] and "default" not in text:
        text += f" (default: {shown})"
    return text.replace("%", "%%")
