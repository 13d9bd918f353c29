"""Oumi: sift every batch through a registry file, which Oumi imports before it trains.

    python -m siftune.integrations.oumi > siftune-deps.txt
    SIFTUNE_CONFIG=sift.yaml OUMI_EXTRA_DEPS_FILE=siftune-deps.txt oumi train -c train.yaml

`sift.yaml` holds `method`, `keep` and the method's other options. `python -m siftune.integrations.oumi` prints the line of the
registry file: the path of a Python file that Oumi imports. Oumi builds a `trl.SFTTrainer`, which is sifted when it trains.
"""

from __future__ import annotations

from pathlib import Path

from ..output import say
from .every_trainer import install
from .request import Request

REGISTERED = Path(__file__).parent / "files" / "siftune_oumi.py"
"""The file that a line of OUMI_EXTRA_DEPS_FILE names."""


def register() -> None:
    """Sift every trainer of this process. Raises `UserError` for an invalid SIFTUNE_CONFIG."""
    install(Request.from_environment())


if __name__ == "__main__":
    say(REGISTERED)
