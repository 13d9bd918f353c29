"""JSON text as chunks of rows: JSON lines and JSON arrays; and `Chunk`, which CSV and tables fill as well.

Streamed: a chunk holds at most about `CHUNK_BYTES` of rows (one row where a row is larger), and nothing of an earlier
chunk is kept. A row that cannot be parsed is an entry with a reason of the form `kind: detail`, never an exception.
Cost: one pass, about 5 microseconds per small row.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import pyarrow as pa

from ..errors import one_line
from ..files import json_value
from .arrow_values import DEEPEST, deeper_than

CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 1024
LONGEST_ROW = 256 * CHUNK_BYTES
"""Bytes (of CSV and of an array: characters) of one row; a longer one is bad, and is skipped without being held."""

Parsed = tuple[dict[str, Any] | None, str | None]
"""The row's object where it is one, and why the row is bad (None: no fault so far)."""

Entry = tuple[int, bytes, Parsed]
"""A text row: its line, its own bytes (as JSON on one line, where it is valid), and the parsed result."""


@dataclass(eq=False)
class Chunk:
    """Consecutive rows of one part: text rows hold `raws`, table rows hold `batch`."""

    lines: list[int] = field(default_factory=list)
    """Line in the file where the row starts, from 1; of a table, the row's number from 1."""
    rows: list[dict[str, Any] | None] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    """The row's own text as JSON on one line; of an unparsable row, its bytes."""
    batch: pa.RecordBatch | None = None

    def __len__(self) -> int:
        return len(self.lines)


# --- JSON text ------------------------------------------------------------------------------------------------------


class _NotANumber(Exception):
    """NaN or Infinity, which Python's parser accepts and JSON does not."""


def _refuse_constant(name: str) -> Any:
    raise _NotANumber(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_object(text: str) -> Parsed:
    """A row's text as an object, or the reason why it is not one."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return None, f"unparsable line: {error.msg.removesuffix(' at')} at column {error.pos + 1}"
    except _NotANumber as error:
        return None, f"NaN or Infinity: {error}"
    except RecursionError:
        return None, f"nested too deeply: more than {DEEPEST} levels"
    except MemoryError:
        return None, f"too large: memory ran out over {len(text):,} characters"
    except ValueError:
        return None, f"huge integer: more than {sys.get_int_max_str_digits()} digits"
    if type(value) is not dict:
        kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        return None, f"not an object: {kinds.get(type(value), 'a number')}"
    if text.count("{") + text.count("[") > DEEPEST and deeper_than(value, DEEPEST):
        return None, f"nested too deeply: more than {DEEPEST} levels"
    return value, None


def counted(number: int, noun: str) -> str:
    """`1 line`, `2 lines`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cut(entries: Iterator[Entry]) -> Iterator[Chunk]:
    """Text rows, gathered into chunks."""
    chunk, size = Chunk(), 0
    for line, raw, (row, reason) in entries:
        chunk.lines.append(line)
        chunk.raws.append(raw)
        chunk.rows.append(row)
        chunk.reasons.append(reason)
        size += len(raw)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_ROWS:
            yield chunk
            chunk, size = Chunk(), 0
    if len(chunk):
        yield chunk


def json_lines(stream: IO[bytes]) -> Iterator[Entry]:
    """One row per line; blank lines are skipped. A byte-order mark and carriage returns are not part of a row."""
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW), b""), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) >= LONGEST_ROW - len(codecs.BOM_UTF8) and not line.endswith(b"\n"):
            size = len(line) + _skip_line(stream)
            if size > LONGEST_ROW:
                yield number, line[:CHUNK_BYTES], (None, f"too large: a line of {size:,} bytes, above {LONGEST_ROW:,}")
                continue
        raw = line.rstrip(b"\r\n")
        if not raw or raw.isspace():
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, raw, (None, f"invalid UTF-8: byte {error.start + 1}")
            continue
        yield number, raw, parse_object(text)


def _skip_line(stream: IO[bytes]) -> int:
    """Read on to the end of the line; how many bytes that was."""
    size = 0
    while piece := stream.readline(CHUNK_BYTES):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_LINE_BREAK = re.compile(r"\s*[\r\n]\s*")


class _ArrayText:
    """A JSON array's text, read in pieces and split at the commas between its elements, whatever the elements hold."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self.text = ""
        self.line, self.counted = 1, 0
        """Line of the character `text[counted]`."""
        self.ended = False
        self.closed = False

    def refill(self) -> None:
        """Read on, by at least the size of the buffered text, so that a long element costs linear time."""
        data = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.ended = not data
        self.text += self.decoder.decode(data, final=self.ended)

    def drop(self, count: int) -> None:
        """Forget the first `count` characters."""
        self.count_lines(max(self.counted, count))
        self.text, self.counted = self.text[count:], self.counted - count

    def count_lines(self, upto: int) -> int:
        """Line of the character at `upto`, which never goes back."""
        self.line += self.text.count("\n", self.counted, upto)
        self.counted = upto
        return self.line

    def elements(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every element, empty ones included. The stream is positioned before the opening bracket."""
        while "[" not in self.text:
            self.refill()
        self.drop(self.text.index("[") + 1)
        start, position, depth, any_yet = 0, 0, 0, False
        while not self.closed:
            for match in _TOKEN.finditer(self.text, position):
                token = match[0]
                if token == '"':  # a string that continues in the next piece, or never ends
                    position = match.start()
                    break
                position = match.end()
                if depth == 0 and token in (",", "]"):
                    self.closed = token == "]"
                    element = self.text[start : match.start()]
                    if element.strip() or any_yet or not self.closed:
                        yield self._placed(start, element)
                    any_yet, start = True, position
                    if self.closed:
                        break
                elif token in "[{":
                    depth += 1
                elif token in "]}":
                    depth = max(0, depth - 1)
            else:
                position = len(self.text)
            self.drop(start)
            position, start = position - start, 0
            if self.closed or self.ended or len(self.text) > LONGEST_ROW:
                break
            self.refill()

    def _placed(self, start: int, element: str) -> tuple[int, str]:
        lead = len(element) - len(element.lstrip())
        return self.count_lines(start + lead), element.strip()

    def rest(self) -> tuple[str, int, int]:
        """What follows the last element, which is white space in a valid file: its start (a piece at most, without
        white space around it), how many characters it has and how many lines."""
        while not self.ended and not self.text.strip():
            self.drop(len(self.text))
            self.refill()
        text = self.text.lstrip()
        self.count_lines(max(self.counted, len(self.text) - len(text)))
        start, characters, lines = text[:CHUNK_BYTES].rstrip(), 0, 0
        passed, breaks = 0, 0
        while text:
            if bare := text.rstrip():
                characters, lines = passed + len(bare), breaks + bare.count("\n") + 1
            passed, breaks = passed + len(text), breaks + text.count("\n")
            self.text = ""
            if not self.ended:
                self.refill()
            text = self.text
        return start, characters, lines


def _json_array(stream: IO[bytes], *, wrapped: bool = False) -> Iterator[Entry]:
    """The elements of an array; `wrapped`: it is the value of `data` in an object, whose other keys are passed over."""
    array = _ArrayText(stream)
    for line, text in array.elements():
        raw = _LINE_BREAK.sub(" ", text).encode("utf-8", "surrogateescape")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            yield line, raw, (None, "invalid UTF-8: in an element of the array")
            continue
        yield line, raw, parse_object(text)
    start, characters, lines = array.rest()
    if wrapped and array.closed and _closes_object(start):
        return
    if start or not array.closed:
        why = "text after the end of the array" if array.closed else "the array is not closed"
        if not array.closed and characters > LONGEST_ROW:
            why = f"an element of the array has more than {LONGEST_ROW:,} characters, or is not closed"
        passed_over = f"; {characters:,} characters in {counted(lines, 'line')} are passed over" if characters else ""
        raw = start.encode("utf-8", "surrogateescape")
        yield array.line, raw, (None, f"unparsable line: {why}{passed_over}")


def _closes_object(rest: str) -> bool:
    """Whether this text ends the object in which an array is the last value so far."""
    try:
        return isinstance(json.loads('{"data": []' + rest), dict)
    except (ValueError, RecursionError):
        return False


_WRAPPER = re.compile(rb'\s*\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,)*\s*"data"\s*:\s*(?=\[)')
"""The start of one object whose key `data` holds the rows, after keys with single values."""


def is_json_array(stream: io.BufferedReader) -> bool:
    """Whether the text is an array of objects; a first line that is a list by itself is a (bad) row of JSON lines."""
    start = stream.peek(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        return False
    first, rest = start.split(b"\n", 1)[0], start[1:].lstrip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return rest.startswith((b"{", b"]")) or not rest
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def json_rows(stream: IO[bytes]) -> Iterator[Entry]:
    """An array where the first character is `[`, the array of an object `{"data": [...]}`, else JSON lines."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, stream), CHUNK_BYTES)
    start = buffered.peek(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return _json_array(buffered)
    if _WRAPPER.match(start) and not _is_lines(start):
        return _json_array(buffered, wrapped=True)
    return json_lines(buffered)


def _is_lines(start: bytes) -> bool:
    """Whether a text that begins like `{"data": [...]}` has further objects after its first line."""
    first, _, rest = start.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def object_rows(rows: Iterable[Any]) -> Iterator[Entry]:
    """Rows of Python objects; values that JSON lacks become the texts of `siftune.files.json_value`."""
    for number, row in enumerate(rows, 1):
        try:
            text = json.dumps(dict(row), ensure_ascii=False, default=json_value)
        except MemoryError:
            yield number, b"", (None, "too large: memory ran out over its values")
            continue
        except Exception as error:
            kind = type(row).__name__
            why = f"not an object: {kind}" if not isinstance(row, Mapping) else f"wrong type: {one_line(error)}"
            yield number, repr(row)[:CHUNK_BYTES].encode("utf-8", "replace"), (None, why)
            continue
        yield number, text.encode("utf-8", "surrogatepass"), parse_object(text)
