"""Base of every judged method: the checks of its options, its task, its preview (`--dry-run`), its cost.

A method is a dataclass with the fields below and a `Form` (see `judge_task`); `alpagasus` and `instag` are the two
kinds. Higher is kept. Cost: a chat model's reply per row; a dry run reads a sample of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import cache_folder, hash_json
from ..models.address import is_server, scheme_error
from ..models.generate import Generator, check_generator, open_generator
from ..models.parameters import check_request
from ..models.server_errors import MOST_REFUSALS
from ..records import Pool, ShardTask
from .base import OfflineMethod
from .draw import draw
from .judge_task import Asking, Form, JudgeTask, cost, filled, spent
from .prompts import Prompt, read_prompt

SAMPLE = 256
"""Rows that an estimate reads."""
BYTES_A_TOKEN = 4
"""Approximate, of UTF-8 text in current tokenizers; a dry run loads none."""


class Judged(OfflineMethod):
    """Base of the judged methods. `judge` is a model's name, or in Python any `Generator`."""

    form: ClassVar[Form]

    judge: str | Generator | None
    judge_url: str | None
    prompt: str | None
    retries: int
    temperature: float
    max_new_tokens: int
    concurrency: int
    unanswered: Literal["stop", "skip"]
    ask_again: Literal["refused"] | None
    request: dict[str, object] | None
    price: dict[str, float] | None
    seed: int
    dtype: Literal["auto", "float32", "bfloat16"]
    device: str

    # --- checks -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check settings, prompt file and judge's name before any request is sent. Raises `UserError`."""
        for name, least in (("retries", 0), ("max_new_tokens", 1), ("concurrency", 1)):
            if (value_set := getattr(self, name)) < least:
                raise UserError(f"{name}={value_set} is too few; set it to at least {least}")
        if not 0 <= self.temperature <= 5:
            raise UserError(f"temperature={self.temperature:g} is not between 0 and 5")
        if self.unanswered not in ("stop", "skip"):
            raise UserError(f"unanswered={self.unanswered!r} is not known; use stop or skip")
        for name, value in (self.price or {}).items():
            if name not in ("prompt", "completion") or value < 0:
                raise UserError(f"price={name}={value:g} is not a price; use prompt=X,completion=Y per million tokens")
        if self.ask_again not in (None, "refused"):
            raise UserError(f"ask_again={self.ask_again!r} is not known; use refused, or leave it out")
        self._prompt()
        judge = self._judge()
        if self.request is not None:
            check_request(self.request)
            if not (isinstance(judge, str) and is_server(judge)):
                raise UserError(
                    "request= is for a judge on a server; set judge_url=http://HOST:PORT/v1, or leave it out"
                )
        if isinstance(judge, str):
            try:
                check_generator(judge)
            except UserError as error:
                raise UserError(str(error).replace("generator=", "judge=", 1)) from error

    def inputs(self) -> dict[str, str]:
        """Content hashes of the prompt and of a local judge, for a run's identity; a server is identified by its address."""
        hashes = {"prompt": hash_json([self.form.name, self.form.version, self._prompt().text])}
        judge = self._judge()
        if not isinstance(judge, str):
            hashes["judge"] = judge.key
        elif not is_server(judge):
            hashes["judge"] = open_generator(judge, device=self.device, dtype=self.dtype).key
        return hashes

    def _prompt(self) -> Prompt:
        return read_prompt(self.prompt, self.form.words, answer=self.form.sees_answer)

    def _judge(self) -> str | Generator:
        """The judge as `open_generator` takes it. Raises `UserError` when none is set, or two."""
        if self.judge_url is None:
            if self.judge is None:
                raise UserError(
                    f"{self.name} needs a chat model as judge; set judge=MODEL (a folder or hub id) or "
                    "judge_url=http://HOST:PORT/v1"
                )
            return self.judge
        if not is_server(self.judge_url):
            if "://" not in self.judge_url:
                raise scheme_error("judge_url", self.judge_url)
            raise UserError(f"judge_url={self.judge_url!r} is not a server's address; use http://HOST:PORT/v1")
        if self.judge is None:
            return self.judge_url
        if not isinstance(self.judge, str) or is_server(self.judge) or "#" in self.judge_url:
            raise UserError("judge and judge_url name two judges; with judge_url, judge is the model's name there")
        return f"{self.judge_url}#{self.judge}"

    # --- the task -----------------------------------------------------------------------------------------------------

    def shard_task(self, pool: Pool) -> ShardTask:
        self._need_questions(pool)
        task = self._task()
        task.ask_again = None if self.ask_again is None else set()
        task.report_rows = getattr(getattr(self.engine, "progress", None), "advance", None)
        return task

    def _need_questions(self, pool: Pool) -> None:
        if pool.format == "text":
            raise UserError(f"{self.name} judges a question, and rows of plain text have none; use another method")

    def _task(self) -> JudgeTask:
        """One task per method and settings, so that a judge is opened once."""
        self.check()
        judge = self._judge()
        settings: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if isinstance(judge, str) and is_server(judge):
            settings = {"concurrency": self.concurrency, "request": self.request or {}}
            if self.unanswered == "skip":
                settings["equal_refusals"] = MOST_REFUSALS
        asking = Asking(
            retries=self.retries,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            unanswered=self.unanswered,
            seed=self.seed,
        )
        task = JudgeTask(self.form, self._prompt(), judge, asking, cache_folder(self.cache) / "replies", settings)
        cached: JudgeTask | None = self.__dict__.get("_made")
        names = ("prompt", "judge", "asking", "folder", "settings")
        if cached is None or any(getattr(cached, name) != getattr(task, name) for name in names):
            cached = self.__dict__["_made"] = task
        return cached

    # --- preview and cost ---------------------------------------------------------------------------------------------

    def preview(self, pool: Pool) -> dict[str, Any]:
        """Preview: two filled prompts, requests, estimated tokens and cost. Nothing is sent or loaded."""
        self._need_questions(pool)
        prompt = self._prompt()
        sample = pool.read(draw(pool, SAMPLE, seed=self.seed, purpose=f"{self.name} preview").tolist())
        texts = [filled(prompt, row) for row in sample if row.question.strip()]
        share = len(texts) / max(1, len(sample))
        size = float(np.mean([len(text.encode("utf-8", "surrogatepass")) for text in texts])) if texts else 0.0
        requests = round(share * len(pool.eligible))
        prompt_tokens = round(requests * size / BYTES_A_TOKEN)
        written = requests * min(self.form.reply_tokens, self.max_new_tokens)
        return {
            "prompts": texts[:2],
            "requests": requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": written,
            "completion_tokens_at_most": requests * self.max_new_tokens,
            "cost": cost(self.price, prompt_tokens, written),
            "cost_at_most": cost(self.price, prompt_tokens, requests * self.max_new_tokens),
            "estimate": f"{BYTES_A_TOKEN} bytes a token over {len(texts)} rows, {self.form.reply_tokens} tokens a "
            "reply; tries after the first come on top",
        }

    def judged_info(self, columns: Mapping[str, NDArray[Any]], reasons: Mapping[int, str]) -> dict[str, Any]:
        """Counts and cost of the pool's replies, from this and earlier runs, and the requests of this run."""
        task: JudgeTask = self._task()
        task.release()
        total = spent(columns)
        kinds = [reason.split(":")[0] for reason in reasons.values()]
        counts = task.counts
        return {
            "judge": {
                **total,
                "cost": cost(self.price, total["prompt_tokens"], total["completion_tokens"]),
                "unreadable": kinds.count("unreadable reply"),
                "refused": kinds.count("refused by the judge"),
                "unanswered": kinds.count("no reply"),
                "asked_now": counts.sent,
                "retries_now": counts.retries,
                "prompt_tokens_now": counts.prompt_tokens,
                "completion_tokens_now": counts.completion_tokens,
                "found_in_journal": counts.reused,
                "cost_now": cost(self.price, counts.prompt_tokens, counts.completion_tokens),
                "parameters_left_out": task.left_out,
                "replies": str(task.journal),
            }
        }
