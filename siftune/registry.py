"""Every method by name: (side, name) -> its module, its paper and what it needs. Resolved on use, so `import
siftune` loads no torch. The contract suite reads this table; a method is added by its line (or by `register`).

Methods of installed packages join through the entry-point group `siftune.methods`: `NAME = module:Class`, a subclass of
`siftune.OfflineMethod` or `siftune.OnlineMethod` whose `name` is NAME and whose `summary`, `paper` and `needs` describe it.
They are imported at most once, when methods are listed or a name is looked up that is none of siftune's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from .errors import UserError, did_you_mean

Side = Literal["offline", "online"]
GROUP = "siftune.methods"
"""Entry-point group of methods in other packages."""


@dataclass(frozen=True)
class Entry:
    """One line of `siftune methods`."""

    side: Side
    name: str
    target: str
    """`module:Class`, imported on use."""
    summary: str
    paper: str
    needs: str

    def load(self) -> type[Any]:
        """The class itself; imports its module."""
        module, _, attribute = self.target.partition(":")
        loaded: type[Any] = getattr(import_module(module), attribute)
        return loaded


_METHODS: dict[tuple[Side, str], Entry] = {}


def register(side: Side, name: str, target: str, *, summary: str, paper: str = "-", needs: str = "-") -> None:
    """Add a method under a name. Raises `UserError` when the name is taken.

    >>> register("offline", "my-score", "my_package.scores:MyScore", summary="what it ranks by")
    """
    if (side, name) in _METHODS:
        raise UserError(
            f"{side} method {name!r} is registered already ({_METHODS[side, name].target}); pick a new name"
        )
    _METHODS[side, name] = Entry(side, name, target, summary, paper, needs)


def methods(side: Side | None = None) -> Iterator[Entry]:
    """Every entry, in the order registered, those of installed packages last.

    A package whose entry point cannot be used is named in a warning and left out.
    """
    installed, failures = _installed()
    for failure in failures.values():
        warnings.warn(failure, stacklevel=2)
    everything = {**installed, **_METHODS}
    ordered = [*_METHODS, *(key for key in installed if key not in _METHODS)]
    return (everything[key] for key in ordered if side in (None, key[0]))


def find(side: Side, name: str) -> Entry:
    """The entry of a method. Raises `UserError` that lists the known names and the nearest one."""
    if (side, name) in _METHODS:
        return _METHODS[side, name]
    installed, failures = _installed()
    if (side, name) in installed:
        return installed[side, name]
    if name in failures:
        raise UserError(failures[name])
    known = [entry.name for entry in methods(side)]
    hint = did_you_mean(name, known, otherwise="siftune methods tells them apart")
    raise UserError(f"there is no {side} method {name!r}; known: {', '.join(known)}; {hint}")


@cache
def _installed() -> tuple[dict[tuple[Side, str], Entry], dict[str, str]]:
    """The methods of installed packages, and a sentence for each entry point that cannot be used, by its name."""
    entries: dict[tuple[Side, str], Entry] = {}
    failures: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            entry = _entry_of(point)
            if (entry.side, entry.name) in {**_METHODS, **entries}:
                raise UserError(f"there is an {entry.side} method of this name already")
            entries[entry.side, entry.name] = entry
        except Exception as error:  # a package of somebody else's may raise anything on import
            package = point.dist.name if point.dist is not None else point.value
            reason = " ".join(f"{error}".split()) or type(error).__name__
            failures[point.name] = (
                f"the method {point.name} of the package {package} cannot be used ({point.value}: {reason}); "
                "update or uninstall that package"
            )
    return entries, failures


def _entry_of(point: EntryPoint) -> Entry:
    """The entry of a method in another package. Raises `UserError` for a class that is no method."""
    method = point.load()
    side = getattr(method, "side", None) if isinstance(method, type) else None
    if side not in ("offline", "online"):
        raise UserError("it is not a subclass of siftune.OfflineMethod or siftune.OnlineMethod")
    if method.name != point.name:
        raise UserError(f"the class has name={method.name!r}; the entry point needs the same name")
    summary = method.summary or (method.__doc__ or "-").strip().split("\n")[0]
    return Entry(side, point.name, point.value, summary, method.paper, method.needs)


_DAAR = "DaaR, arXiv 2502.04380"
_UDS = "UDS, arXiv 2510.16882"
_INSTAG = "InsTag, arXiv 2308.07074"
_DEITA = "Deita, arXiv 2312.15685"

register(
    "offline", "random", "siftune.offline.random:Random", summary="a seeded uniform draw, the reference at equal budget"
)
register(
    "offline",
    "daar",
    "siftune.offline.daar.selector:DaaR",
    summary="diversity reward: predicted domain ambiguity of a row, by probes on the model's own early layers",
    paper=_DAAR,
    needs="a causal LM (first layers only); a few example rows per domain, or a chat model that writes them",
)
register(
    "offline",
    "length",
    "siftune.offline.length:Length",
    summary="words of the question, the longest first",
    paper=_DAAR,
)
register(
    "offline",
    "output-length",
    "siftune.offline.output_length:OutputLength",
    summary="words of the answer, the longest first",
    paper=_DAAR,
)
register(
    "offline",
    "alpagasus",
    "siftune.offline.alpagasus:AlpaGasus",
    summary="a judge's rating of the answer's accuracy, 0 to 5",
    paper="AlpaGasus, arXiv 2307.08701",
    needs="a chat model (local, or any OpenAI-compatible server)",
)
register(
    "offline",
    "instag-c",
    "siftune.offline.instag:InsTagC",
    summary="number of intentions that a tagger finds in the question",
    paper=_INSTAG,
    needs="a chat model (local, or any OpenAI-compatible server)",
)
register(
    "offline",
    "instag-d",
    "siftune.offline.instag:InsTagD",
    summary="rows that cover all of a tagger's tags soonest",
    paper=_INSTAG,
    needs="a chat model (local, or any OpenAI-compatible server)",
)
register(
    "offline",
    "ifd",
    "siftune.offline.ifd:IFD",
    summary="instruction-following difficulty: perplexity of the answer with the question over that without it",
    paper="SuperFiltering, arXiv 2402.00530; Cherry LLM, arXiv 2308.12032",
    needs="a causal LM (a small one will do)",
)
register(
    "offline",
    "deita-c",
    "siftune.offline.deita:DeitaC",
    summary="complexity of the question, 1 to 6, as a scorer model expects it",
    paper=_DEITA,
    needs="a scorer LM",
)
register(
    "offline",
    "deita-q",
    "siftune.offline.deita:DeitaQ",
    summary="quality of the answer, 1 to 6, as a scorer model expects it",
    paper=_DEITA,
    needs="a scorer LM",
)
register(
    "offline",
    "deita-d",
    "siftune.offline.deita:DeitaD",
    summary="best complexity * quality first, rows too like a better one behind",
    paper=_DEITA,
    needs="two scorer LMs and an embedding model (may be one)",
)
register(
    "offline",
    "inter-diversity",
    "siftune.offline.domain_diversity:InterDiversity",
    summary="rows far from the centroids of the other domains",
    paper=f"{_DAAR}, section 3",
    needs="domain labels; a model's embedding layer",
)
register(
    "offline",
    "intra-diversity",
    "siftune.offline.domain_diversity:IntraDiversity",
    summary="rows near the centroid of their own domain",
    paper=f"{_DAAR}, section 3",
    needs="domain labels; a model's embedding layer",
)
register(
    "offline",
    "bm25",
    "siftune.offline.bm25:BM25",
    summary="rows that share rare words with the rows of a target",
    paper="Robertson et al., TREC-3 1994",
    needs="target rows",
)
register(
    "offline",
    "rds",
    "siftune.offline.rds:RDS",
    summary="rows whose last hidden states are near those of a target's rows",
    paper="RDS+, arXiv 2503.01807",
    needs="target rows; a causal LM",
)
register(
    "offline",
    "target-loss",
    "siftune.warmup.target_loss:TargetLoss",
    summary="rows whose loss falls most, relatively, after a short LoRA run on the rows of a target",
    paper="TAP, arXiv 2605.09404",
    needs="target rows; a causal LM; trl and peft",
)
register(
    "offline",
    "less",
    "siftune.warmup.less:Less",
    summary="rows whose training step points where the gradient of a target's rows does",
    paper="LESS, arXiv 2402.04333",
    needs="target rows; a causal LM; trl and peft",
)
register(
    "offline",
    "kmeans",
    "siftune.offline.coverage:KMeansCoverage",
    summary="equally many rows of every cluster of the pool, those nearest to its centre first",
    needs="a causal LM",
)
register(
    "offline",
    "facility",
    "siftune.offline.coverage:Facility",
    summary="greedily, the rows that represent the pool best: facility location",
    paper="Minoux 1978 (lazy greedy)",
    needs="a causal LM",
)
register(
    "offline",
    "length-matched",
    "siftune.offline.length_matched:LengthMatched",
    summary="a random draw with the length histogram of another run's rows",
    needs="a finished run",
)
register("online", "regular", "siftune.online.simple:Regular", summary="keeps every row, the full-data reference")
register(
    "online", "random", "siftune.online.simple:Random", summary="a seeded uniform draw, the reference at equal budget"
)
register(
    "online",
    "maxloss",
    "siftune.online.maxloss:MaxLoss",
    summary="the rows with the largest mean loss",
    needs="forward",
)
register(
    "online",
    "maxgrad",
    "siftune.online.maxgrad:MaxGrad",
    summary="the rows with the largest gradient norm over the trained weights (or, cheaper, at the logits)",
    needs="forward and backward; the logits' variant a forward",
)
register(
    "online",
    "rho-loss",
    "siftune.online.rho_loss:RhoLoss",
    summary="the rows whose loss is largest beyond that of a reference model trained on held-out data",
    paper="RHO-Loss, arXiv 2206.07137",
    needs="forward; a reference model, or a table made once by siftune.reference_losses",
)
register(
    "online",
    "token-rho",
    "siftune.online.token_masks:TokenRho",
    summary="keeps every row and trains on the label tokens whose loss differs most from a reference model's",
    paper="Rho-1, arXiv 2404.07965",
    needs="forward; a reference model, or a table of siftune.reference_losses(per_token=True)",
)
register(
    "online",
    "token-self",
    "siftune.online.token_masks:TokenSelf",
    summary="keeps every row and trains on the label tokens whose loss fell most since the base model",
    paper="ssToken, arXiv 2510.18250",
    needs="two forwards; LoRA, or the base model as reference",
)
register(
    "online",
    "greats",
    "siftune.online.greats:Greats",
    summary="greedily, the rows whose gradients lower the validation rows' loss most without repeating each other",
    paper="GREATS, NeurIPS 2024",
    needs="forward and backward; labelled validation rows",
)
register(
    "online",
    "uds",
    "siftune.online.uds:UDS",
    summary="nuclear norm of the logits plus distance to a memory of recently kept rows",
    paper=_UDS,
    needs="forward",
)
