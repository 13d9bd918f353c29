"""Sift, then tune: choose which rows a language model is fine-tuned on.

The data's way, top to bottom (a folder or module imports only from those above it):

    redaction      secrets masked in all that is written or printed
    errors         the errors of a user's input
    output         everything that is printed
    screen         consoles for tables and summaries
    progress       what a long command is doing
    files          atomic files and locks
    file_keys      what a file of a user's may name
    yaml_io        YAML, read strictly
    budget         from scores to the rows that are kept
    records        what crosses folders
    registry       every method by name
    data/          text in and out: files to a pool of rows, chosen rows to a file
    models/        first layers as feature extractor, LM head as a linear map, rows to tokens, content-addressed store
    engines/       where it runs: one process, several, or a Ray cluster
    offline/       score the pool once (DaaR and what it is compared with)
    online/        score every batch (UDS and what it is compared with)
    hook/          the selection inside a live Trainer: attach, batches, ranks, checkpoints, the ledger
    sft/           fine-tuning by a recipe, with trl and peft
    evaluation/    lm-eval suites, task files, held-out loss
    warmup/        methods that score the pool after a short fine-tuning (target-loss, less)
    reports/       figures, and the one page of a run
    demo/          embedded corpus and tiny model
    runs/          the commands as functions, each with a run folder
    study/         methods x seeds at equal budget
    testing        the contract suite, importable by other packages
    integrations/  plugins for other training frameworks
    cli/           the command line, one file a command

Public names are resolved on first use, so `import siftune` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_PUBLIC = {
    "load_pool": "siftune.data.load",
    "Pool": "siftune.records",
    "Scores": "siftune.records",
    "Subset": "siftune.records",
    "RowScores": "siftune.records",
    "Kept": "siftune.records",
    "UserError": "siftune.errors",
    "register": "siftune.registry",
    "DaaR": "siftune.offline.daar.selector",
    "UDS": "siftune.online.uds",
    "MaxLoss": "siftune.online.maxloss",
    "MaxGrad": "siftune.online.maxgrad",
    "RhoLoss": "siftune.online.rho_loss",
    "Greats": "siftune.online.greats",
    "TokenRho": "siftune.online.token_masks",
    "TokenSelf": "siftune.online.token_masks",
    "Regular": "siftune.online.simple",
    "attach": "siftune.hook.attach",
    "detach": "siftune.hook.attach",
    "reference_losses": "siftune.sft.reference_losses",
    "Recipe": "siftune.sft.recipe",
    "build_trainer": "siftune.sft.trainer",
    "OfflineMethod": "siftune.offline.base",
    "OnlineMethod": "siftune.online.base",
    "ModelScored": "siftune.online.base",
    "Measured": "siftune.online.base",
    "Shard": "siftune.records",
    "ShardResult": "siftune.records",
    "ShardTask": "siftune.records",
    "SelectOptions": "siftune.runs.options",
    "KeepOptions": "siftune.runs.options",
    "PlanOptions": "siftune.runs.options",
    "TuneOptions": "siftune.runs.train",
    "Study": "siftune.study.spec",
    "read_study": "siftune.study.spec",
    "select": "siftune.runs.select",
    "keep": "siftune.runs.select:recut",
    "plan": "siftune.runs.plan",
    "train": "siftune.runs.train:tune",
    "evaluate": "siftune.runs.evaluate",
    "compare": "siftune.study.compare",
    "report": "siftune.reports.report:write",
    "open_ledger": "siftune.reports.run_ledger",
}
"""Where each public name is defined; `module:name` where it has another name there."""

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604

if TYPE_CHECKING:
    from .data.load import load_pool as load_pool
    from .errors import UserError as UserError
    from .hook.attach import attach as attach
    from .hook.attach import detach as detach
    from .offline.base import OfflineMethod as OfflineMethod
    from .offline.daar.selector import DaaR as DaaR
    from .online.base import Measured as Measured
    from .online.base import ModelScored as ModelScored
    from .online.base import OnlineMethod as OnlineMethod
    from .online.greats import Greats as Greats
    from .online.maxgrad import MaxGrad as MaxGrad
    from .online.maxloss import MaxLoss as MaxLoss
    from .online.rho_loss import RhoLoss as RhoLoss
    from .online.simple import Regular as Regular
    from .online.token_masks import TokenRho as TokenRho
    from .online.token_masks import TokenSelf as TokenSelf
    from .online.uds import UDS as UDS
    from .records import Kept as Kept
    from .records import Pool as Pool
    from .records import RowScores as RowScores
    from .records import Scores as Scores
    from .records import Shard as Shard
    from .records import ShardResult as ShardResult
    from .records import ShardTask as ShardTask
    from .records import Subset as Subset
    from .registry import register as register
    from .reports.report import write as report  # noqa: F401
    from .reports.run_ledger import open_ledger as open_ledger
    from .runs.evaluate import evaluate as evaluate
    from .runs.options import KeepOptions as KeepOptions
    from .runs.options import PlanOptions as PlanOptions
    from .runs.options import SelectOptions as SelectOptions
    from .runs.plan import plan as plan
    from .runs.select import recut as keep  # noqa: F401
    from .runs.select import select as select
    from .runs.train import TuneOptions as TuneOptions
    from .runs.train import tune as train  # noqa: F401
    from .sft.recipe import Recipe as Recipe
    from .sft.reference_losses import reference_losses as reference_losses
    from .sft.trainer import build_trainer as build_trainer
    from .study.compare import compare as compare
    from .study.spec import Study as Study
    from .study.spec import read_study as read_study


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"siftune has no {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    module, _, defined_as = _PUBLIC[name].partition(":")
    return getattr(import_module(module), defined_as or name)


def __dir__() -> list[str]:
    return sorted(__all__)
