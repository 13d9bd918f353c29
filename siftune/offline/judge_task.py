"""A chat model judges rows: one request per row, a strictly read reply, every reply in a journal before it is used.

The prompt and the reading of a reply are a `Form`; the rest is the same for every judge. A row's text is put between
marks that are derived from that text, so it cannot close them, and a request holds one row alone, so it cannot change
another row's score. A request whose reply cannot be read is repeated with another seed; after the last attempt the row
has no score, and the reply is part of its reason. Cost: a chat model's reply per row.

Shapes: `n` rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import hash_json
from ..models.generate import Generator, Reply, Request, open_generator, request_key
from ..models.journal import Counts, Journal, Journaled
from ..records import Pool, Row, Shard, ShardResult
from .draw import number
from .prompts import Prompt

VERSION = 1
"""Increased whenever the same replies would produce other columns."""
MAX_CONSECUTIVE_FAILURES = 20
"""Consecutive requests without a reply after which no more are sent: the judge is not available."""
RETRY_TEMPERATURE = 0.7
"""Least temperature of a second try: at 0 it would be the first one again."""
SHOWN = 300
"""Characters of an unreadable reply that a row's reason shows; the journal has all of it."""
LONGEST_REPLY = 20_000
"""Characters of a reply, reasoning left out; a longer one is neither a rating nor a list of tags, and slow to
search."""
ROWS_AT_ONCE = 64
REFUSAL = "refused by the judge"
"""The kind of the reason of a row whose request was refused."""
FENCE = "{fence}"
COUNTS = ("requests", "prompt_tokens", "completion_tokens")
MOST = int(np.iinfo(np.int32).max)
"""Bound of a row's count: a caller's generator may report any number."""


class Unreadable(Exception):
    """A reply without an answer, or with several; the message says which."""


@dataclass(frozen=True)
class Form:
    """The prompt of a kind of judge, and how its reply is read."""

    name: str
    words: str
    """The prompt, with places for the row's parts and {fence} for the marks around them."""
    sees_answer: bool
    """Whether the prompt holds the answer, or the question alone."""
    read: Callable[[str, bool], NDArray[Any]]
    """A reply's text, and whether it was cut off at its longest, as an array of one shape. Raises `Unreadable`."""
    nothing: NDArray[Any]
    """The column's value where a row has no answer."""
    reply_tokens: int
    """Tokens of a usual reply, for an estimate."""
    version: int = 1
    """Increased whenever `read` changes."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How requests to a judge are made; fields as those of the methods."""

    retries: int
    temperature: float
    max_new_tokens: int
    unanswered: Literal["stop", "skip"]
    seed: int


def filled(prompt: Prompt, row: Row) -> str:
    """The prompt with the row in it; {fence} becomes a mark that does not occur in the row's text.

    >>> filled(Prompt("<{fence}>{question}</{fence}>"), Row(0, "", "Add.", "", "2"))
    '<9f2f7a1a5f6e6ae5>Add.</9f2f7a1a5f6e6ae5>'
    """
    row_text = "\0".join((row.instruction, row.input, row.output))
    mark, nth = "", 0
    while not mark or mark in row_text:
        mark, nth = blake2b(f"{nth}\0{row_text}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(), nth + 1
    fenced = Prompt(prompt.text.replace(FENCE, mark))
    return fenced.fill(instruction=row.instruction, input=row.input, output=row.output)


def strip_reasoning(text: str) -> str:
    """A reply without the reasoning that a model writes before it; empty when there is nothing else.

    >>> strip_reasoning("<think>Score: 3? No.</think>Score: 4")
    'Score: 4'
    """
    if text.lstrip().startswith("<think>") and "</think>" not in text:
        return ""
    return text.rpartition("</think>")[2]


def check_length(text: str) -> None:
    """Raise `Unreadable` for a reply that is longer than `LONGEST_REPLY` characters."""
    if len(text) > LONGEST_REPLY:
        raise Unreadable(f"a reply of {len(text):,} characters, more than {LONGEST_REPLY:,}")


@dataclass(eq=False)
class JudgeTask:
    """Columns of a shard: `answer` as the form reads it, `question` (int64, equal for equal requests), and what the
    row's replies cost: `requests`, `prompt_tokens`, `completion_tokens`, int32.

    Raises `UserError` when requests are left without a reply; the replies received so far are in the journal.
    """

    form: Form
    prompt: Prompt
    judge: str | Generator
    """A generator's name as `open_generator` takes it, or one that is open."""
    asking: Asking
    folder: Path
    """The journal's folder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For `open_generator`: what does not change a reply."""
    counts: Counts = field(default_factory=Counts)
    """The requests and replies of this process."""
    ask_again: set[str] | None = None
    """As in `Journaled`: with a set, requests that were refused in an earlier run are sent again. No part of the key."""
    report_rows: Callable[[int], Any] | None = None
    """Receives the number of rows with a first reply; a finished shard subtracts its rows, because engines report
    them."""
    one_process: ClassVar[bool] = True
    """Engines run it in their own process: the journal has one writer, and requests are already concurrent."""
    _cached: dict[str, Generator] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report_rows": None, "_cached": {}}

    @property
    def left_out(self) -> dict[str, str]:
        """Parameters that the judge's server refused in this run, with its words."""
        judge = self._cached.get("judge") if isinstance(self.judge, str) else self.judge
        return dict(getattr(judge, "left_out", {}))

    def outdated(self, result: ShardResult) -> bool:
        """Whether a finished shard has to be computed again, because its refused rows are to be asked for again."""
        return self.ask_again is not None and any(reason.startswith(REFUSAL) for reason in result.reasons.values())

    @property
    def generator(self) -> Generator:
        """The judge, opened on first use."""
        if not isinstance(self.judge, str):
            return self.judge
        if "judge" not in self._cached:
            self._cached["judge"] = open_generator(self.judge, **self.settings)
        return self._cached["judge"]

    def release(self) -> None:
        """Free a local judge's weights."""
        if release := getattr(self._cached.get("judge"), "release", None):
            release()

    @property
    def key(self) -> str:
        """Content hash of everything that determines a row's answer."""
        how = {name: getattr(self.asking, name) for name in self.asking.__dataclass_fields__}
        form = [self.form.name, self.form.version, self.prompt.text]
        return hash_json(["judge", VERSION, form, self.generator.key, how])

    @property
    def journal(self) -> Path:
        """The file of replies: the same for every pool and setting, so that no request is paid for twice."""
        return self.folder / f"{hash_json([self.generator.key, self.prompt.text])}.jsonl"

    # --- a shard ------------------------------------------------------------------------------------------------------

    def __call__(self, pool: Pool, shard: Shard) -> ShardResult:
        run = _ShardRun(self, pool, shard)
        remaining = [row for row in range(shard.start, shard.stop) if row not in pool.reasons]
        try:
            with Journal(self.journal) as journal:
                judge = Journaled(self.generator, journal, ask_again=self.ask_again)
                judge.counts = self.counts
                for attempt in range(1 + self.asking.retries):
                    if remaining:
                        remaining = run.send(judge, remaining, attempt)
        finally:
            run.report(-run.reported)
        return ShardResult(run.columns, dict(sorted(run.reasons.items())))

    def request(self, row: Row, attempt: int = 0) -> Request:
        """The request for a row; a further attempt has another seed and a temperature above 0."""
        temperature = self.asking.temperature
        return Request(
            key=f"row {row.row} {row.id} try {attempt + 1}",
            messages=(("user", filled(self.prompt, row)),),
            seed=number(self.asking.seed, self.form.name, "", attempt) % 2**31,
            temperature=max(temperature, RETRY_TEMPERATURE) if attempt else temperature,
            max_new_tokens=self.asking.max_new_tokens,
        )

    def replies(self, pool: Pool, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The readable reply of every row that has one in the journal, without reasoning; sends nothing.

        Raises `UserError` while another process writes the journal.
        """
        with Journal(self.journal) as journal:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                for row in pool.read(rows[start : start + ROWS_AT_ONCE]):
                    if (text := self._kept(journal, row)) is not None:
                        yield row.row, text

    def _kept(self, journal: Journal, row: Row) -> str | None:
        for attempt in range(1 + self.asking.retries):
            reply = journal.get(request_key(self.generator.key, self.request(row, attempt)))
            if reply is None or reply.error is not None:
                return None
            try:
                self.form.read(strip_reasoning(reply.text), reply.finish_reason == "length")
            except Unreadable:
                continue
            return strip_reasoning(reply.text)
        return None


class _ShardRun:
    """One shard that is being computed."""

    def __init__(self, task: JudgeTask, pool: Pool, shard: Shard) -> None:
        self.task, self.pool, self.start = task, pool, shard.start
        self.columns: dict[str, NDArray[Any]] = {
            "answer": np.repeat(task.form.nothing[None], len(shard), axis=0),
            "question": np.full(len(shard), -1, dtype=np.int64),
            **{name: np.zeros(len(shard), dtype=np.int32) for name in COUNTS},
        }
        self.reasons: dict[int, str] = {}
        self.reported = self.consecutive_failures = 0
        self.stopped = False
        """True once no more requests are sent."""

    def report(self, rows: int) -> None:
        """Report rows that have their first reply to the progress display."""
        self.reported += rows
        if rows and self.task.report_rows is not None:
            self.task.report_rows(rows)

    def send(self, judge: Journaled, rows: Sequence[int], attempt: int) -> list[int]:
        """Send one request for each of these rows; returns those whose reply could not be read. Raises `UserError`."""
        unreadable: list[int] = []
        failed: list[Reply] = []
        for reply in judge.replies(self._requests(rows, attempt)):
            row = int(reply.key.split()[1])
            self.report(1 if attempt == 0 else 0)
            if not reply.final:
                failed.append(reply)
                self.reasons[row] = f"no reply: {reply.error}"
                self.consecutive_failures += 1
                self.stopped = self.stopped or self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES
                continue
            self.consecutive_failures = 0
            for name, count in zip(COUNTS, (1, reply.prompt_tokens, reply.completion_tokens), strict=True):
                column, index = self.columns[name], row - self.start
                column[index] = min(int(column[index]) + count, MOST)
            if self._read(reply, row):
                unreadable.append(row)
        if failed and (self.stopped or self.task.asking.unanswered == "stop"):
            raise UserError(
                f"the judge left {len(failed)} requests without a reply ({failed[0].error}); run the same command again, "
                f"the {len(judge.journal)} replies received so far are kept in {judge.journal.path}"
            )
        return sorted(unreadable)

    def _requests(self, rows: Sequence[int], attempt: int) -> Iterator[Request]:
        """The rows' requests, generated lazily; none once the judge is not available."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            for row in self.pool.read(rows[start : start + ROWS_AT_ONCE]):
                if self.stopped:
                    return
                if not row.question.strip():
                    self.reasons[row.row] = "no question to judge"
                    continue
                request = self.task.request(row, attempt)
                digest = bytes.fromhex(hash_json(request.content["messages"]))
                self.columns["question"][row.row - self.start] = int.from_bytes(digest[:8], "big") >> 1
                yield request

    def _read(self, reply: Reply, row: int) -> bool:
        """Store the reply's answer, or the reason why there is none; True when another attempt may help."""
        self.reasons.pop(row, None)
        if reply.error is not None:
            self.reasons[row] = f"{REFUSAL}: {reply.error}"
            return False
        cut, text = reply.finish_reason == "length", strip_reasoning(reply.text)
        try:
            self.columns["answer"][row - self.start] = self.task.form.read(text, cut)
        except Unreadable as error:
            reply_text = " ".join(reply.text.split())
            shown = reply_text if len(reply_text) <= SHOWN else reply_text[:SHOWN] + "..."
            why = str(error)
            if cut:
                limit = f"raise --max-new-tokens, now {self.task.asking.max_new_tokens}"
                why = f"{why} ({limit})" if text.strip() else f"all of its tokens are reasoning, no answer ({limit})"
            self.reasons[row] = f"unreadable reply: {why}: {shown!r}"
            return True
        return False


# --- cost -------------------------------------------------------------------------------------------------------------


def spent(columns: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Requests and tokens of a pool's columns, every distinct request counted once."""
    requested = np.flatnonzero(columns["question"] >= 0)
    _, first = np.unique(columns["question"][requested], return_index=True)
    return {name: int(columns[name][requested[first]].sum(dtype=np.int64)) for name in COUNTS}


def cost(price: Mapping[str, float] | None, prompt_tokens: int, completion_tokens: int) -> float | None:
    """The cost of the tokens at `price` per million; None without a price.

    >>> cost({"prompt": 0.5, "completion": 2.0}, 2_000_000, 500_000)
    2.0
    """
    if price is None:
        return None
    return round((price.get("prompt", 0) * prompt_tokens + price.get("completion", 0) * completion_tokens) / 1e6, 6)
