"""ms-swift: sift every batch by a callback of its own plugin interface.

    SIFTUNE_CONFIG=sift.yaml swift sft --model MODEL --dataset DATA --callbacks siftune \\
        --external_plugins "$(python -m siftune.integrations.swift)"

`sift.yaml` holds `method`, `keep` and the method's other options. `python -m siftune.integrations.swift` prints the path of the
plugin file. ms-swift sets some of its trainer's attributes after the callback's `on_init_end`, so the selector is
attached when the complete trainer trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import say
from .every_trainer import install
from .request import Request

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

PLUGIN = Path(__file__).parent / "files" / "siftune_swift.py"
"""The file for `--external_plugins`."""
NAME = "siftune"
"""The name for `--callbacks`."""


def register() -> None:
    """Add the callback `siftune` to ms-swift's table. Raises `UserError` for an invalid SIFTUNE_CONFIG."""
    from swift.callbacks import TrainerCallback, callbacks_map

    request = Request.from_environment()

    class SiftuneCallback(TrainerCallback):
        """Sifts the trainer that ms-swift builds, once it trains."""

        def on_init_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            install(request)

    callbacks_map[NAME] = SiftuneCallback


if __name__ == "__main__":
    say(PLUGIN)
