"""The result of a fit of DaaR, in memory and in a folder: both probes, the centroids, the domains' names, the facts.

A folder holds `domain_probe.safetensors`, `reward_probe.safetensors`, `centroids.safetensors` and, written last,
`daar.json`. No pickle. Cost: the probes' size, about 20 D^2 bytes each.

Axes: `K` domains, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ...data.protect import RUN, refuse_foreign
from ...errors import UserError
from ...files import atomic_path, read_json, write_json
from .probes import Probe

VERSION = 1
FACTS = "daar.json"
PARTS = ("domain_probe", "reward_probe", "centroids")
"""One safetensors file each."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned:
    """Everything that scoring needs beside the model."""

    domains: tuple[str, ...]
    domain_probe: Probe
    reward_probe: Probe
    seed_centroids: NDArray[np.float64]
    """Shape `(K, D)`, mean e(x) of each domain's seed rows."""
    cluster_centers: NDArray[np.float64]
    """Shape `(K, D)`, as updated by k-means."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts of the fit, JSON-able."""

    @cached_property
    def key(self) -> str:
        """Content hash of the probes and the domains' names: the fit's part of a shard's key."""
        digest = blake2b("\0".join(("daar", str(VERSION), *self.domains)).encode(), digest_size=16)
        for name, values in sorted(self.arrays().items()):
            digest.update(f"|{name}|{values.dtype.str}|{values.shape}|".encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array, named `part.array`."""
        arrays = {f"centroids.{name}": getattr(self, name) for name in ("seed_centroids", "cluster_centers")}
        for part, probe in (("domain_probe", self.domain_probe), ("reward_probe", self.reward_probe)):
            for name, tensor in probe.state_dict().items():
                arrays[f"{part}.{name}"] = tensor.detach().cpu().numpy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> Self:
        """The inverse of `arrays`; `facts` holds `domains` and `info`."""
        return cls(
            domains=tuple(facts["domains"]),
            domain_probe=_probe(arrays, "domain_probe"),
            reward_probe=_probe(arrays, "reward_probe"),
            seed_centroids=arrays["centroids.seed_centroids"],
            cluster_centers=arrays["centroids.cluster_centers"],
            info=facts["info"],
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What `from_arrays` needs beside the arrays."""
        return {"domains": list(self.domains), "info": dict(self.info)}

    def save(self, folder: str | Path, settings: Mapping[str, Any]) -> Path:
        """Write the folder; `settings` are the method's own, for `load`. Raises `UserError` for the user's own files
        there."""
        folder = Path(folder)
        names = [FACTS, *(f"{part}.safetensors" for part in PARTS)]
        refuse_foreign(folder, names, {FACTS: ("version", "key", "settings"), **RUN})
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self.arrays()
        for part in PARTS:
            part_arrays = {
                name.removeprefix(f"{part}."): a for name, a in arrays.items() if name.startswith(f"{part}.")
            }
            with atomic_path(folder / f"{part}.safetensors") as temporary:
                temporary.write_bytes(save({name: np.ascontiguousarray(a) for name, a in part_arrays.items()}))
        write_json(folder / FACTS, {"version": VERSION, **self.facts, "key": self.key, "settings": dict(settings)})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> tuple[Self, dict[str, Any]]:
        """What `save` wrote, and the settings. Raises `UserError` when the folder does not hold a complete fit."""
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder} holds no {FACTS}; pass the run folder of a finished `siftune select daar`")
        facts = read_json(folder / FACTS)
        if facts.get("version") != VERSION:
            raise UserError(f"{folder / FACTS} has version {facts.get('version')!r}, not {VERSION}; fit it again")
        arrays: dict[str, NDArray[Any]] = {}
        for part in PARTS:
            path = folder / f"{part}.safetensors"
            try:
                arrays |= {f"{part}.{name}": values for name, values in load(path.read_bytes()).items()}
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is missing or damaged ({error}); fit it again") from error
        learned = cls.from_arrays(arrays, facts)
        if learned.key != facts["key"]:
            raise UserError(f"the files in {folder} are from different fits; fit it again")
        return learned, facts["settings"]


def _probe(arrays: Mapping[str, NDArray[Any]], part: str) -> Probe:
    prefix = f"{part}."
    # A copy: arrays from a file are read-only.
    tensors = {n.removeprefix(prefix): torch.from_numpy(a.copy()) for n, a in arrays.items() if n.startswith(prefix)}
    probe = Probe(len(tensors["input_mean"]), len(tensors["output_scale"]))
    probe.load_state_dict(tensors)
    return probe
