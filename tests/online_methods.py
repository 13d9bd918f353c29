"""What each online method needs to be made in a test, beside `keep`."""

from __future__ import annotations

from typing import Any

from tests.reference_uds import tiny_batch
from tests.tiny import tiny_model


def needs(name: str, *, width: int = 32) -> dict[str, Any]:
    """Options of the method `name` that have no default. Validation rows are not among any test's candidates."""
    if name in ("rho-loss", "token-rho", "token-self"):
        return {"reference": tiny_model("llama", layers=1, width=width, seed=7)}
    if name == "greats":
        return {"validation": tiny_batch([9, 14, 5], seed=91)}
    return {}
