"""How reliable DaaR's domain probe is: confusion and calibration on the rows it was not trained on.

The held-out rows, their features and their k-means labels come from the run's files (probes and centroids in the run
folder, features in the cache), so no model is loaded; where they are missing, the pool's probabilities are shown
instead, with a note. Cost: one pass of a small MLP over the probe set.

Axes: `B` rows of the probe set, `D` width, `K` domains.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..records import Pool, Shard
from . import words
from .blocks import Chart, Fact, Facts, Heat, Note
from .rows_file import Selection, store_folder

BINS = 10
"""Equal-width bins of confidence in the reliability chart."""


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """The probe set that the probes were fitted on."""

    rows: NDArray[np.int64]
    """Shape `(B,)`: rows of the pool; -1 for a duplicate whose row is ambiguous."""
    hidden: NDArray[np.float32]
    """Shape `(B, D)`."""
    labels: NDArray[np.int64]
    """Shape `(B,)`: the k-means label, nearest centre."""
    held: NDArray[np.int64]
    """Positions held out of the probe's training."""
    probabilities: NDArray[np.float64]
    """Shape `(B, K)`: the fitted probe's."""


def read_probe_set(selection: Selection, pool: Pool, *, cache: str | Path | None = None) -> ProbeSet | None:
    """The probe set of a DaaR run from the cache; None where its features are no longer there."""
    from ..offline.daar.probe_set import CHUNK_ROWS, draw_probe_set
    from ..offline.daar.selector import DaaR

    try:
        method = DaaR.load(selection.folder)
        if method.learned is None:
            return None
        task = method.feature_task(for_fit=True)
        probe_pool = draw_probe_set(pool, method.probe_rows, seed=method.seed)
        starts = range(0, len(probe_pool), CHUNK_ROWS)
        shards = [Shard(at, start, min(start + CHUNK_ROWS, len(probe_pool))) for at, start in enumerate(starts)]
        columns = _stored(task, probe_pool, shards, cache)
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None
    return None if columns is None else _probe_set(method, pool, probe_pool, columns)


def _stored(
    task: Any, pool: Pool, shards: list[Shard], cache: str | Path | None
) -> dict[str, NDArray[np.float32]] | None:
    """Both features of every row of the shards, computed with any number of threads."""
    import torch

    from ..engines.shard import load_result, shard_key
    from ..models.store import Store

    store, key = Store(store_folder("shards", cache)), str(task.key)
    thread_counts = dict.fromkeys([torch.get_num_threads(), *range(1, (os.cpu_count() or 1) + 1)])
    for threads in thread_counts:
        parts = []
        for shard in shards:
            result = load_result(store, shard_key(key, pool, shard, threads=threads), shard)
            if result is None:
                break
            parts.append(result.columns)
        if len(parts) == len(shards):
            return {name: np.concatenate([part[name] for part in parts]) for name in ("hidden", "embedding")}
    return None


def _probe_set(method: Any, pool: Pool, probe_pool: Pool, columns: dict[str, NDArray[np.float32]]) -> ProbeSet:
    import torch

    from ..offline.daar.fitting import split
    from ..offline.daar.probes import apply, entropy

    finite = np.flatnonzero(np.isfinite(columns["hidden"]).all(axis=1) & np.isfinite(columns["embedding"]).all(axis=1))
    hidden, embedding = columns["hidden"][finite], columns["embedding"][finite].astype(np.float64)
    learned, training = method.learned, method._training()
    present = np.flatnonzero([name not in learned.info.get("absent_domains", ()) for name in learned.domains])
    distances = np.stack([((embedding - center) ** 2).sum(axis=1) for center in learned.cluster_centers[present]], 1)
    _, held = split(len(finite), training.validation, method.seed)
    _, probabilities = entropy(apply(learned.domain_probe, torch.from_numpy(np.ascontiguousarray(hidden))))
    rows = getattr(probe_pool.source, "rows", np.full(len(probe_pool), -1))[finite]
    return ProbeSet(rows, hidden, present[distances.argmin(axis=1)], held.numpy(), probabilities)


# --- blocks ---------------------------------------------------------------------------------------------------------


def probe_blocks(selection: Selection, probe_set: ProbeSet | None) -> list[Facts | Heat | Chart | Note]:
    """The blocks on the probe: facts of the fit, confusion, calibration."""
    blocks: list[Facts | Heat | Chart | Note] = [_facts(selection)]
    if probe_set is not None and len(probe_set.held):
        held = probe_set.held
        blocks.append(_confusion(selection, probe_set.labels[held], probe_set.probabilities[held]))
        blocks.append(reliability(probe_set.labels[held], probe_set.probabilities[held]))
        return blocks
    blocks.append(
        Note(
            text="The features of the rows that the probe was tested on are no longer in the cache, so the figure "
            "below shows the probe's own predictions over the pool: which domains it confuses, not whether it is right."
        )
    )
    if (heat := _mean_probabilities(selection)) is not None:
        blocks.append(heat)
    return blocks


def _facts(selection: Selection) -> Facts:
    info = selection.info
    items = []
    if (accuracy := info.get("validation_accuracy")) is not None:
        note = f"on {words.count(info.get('validation_rows', 0))} held-out rows"
        items.append(Fact(label="Probe accuracy", value=words.share(accuracy, 1), note=note))
    if (error := info.get("calibration_error_after")) is not None:
        note = f"before its temperature of {words.decimal(info.get('temperature'), 3)}: "
        note += words.decimal(info.get("calibration_error_before"), 3)
        items.append(Fact(label="Calibration error", value=words.decimal(error, 3), note=note))
    if (explained := info.get("reward_r2")) is not None:
        note = "of the reward's variance, on held-out rows"
        items.append(Fact(label="Reward explained", value=words.share(explained, 1), note=note))
    if (rho := info.get("spearman_diversity_entropy")) is not None:
        note = "rank correlation of the predicted reward and the probe's entropy"
        items.append(Fact(label="Agreement of both rewards", value=words.decimal(rho, 3), note=note))
    return Facts(items=items)


def _confusion(selection: Selection, truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Heat:
    names, predicted = selection.domains, probabilities.argmax(axis=1)
    counts = np.array(
        [[((truth == row) & (predicted == at)).sum() for at in range(len(names))] for row in range(len(names))]
    )
    totals = counts.sum(axis=1)
    values = [
        [float(cell) / total if total else None for cell in line] for line, total in zip(counts, totals, strict=True)
    ]
    titles = [
        [
            f"{int(cell):,} of {int(total):,} rows of {row} are predicted as {column}"
            for column, cell in zip(names, line, strict=True)
        ]
        for row, line, total in zip(names, counts, totals, strict=True)
    ]
    return Heat(
        caption=f"Predictions of the probe for the rows it was not trained on, in percent of each cluster ({len(truth):,} rows)",
        corner="cluster \\ prediction",
        rows=[f"{name} ({int(total):,})" for name, total in zip(names, totals, strict=True)],
        columns=names,
        values=values,
        titles=titles,
        half=True,
    )


def reliability(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Chart:
    """Accuracy of the probe against its confidence; the area of a dot grows with the rows of its bin."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    x, y, size, text = [], [], [], []
    for index in range(BINS):
        inside = bins == index
        rows = int(inside.sum())
        if not rows:
            continue
        x.append(round(float(confidence[inside].mean()), 4))
        y.append(round(float(right[inside].mean()), 4))
        size.append(round(6 + 22 * (rows / len(truth)) ** 0.5, 1))
        text.append(f"{rows:,} rows: accuracy {words.share(y[-1], 1)}, confidence {words.share(x[-1], 1)}")
    series = [
        {"as": "points", "name": "held-out rows", "role": "kept", "x": x, "y": y, "size": size, "text": text}
        | {"template": "%{text}<extra></extra>"}
    ]
    data = {"x": "confidence of the probe", "y": "accuracy", "yshare": True, "diagonal": True}
    title = "Calibration: on the dotted line, confidence equals accuracy"
    return Chart(
        name="calibration",
        title=title,
        label=f"{title}. " + "; ".join(text),
        data=data | {"hover": "closest", "series": series},
        half=True,
    )


def _mean_probabilities(selection: Selection) -> Heat | None:
    """Mean p(domain | row) over the rows of each pseudo-domain."""
    if selection.probabilities is None:
        return None
    names = selection.domains
    values: list[list[float | None]] = []
    for index in range(len(names)):
        inside = selection.labels == index
        mean = selection.probabilities[inside].mean(axis=0) if inside.any() else None
        values.append([None] * len(names) if mean is None else [float(value) for value in mean])
    return Heat(
        caption="Mean probability of each domain over the rows of each pseudo-domain, in percent",
        corner="pseudo-domain \\ p",
        rows=names,
        columns=names,
        values=values,
    )
