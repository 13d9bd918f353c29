"""Axolotl: select the rows of every batch, configured in the YAML file alone, through Axolotl's plugin interface.

    siftune:
      method: uds
      keep: 1/8

The plugin is registered in the entry-point group `axolotl.plugins`, which Axolotl 0.21 reads by itself; an older Axolotl needs its
name in the YAML file too:

    plugins:
      - siftune.integrations.axolotl.SiftunePlugin

Axolotl creates its trainer, a `transformers.Trainer`, and passes it to every plugin; this plugin attaches the selector to
it. Importable without Axolotl, whose base class only adds hooks that do nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hook.attach import attach
from ..hook.selector import selector_of

if TYPE_CHECKING:
    from transformers import Trainer

    _Base: Any = object
else:
    try:
        from axolotl.integrations.base import BasePlugin as _Base
    except ImportError:
        _Base = object
    try:
        from pydantic import BaseModel as _Model
    except ImportError:
        _Model = object

    class SiftuneArgs(_Model):
        """The keys that Axolotl's own check of the YAML file accepts: one mapping under `siftune`."""

        siftune: dict[str, Any] | None = None


class SiftunePlugin(_Base):
    """Attaches the selector that the YAML file's `siftune:` section describes; without the section it does nothing."""

    def get_input_args(self) -> str:
        """The schema of the plugin's section, by dotted name."""
        return f"{__name__}.SiftuneArgs"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Axolotl calls this once the trainer exists, before it trains."""
        section = cfg.get("siftune") if hasattr(cfg, "get") else getattr(cfg, "siftune", None)
        if section:
            options = dict(section)
            allow_fresh = bool(options.pop("allow_fresh_selector", False))
            attach(trainer, selector_of(options), allow_fresh_selector=allow_fresh)
