"""A journal of replies: append-only JSON Lines, flushed to the disk before a reply is used, read first on a rerun.

No paid reply is requested twice: a line is looked up by the content hash of (generator, request). A process
killed while writing leaves an incomplete last line, which the next process removes; every line holds a hash of itself,
and the content of a damaged line is requested again. One process writes a journal at a time.
Cost: one flush per reply; in memory 100 bytes per line, the texts remain on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from filelock import FileLock

from ..errors import UserError
from ..files import hash_json, lock_file, plain_errors
from ..progress import counted
from .generate import Generator, Reply, Request, request_key

VERSION = 2
OPENINGS = (b'{"v": 2, "key": "', b'{"v": 1, "key": "')
"""The start of a line in this version, and in the previous one, whose lines hold no hash of themselves."""
FIELDS = ("text", "prompt_tokens", "completion_tokens", "finish_reason", "error")


class Journal:
    """A journal file, locked while it is open by `.NAME.lock` beside it.

    Entering raises `UserError` when another process has it open, or when the file is not a journal.

    >>> with Journal("replies.jsonl") as journal:
    ...     generator = Journaled(open_generator("./model"), journal)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        """Complete lines that could not be read; their content is requested again."""
        self._file: IO[bytes] | None = None
        self._lock: FileLock | None = None
        self._places: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        assert self._file is None, "this journal is already open"
        with plain_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            place = Path(os.path.realpath(self.path))
        self._lock = lock_file(place.with_name(f".{place.name}.lock"))
        if self._lock is None:
            raise UserError(f"{self.path} is being written by another siftune process; wait for it")
        try:
            with plain_errors(self.path):
                self._file = open(self.path, "a+b")  # held until __exit__
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        assert self._lock is not None
        if self._file is not None:
            self._file.close()
        self._lock.release()
        self._file = self._lock = None

    def __len__(self) -> int:
        return len(self._places)

    def _read(self) -> None:
        """Index every line; remove an incomplete last line."""
        assert self._file is not None
        self._file.seek(0)
        place, first = 0, True
        for line in self._file:
            if not line.endswith(b"\n") and (not first or _opens(line)):
                os.ftruncate(self._file.fileno(), place)
                break
            entry = _entry(line)
            if entry is not None:
                self._places[bytes.fromhex(entry["key"])] = place
            elif first:
                raise UserError(f"{self.path} is not a journal of replies; pass another path or remove the file")
            else:
                self.damaged += 1
            place, first = place + len(line), False

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> Reply | None:
        """The reply under a content hash; its `key` is empty, because the name belongs to the caller."""
        assert self._file is not None, "open the journal with `with`"
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        self._file.seek(place)
        entry = _entry(self._file.readline())
        if entry is None or entry["key"] != key:
            raise UserError(f"{self.path} was changed while it was open; run the same command again")
        return Reply(key="", **{name: entry[name] for name in FIELDS})

    def put(self, key: str, reply: Reply) -> None:
        """Append a reply and flush it to the disk; only then may it be used."""
        assert self._file is not None, "open the journal with `with`"
        fields = asdict(reply)
        entry = {"v": VERSION, "key": key, "asked": reply.key, **{name: fields[name] for name in FIELDS}}
        entry["check"] = hash_json(entry)
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with plain_errors(self.path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        self._places[bytes.fromhex(key)] = place


def _opens(line: bytes) -> bool:
    """Whether an incomplete line starts as an entry does."""
    return any(line[: len(opening)] == opening[: len(line)] for opening in OPENINGS)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object when it is an entry as it was written, else None."""
    try:
        entry = dict(json.loads(line))
        check = entry.pop("check", None)
        if entry["v"] not in (1, VERSION) or (entry["v"] == VERSION and check != hash_json(entry)):
            return None
        return entry if len(bytes.fromhex(entry["key"])) == 16 and _is_reply(entry) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_reply(entry: dict[str, Any]) -> bool:
    """Whether an entry's fields have the types of a reply's."""
    counts = (entry["prompt_tokens"], entry["completion_tokens"])
    return (
        isinstance(entry["text"], str)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and isinstance(entry["finish_reason"], str)
        and (entry["error"] is None or isinstance(entry["error"], str))
    )


@dataclass
class Counts:
    """Counts of requests and tokens, for summaries."""

    sent: int = 0
    """Requests sent in this run."""
    reused: int = 0
    """Replies taken from the journal, or shared with an equal request."""
    failed: int = 0
    """Requests without a reply; they are sent again in the next run."""
    retries: int = 0
    """Times that a request was sent in this run after its first time."""
    prompt_tokens: int = 0
    """Of replies received in this run."""
    completion_tokens: int = 0


@dataclass(eq=False)
class Journaled:
    """A generator whose every final reply is in a journal before it is returned.

    >>> replies = Journaled(generator, journal).replies(requests)
    """

    generator: Generator
    journal: Journal
    counts: Counts = field(default_factory=Counts, init=False)
    ask_again: set[str] | None = None
    """With a set, requests whose reply in the journal is a refusal are sent again, each once: the set holds the content
    hashes of those that were. None keeps refusals."""

    @property
    def key(self) -> str:
        return self.generator.key

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies of the journal as their requests are read, the others as they arrive; equal requests are sent
        once."""
        pending: dict[str, list[str]] = {}
        reusable: list[tuple[str, str]] = []

        def missing() -> Iterator[Request]:
            for request in requests:
                content = request_key(self.generator.key, request)
                if content in pending:
                    pending[content].append(request.key)
                elif content in self.journal and not self._refused(content):
                    self.counts.reused += 1
                    reusable.append((content, request.key))
                else:
                    pending[content] = [request.key]
                    self.counts.sent += 1
                    # The content hash is the internal name: two callers may use one name for two requests.
                    yield Request(**{**_fields(request), "key": content})

        for reply in counted("requests", self.generator.replies(missing()), unit="replies", done=self.counts.sent):
            names = pending.pop(reply.key)
            self._keep(reply, names[0])
            yield from self._known(reusable)
            for index, name in enumerate(names):
                self.counts.reused += index > 0
                yield _named(reply, name)
        yield from self._known(reusable)
        assert not pending, "a generator returned no reply to some requests"

    def _refused(self, content: str) -> bool:
        """Whether the journal's reply is a refusal that has to be asked for again; from then on it is not."""
        if self.ask_again is None or content in self.ask_again:
            return False
        reply = self.journal.get(content)
        if reply is None or reply.error is None:
            return False
        self.ask_again.add(content)
        return True

    def _known(self, reusable: list[tuple[str, str]]) -> Iterator[Reply]:
        """Yield, and clear, the replies of the journal; the texts are read only now."""
        for content, name in reusable:
            reply = self.journal.get(content)
            assert reply is not None
            yield _named(reply, name)
        reusable.clear()

    def _keep(self, reply: Reply, name: str) -> None:
        self.counts.prompt_tokens += reply.prompt_tokens
        self.counts.completion_tokens += reply.completion_tokens
        self.counts.retries += reply.tries - 1
        if reply.final:
            self.journal.put(reply.key, _named(reply, name))
        else:
            self.counts.failed += 1


def _named(reply: Reply, name: str) -> Reply:
    return replace(reply, key=name)


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}
