"""Sift every trainer of this process, whoever builds it: `Trainer.train` of `transformers` attaches a selector first.

The wrapper is on the base class, below every override of a framework's own, so a framework's `train` runs as ever and
reaches it through `super().train`. Trainers whose batches are not rows to imitate (preferences, rewards, generated answers,
classification) are left alone. Every process prints one line for each trainer. Cost: nothing until a trainer trains.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..output import say
from .request import Request

if TYPE_CHECKING:
    from transformers import Trainer

_INSTALLED = "siftune_request"


def install_from_environment(trainer_class: type[Trainer]) -> None:
    """As `install`, with the request that the environment holds. An invalid one ends the process with its sentence."""
    try:
        install(Request.from_environment(), trainer_class)
    except UserError as error:
        say(f"siftune: {error}", error=True)
        raise SystemExit(2) from error


def install(request: Request, trainer_class: type[Trainer] | None = None) -> None:
    """From now on `train` of every `transformers.Trainer` in this process attaches the requested selector first.

    A second call replaces the request.

    >>> install(Request(selector={"method": "uds", "keep": "1/8"}))
    """
    if trainer_class is None:
        from transformers import Trainer

        trainer_class = Trainer
    installed = hasattr(trainer_class, _INSTALLED)
    setattr(trainer_class, _INSTALLED, request)
    if installed:
        return
    original = trainer_class.train

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _train(self, functools.partial(original, self), args, kwargs)

    trainer_class.train = train  # type: ignore[method-assign]


def _train(trainer: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Trainer.train` of one trainer: attach unless it is another kind of trainer or has a selector already."""
    from ..hook.attach import Attachment

    request: Request = getattr(type(trainer), _INSTALLED)
    attachment = getattr(trainer, "siftune_attachment", None)
    if attachment is not None and getattr(trainer, "_siftune_request", None) is request:
        return original(*args, **kwargs)  # trains once more, through the attachment
    if reason := _reason_to_leave(trainer, request, attachment):
        _report(request, "left", f"{_where(trainer)}: {type(trainer).__name__} is left alone: {reason}")
        return original(*args, **kwargs)
    try:
        attachment = _attached(trainer, request)
        assert isinstance(attachment, Attachment)
        if request.dry_run:
            _dry_run(trainer, attachment)
        return attachment.train_through(original, *args, **kwargs)
    except UserError as error:
        _report(request, "refused", " ".join(str(error).split()), printed="")
        say(f"siftune: {error}", error=True)
        raise SystemExit(2) from error


def _reason_to_leave(trainer: Any, request: Request, attachment: Any) -> str | None:
    """Why a trainer is not sifted; None where it is."""
    from ..hook.checks import other_task

    names = [cls.__name__ for cls in type(trainer).__mro__]
    if request.only_class is not None and request.only_class not in names:
        return f"only {request.only_class} is to be sifted"
    if attachment is not None:
        return f"it has the selector {attachment.selector.name} already"
    return other_task(trainer)


def _attached(trainer: Any, request: Request) -> Any:
    from ..hook.attach import attach
    from ..hook.selector import selector_of

    selector = selector_of(request.selector)
    attachment = attach(
        trainer, selector, allow_fresh_selector=request.allow_fresh_selector, ledger=not request.dry_run
    )
    trainer._siftune_request = request
    _report(request, "attached", f"{_where(trainer)}: {selector.name} is attached to {type(trainer).__name__}")
    return attachment


def _dry_run(trainer: Any, attachment: Any) -> None:
    """Check the first batch, print what would be done, and end this process as if it had succeeded."""
    from ..hook.checks import check_batch

    for batch in trainer.get_train_dataloader():
        check_batch(batch, trainer, is_row=attachment.is_row)
        break
    selector: Mapping[str, Any] = getattr(type(trainer), _INSTALLED).selector
    options = ", ".join(f"{name}={value!r}" for name, value in selector.items() if name != "method")
    if trainer.is_world_process_zero():
        say(
            f"siftune: dry run: {attachment.selector.name} ({options}) accepts the first batch; nothing was trained",
            error=True,
        )
    raise SystemExit(0)


def _where(trainer: Any) -> str:
    """The process, and its rank where there are several."""
    args = trainer.args
    rank = f" (rank {args.process_index} of {args.world_size})" if args.world_size > 1 else ""
    return f"process {os.getpid()}{rank}"


def _report(request: Request, outcome: str, line: str, *, printed: str | None = None) -> None:
    """Print the line of this process, and leave it for `siftune run`."""
    if printed is None:
        say(f"siftune: {line}", error=True)
    if request.reports is not None and os.path.isdir(request.reports):  # not on another node
        handle, _ = tempfile.mkstemp(prefix=f"{outcome}-", suffix=".json", dir=request.reports)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"outcome": outcome, "line": line}, file)
