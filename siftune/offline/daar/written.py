"""The output of the writing stage: a readable file per domain, one file of all for `--seeds`, and every rejected reply.

`domains/<domain>.jsonl` holds a domain's rows, each with `domain`, its fields, `how` it came (real, seed, further,
relaxed) and its largest cosine to the rows before it; they may be edited and the folder passed as `--seeds`.
`seeds.jsonl` holds the same rows together, `rejected.jsonl` the rest with reasons. Cost: the files' size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...data.protect import RUN, refuse_foreign
from ...files import atomic_path, read_json, write_json

SEEDS = "seeds.jsonl"
REJECTED = "rejected.jsonl"
FACTS = "written.json"
FOLDER = "domains"
REPEATS = 6
"""Requests of a domain from which on a note reports that most replies were the same."""


@dataclass(frozen=True)
class Rejected:
    """A reply, or a row of one, that is not used."""

    domain: str
    request: str
    """The request (key `asked` of the file): domain, `seeds` or `further`, attempt."""
    reason: str
    """`kind: detail`."""
    text: str
    """What the model wrote: the reply, or the row's text."""
    row: dict[str, str] | None = None
    """The row's fields where it could be read."""


def reject_counts(rejected: Iterable[Rejected]) -> dict[str, int]:
    """How many replies or rows were not used, by kind of reason, the most frequent first."""
    return dict(Counter(item.reason.partition(":")[0] for item in rejected).most_common())


@dataclass(frozen=True)
class Written:
    """The rows of every domain, what was rejected, and the counts."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    rejected: Sequence[Rejected]
    facts: Mapping[str, Mapping[str, Any]]
    """Per domain: rows by origin, requests, tau requested and tau used."""

    @property
    def info(self) -> dict[str, Any]:
        """The facts for a manifest: per domain, and rejected rows by kind of reason."""
        domains = {name: dict(facts) for name, facts in self.facts.items()}
        return {"domains": domains, "rejected": reject_counts(self.rejected)}

    @property
    def notes(self) -> list[str]:
        """Notes for the user: one sentence for each domain with too few rows, or whose tau was relaxed."""
        sentences = []
        for name, facts in self.facts.items():
            if facts["relaxed"]:
                sentences.append(
                    f"{name}: {facts['rows'] - facts['relaxed']} rows stayed below the similarity {facts['threshold']:g} "
                    f"in {facts['requests']} requests; {facts['relaxed']} more were taken up to {facts['threshold_used']:.4f}"
                )
            if facts["rows"] < facts["wanted"]:
                reasons = ", ".join(f"{count} x {kind}" for kind, count in facts["rejected"].items())
                sentences.append(
                    f"{name}: {facts['rows']} rows instead of {facts['wanted']}, the generator wrote no others in "
                    f"{facts['requests']} requests (not used: {reasons or 'nothing'}); set generator to a larger model, "
                    "pass rows of this domain with --seeds, or lower rows in the settings of the domains file"
                )
            if facts["requests"] >= REPEATS and 2 * facts["different_replies"] <= facts["requests"]:
                sentences.append(
                    f"{name}: {facts['different_replies']} different replies to {facts['requests']} requests, so the "
                    "generator does not sample; enable sampling (a server may want do_sample in the model's "
                    "generation_config.json)"
                )
        return sentences

    def write(self, folder: str | Path, *, counts: Mapping[str, int] | None = None, notes: Sequence[str] = ()) -> Path:
        """Write all files into a folder, in place of those of their names; returns the seeds file, written last.
        `counts` are the journal's, `notes` are added to the stage's own.

        >>> DaaR(model=model, seeds=written.write("run"))
        """
        folder = Path(folder)
        everything = []
        for name, rows in self.rows.items():
            lines = [_line({"domain": name, **row}) for row in rows]
            _write(folder / FOLDER / f"{name}.jsonl", lines)
            everything += lines
        write_rejected(folder, self.rejected)
        write_json(folder / FACTS, self.info | {"told": [*self.notes, *notes], "replies": dict(counts or {})})
        _write(folder / SEEDS, everything)
        return folder / SEEDS


def write_rejected(folder: str | Path, rejected: Sequence[Rejected]) -> Path:
    """Write the rejected replies alone, for a domain without a row."""
    path = Path(folder) / REJECTED
    keys = {"request": "asked"}
    _write(
        path,
        [
            _line({keys.get(name, name): value for name, value in asdict(item).items() if value is not None})
            for item in rejected
        ],
    )
    return path


def _line(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(value)


def _write(path: Path, lines: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def copy_written(source: str | Path, folder: str | Path) -> list[Path]:
    """Copy the written files into a run folder; existing files of a domain are kept, because the user may have
    edited them. Returns the files at the top. Raises `UserError` for a folder with the user's own files of these
    names."""
    source, folder = Path(source), Path(folder)
    refuse_foreign(folder, (SEEDS, REJECTED, FACTS), {FACTS: ("domains", "rejected", "told"), **RUN})
    for path in sorted((source / FOLDER).glob("*.jsonl")):
        if not (folder / FOLDER / path.name).exists():
            with atomic_path(folder / FOLDER / path.name) as temporary:
                temporary.write_bytes(path.read_bytes())
    for name in (REJECTED, FACTS, SEEDS):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes((source / name).read_bytes())
    return [folder / name for name in (REJECTED, FACTS, SEEDS)]


def written_facts(folder: str | Path) -> dict[str, Any]:
    """The content of the file that `Written.write` stored: domains, rejected replies, notes and counts of replies."""
    return dict(read_json(Path(folder) / FACTS))
