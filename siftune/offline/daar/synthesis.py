"""A model writes its own domain examples: DaaR without any seed row (arXiv 2502.04380, stages 1a to 1c).

Per domain the generator writes a few rows from the domain's sentence alone, then, a few requests at a time, one more
row unlike three random rows of those kept; a row is kept while its largest cosine to them stays below tau. A domain
that cannot reach its number within its attempts takes the least similar of the rows that tau rejected, with a note.
Where no reply of a domain can be read, single rows are requested in plainer words from then on (siftune's; `plain.py`).
Given the generator's replies and the seed, the result is determined; replies are journaled, so none is requested twice.
Cost: about `attempts` replies per domain at most.

Axes: `K` domains.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...data.formats import text_of
from ...errors import UserError, check_keys
from ...models.generate import Generator, Message, Reply, Request
from ...records import Row
from ..draw import number
from .acceptance import Candidate, Embed, Kept, Space, units
from .descriptions import THRESHOLD, Descriptions, Domain
from .endings import REPETITION, end_after
from .parsing import parse_rows
from .plain import PLAIN_TOKENS, copies_the_form, plain_messages
from .written import Rejected, Written, reject_counts

SEED_TRIES = 5
"""Requests for seed rows of a domain at most."""


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """How domain rows are written; the defaults are the paper's. `settings:` of a domains file sets the same fields."""

    seeds: int = 5
    """Rows of a domain asked for at once, from its sentence alone (paper: 5)."""
    rows: int = 30
    """Rows of a domain at which writing stops (paper: 30; 10 give the same centroid to cosine 0.97)."""
    window: int = 3
    """Rows shown as counter-examples to each further request (paper: 3)."""
    threshold: float = THRESHOLD
    """tau, for domains that give none of their own (paper: 0.85, mathematics 0.90)."""
    space: Space = "last-layer"
    """Where cosines are measured: the base model's `last-layer`, where tau was tuned, or its `embedding` (paper's
    text). `last-layer` loads the whole base model while rows are written."""
    attempts: int = 120
    """Requests for further rows of a domain at most; then tau is relaxed over what was written."""
    at_once: int = 4
    """Further rows of a domain asked for side by side, each with rows to be unlike of its own (authors: 1)."""
    temperature: float = 0.9
    """For the seed rows (paper: 0.9)."""
    further_temperature: float = 0.95
    """For further rows (authors' code: 0.95)."""
    top_p: float = 0.95
    """Nucleus of the sampling (paper: 0.95)."""
    max_new_tokens: int = 2048
    """Tokens of a reply at most (paper: 2048)."""

    def __post_init__(self) -> None:
        for name in ("seeds", "rows", "window", "attempts", "at_once", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "attempts" else 1):
                raise UserError(f"synthesis: {name}={value!r} must be a number of at least 1")
        for name, top in (("threshold", 1.0), ("top_p", 1.0), ("temperature", 5.0), ("further_temperature", 5.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= top:
                raise UserError(f"synthesis: {name}={value!r} is not in (0, {top:g}]")
        if self.space not in ("last-layer", "embedding"):
            raise UserError(f"synthesis: space={self.space!r} is not known; use last-layer or embedding")
        if self.rows < self.seeds:
            raise UserError(f"synthesis: rows={self.rows} is below seeds={self.seeds}; raise it")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Synthesis:
        """From the `settings:` of a domains file. Raises `UserError` for an unknown key."""
        check_keys(settings, [item.name for item in fields(cls)], "domains, settings")
        return cls(**settings)


class Writing:
    """One run of the stage; `run` returns the written rows, `rejected` holds the rest even when it raises.

    >>> Writing(read_descriptions(), generator, embed, Synthesis(), seed=0).run().write("run")
    """

    def __init__(
        self,
        descriptions: Descriptions,
        generator: Generator,
        embed: Embed,
        how: Synthesis,
        *,
        seed: int,
        real: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
        progress: Any = None,
    ) -> None:
        self.descriptions, self.generator, self.embed, self.how, self.seed = descriptions, generator, embed, how, seed
        self.real, self.progress = dict(real or {}), progress
        self.kept = {domain.name: Kept(domain.threshold or how.threshold) for domain in descriptions.domains}
        self.rejected: list[Rejected] = []
        self._notes: dict[int, Rejected] = {}
        """Entries of rows that only tau rejected, by the candidate's identity."""
        self.attempts = dict.fromkeys(self.kept, 0)
        self.tries = dict.fromkeys(self.kept, 0)
        self.plain: dict[str, int] = {}
        """Domains with requests in plainer words, and the number of such requests."""
        self.texts: dict[str, set[str]] = {name: set() for name in self.kept}
        """Replies that differ, per domain: a generator that does not sample repeats itself."""

    def run(self) -> Written:
        """Write every domain's rows. Raises `UserError` when a domain gets none, or the generator leaves requests
        without a reply."""
        total = self.how.rows * len(self.kept)
        if self.progress is not None:
            self.progress.start("writing domain rows", total)
        try:
            self._inject()
            self._seed_rows()
            self._further_rows()
            self._relax()
            self._check_not_empty(list(self.kept))
        finally:
            if self.progress is not None:
                self.progress.close()
        rows = {name: [_line(candidate) for candidate in kept.candidates] for name, kept in self.kept.items()}
        facts = {domain.name: self._facts(domain, rows[domain.name]) for domain in self.descriptions.domains}
        return Written(rows, self.rejected, facts)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _inject(self) -> None:
        """Real rows first, as they are (stage 1c)."""
        unknown = [name for name in self.real if name not in self.kept]
        if unknown:
            raise UserError(f"real rows name the domain {unknown[0]!r}, which is not one of {', '.join(self.kept)}")
        for name, rows in self.real.items():
            self._judge(name, [(dict(row), "real") for row in rows], "real", any_distance=True)

    def _seed_rows(self) -> None:
        """Ask each domain for its first rows, again with another seed while it has too few (stage 1a)."""
        while True:
            requests: dict[str, list[Request]] = {}
            for domain in self.descriptions.domains:
                name, tries = domain.name, self.tries[domain.name]
                count = min(self._missing_seeds(name), SEED_TRIES - tries)
                if count > 0:
                    plain = name in self.plain
                    requests[name] = [self._seed_request(domain, tries + n) for n in range(count if plain else 1)]
                    self.tries[name] += len(requests[name])
            if not requests:
                break
            for name, replies in self._ask(requests).items():
                rows = self._rows_of(name, replies)
                self._judge(name, rows, "seed", any_distance=True, most=self._missing_seeds(name))
        self._check_not_empty([name for name in self.kept if name not in self.plain])

    def _seed_request(self, domain: Domain, attempt: int) -> Request:
        if domain.name in self.plain:
            return self._plain_request(domain, self.how.temperature)
        messages = self.descriptions.seed_messages(domain, self.how.seeds)
        return self._request(domain, "seeds", attempt, messages, self.how.temperature, rows=self.how.seeds)

    def _missing_seeds(self, name: str) -> int:
        """Number of first rows still to be requested; none where real rows fill the domain already."""
        kept = self.kept[name].candidates
        return min(self.how.rows - len(kept), self.how.seeds - sum(candidate.how == "seed" for candidate in kept))

    def _further_rows(self) -> None:
        """Request rows unlike some of those kept until each domain has its number or no attempt left (stage 1b)."""
        while True:
            requests: dict[str, list[Request]] = {}
            for domain in self.descriptions.domains:
                name, used = domain.name, self.attempts[domain.name]
                count = min(self.how.at_once, self.how.rows - len(self.kept[name]), self.how.attempts - used)
                if count > 0:
                    requests[name] = [self._further_request(domain, used + index) for index in range(count)]
                    self.attempts[name] += count
            if not requests:
                return
            for name, replies in self._ask(requests).items():
                rows = self._rows_of(name, replies)
                self._judge(name, rows, "further", most=self.how.rows - len(self.kept[name]))

    def _further_request(self, domain: Domain, attempt: int) -> Request:
        if domain.name in self.plain:
            return self._plain_request(domain, self.how.further_temperature)
        kept = self.kept[domain.name].candidates
        chance = random.Random(f"siftune window {self.seed} {domain.name} {attempt}")
        shown = [candidate.row for candidate in chance.sample(kept, min(self.how.window, len(kept)))]
        messages = self.descriptions.augment_messages(domain, shown)
        return self._request(domain, "further", attempt, messages, self.how.further_temperature, rows=1)

    def _relax(self) -> None:
        """Where a domain has too few rows, accept the least similar of those that only tau rejected."""
        for kept in self.kept.values():
            accepted = kept.relax(self.how.rows)
            back = [self._notes[id(candidate)] for candidate in accepted]
            self.rejected = [note for note in self.rejected if not any(note is other for other in back)]
            self._advance(len(accepted))

    # --- requests and acceptance --------------------------------------------------------------------------------------

    def _plain_request(self, domain: Domain, temperature: float) -> Request:
        attempt = self.plain[domain.name]
        self.plain[domain.name] += 1
        messages = plain_messages(domain, self.descriptions.names)
        return self._request(domain, "plain", attempt, messages, temperature, rows=1, most_tokens=PLAIN_TOKENS)

    def _request(
        self,
        domain: Domain,
        what: str,
        attempt: int,
        messages: tuple[Message, ...],
        temperature: float,
        *,
        rows: int,
        most_tokens: int | None = None,
    ) -> Request:
        return Request(
            key=f"{domain.name}/{what}/{attempt}",
            messages=messages,
            seed=number(self.seed, f"{what} rows", domain.name, attempt) % 2**31,
            temperature=temperature,
            top_p=self.how.top_p,
            max_new_tokens=min(self.how.max_new_tokens, most_tokens or self.how.max_new_tokens),
            end_rule=end_after(rows),
        )

    def _ask(self, requests: Mapping[str, list[Request]]) -> dict[str, list[Reply]]:
        """Replies by domain, in the order of the requests, whatever order they arrived in."""
        all_requests = [request for domain_requests in requests.values() for request in domain_requests]
        by_key = {reply.key: reply for reply in self.generator.replies(all_requests)}
        failed = [reply for reply in by_key.values() if not reply.final]
        if failed:
            raise UserError(
                f"the generator left {len(failed)} of {len(all_requests)} requests without a reply ({failed[0].key}: "
                f"{failed[0].error}); run the same command again, the replies received so far are kept"
            )
        by_domain = {
            name: [by_key[request.key] for request in domain_requests] for name, domain_requests in requests.items()
        }
        for name, replies in by_domain.items():
            self.texts[name].update(reply.text for reply in replies)
        return by_domain

    def _rows_of(self, domain: str, replies: Sequence[Reply]) -> list[tuple[dict[str, str], str]]:
        """Every good row of the replies with its request's name; the others are recorded. A domain none of whose
        replies can be read gets requests in plainer words from then on."""
        rows: list[tuple[dict[str, str], str]] = []
        for reply in replies:
            if reply.error is not None:
                self._reject(domain, reply.key, f"refused: {reply.error}", "")
                continue
            cut_off = reply.finish_reason in ("length", REPETITION)
            for item in parse_rows(reply.text, cut=cut_off):
                reason = item.reason
                if reason is None and domain in self.plain and copies_the_form(item.row):
                    reason = "copy: the row is the one that showed the form"
                if reason is None:
                    rows.append((item.row, reply.key))
                else:
                    self._reject(domain, reply.key, _ended(reason, reply.finish_reason), reply.text)
        if not rows and any(reply.error is None for reply in replies):
            self.plain.setdefault(domain, 0)
        return rows

    def _judge(
        self,
        domain: str,
        rows: Sequence[tuple[dict[str, str], str]],
        how: str,
        *,
        any_distance: bool = False,
        most: int | None = None,
    ) -> None:
        """Keep or reject rows, in order, until `most` are kept."""
        kept, remaining = self.kept[domain], most
        if not rows:
            return
        texts = [text_of(Row(0, "", row["instruction"], row["input"], row["output"])) for row, _ in rows]
        for (row, request), text, unit in zip(rows, texts, units(self.embed(texts)), strict=True):
            if remaining == 0:
                self._reject(domain, request, "not needed: the domain has its rows", text, row)
                continue
            candidate = Candidate(row, request, how, unit)
            reason = kept.judge(candidate, any_distance=any_distance)
            if reason is not None:
                self._notes[id(candidate)] = self._reject(domain, request, reason, text, row)
                continue
            remaining = None if remaining is None else remaining - 1
            self._advance(1)

    def _reject(
        self, domain: str, request: str, reason: str, text: str, row: Mapping[str, str] | None = None
    ) -> Rejected:
        note = Rejected(domain, request, reason, text, dict(row) if row is not None else None)
        self.rejected.append(note)
        return note

    def _advance(self, rows: int) -> None:
        if self.progress is not None:
            self.progress.advance(rows)

    # --- the result ---------------------------------------------------------------------------------------------------

    def _facts(self, domain: Domain, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        threshold = domain.threshold or self.how.threshold
        return {
            "rows": len(rows),
            "wanted": self.how.rows,
            **{how: sum(row["how"] == how for row in rows) for how in ("real", "seed", "further", "relaxed")},
            "requests": self.tries[domain.name] + self.attempts[domain.name],
            "different_replies": len(self.texts[domain.name]),
            "plain_requests": self.plain.get(domain.name, 0),
            "rejected": reject_counts(item for item in self.rejected if item.domain == domain.name),
            "threshold": threshold,
            "threshold_used": round(self.kept[domain.name].threshold, 4),
        }

    def _check_not_empty(self, names: Sequence[str]) -> None:
        """Raise `UserError` for the first of these domains that has no row."""
        name = next((name for name in names if not len(self.kept[name])), None)
        if name is None:
            return
        counts = Counter(item.reason for item in self.rejected if item.domain == name)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))
        raise UserError(
            f"the generator wrote no usable row of the domain {name!r} in {self.tries[name] + self.attempts[name]} "
            f"replies ({reasons}); set generator to a larger model, pass rows of the domain with --seeds FILE, or reword "
            "its description"
        )


def _ended(reason: str, finish_reason: str) -> str:
    """The parser's reason, corrected by the reply's finish reason."""
    if finish_reason == "length" and reason == "empty reply":
        return "empty reply: all of its tokens are reasoning; raise max_new_tokens in the settings of the domains file"
    return "torn: the reply repeats itself" if finish_reason == REPETITION and reason.startswith("torn") else reason


def _line(candidate: Candidate) -> dict[str, Any]:
    """A kept row as it is stored; the first row of a domain has nothing to be similar to."""
    similarity = round(candidate.similarity, 4) if candidate.similarity >= -0.999999 else None
    return {**candidate.row, "how": candidate.how, "similarity": similarity}
