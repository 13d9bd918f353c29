"""Replies from a local chat model through `transformers`: batched, left-padded, sampled by each request's own seed.

Every request draws its uniform numbers from a generator of its own, one per token, and a token is the point where the
cumulative probability (float64, likeliest first, cut at top-p) passes its number. So a reply hangs on its request, not
on its batch, up to the rounding of the model's own arithmetic (about 1e-6 in float32; in bfloat16 a near-tie may fall
otherwise). The decoding loop and the cache of keys and values are `generate`'s. Cost: one forward per token and batch.

Shapes: `B` requests of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..data.formats import BadRow, row_failures
from ..errors import UserError
from .backbone import Backbone
from .chat import content_key, end_tokens, load, templated
from .checkpoint import quiet
from .generate import Reply, Request

Made = TypeVar("Made")

TOKEN_BUDGET = {"cpu": 32_768, "mps": 32_768, "cuda": 262_144}
"""Tokens of a batch, prompts and replies at their longest: what their keys and values may take."""
ROWS = {"cpu": 16, "mps": 32, "cuda": 128}
"""Requests of a batch at most: beyond it a step costs as much as the rows do."""
REQUESTS_AT_ONCE = 2048
"""Requests that are sorted by length together."""


@dataclass(eq=False)
class TransformersGenerator:
    """A chat model in a folder or on the hub; a model without a chat template is given the plain text to continue.

    Raises `UserError`, on first use, for what `Backbone` refuses: no folder, no safetensors, no causal language model.

    >>> replies = TransformersGenerator("Qwen/Qwen2.5-0.5B-Instruct").replies(requests)
    """

    model: str
    """A folder, or a hub id."""
    _: KW_ONLY
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; or any torch device."""
    dtype: str = "auto"
    """`auto` is bfloat16 for a 16-bit checkpoint on CUDA, float32 everywhere else."""
    token_budget: int | None = None
    """Tokens of a batch, replies at their longest; None is the device's default."""
    rows: int | None = None
    """Requests of a batch at most; None is the device's default."""
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """What can be told wrong without the weights."""
        self._named(lambda: (self.files.config, self.files.tokenizer))

    @property
    def key(self) -> str:
        """Content hash of the model's files, type of number and of device: another model has another key."""
        return self._once("key", lambda: self._named(lambda: content_key(self.files)))

    @property
    def files(self) -> Backbone:
        """Where the model lies, its configuration and tokenizer; the weights are not loaded through it."""
        return self._once("files", lambda: Backbone(self.model, layer=1, device=self.device, dtype=self.dtype))  # type: ignore[arg-type]

    @property
    def network(self) -> Any:
        """The whole model, in eval mode, on its device."""
        return self._once("network", lambda: self._named(lambda: load(self.files)))

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._made.pop("network", None)

    def _once(self, name: str, make: Callable[[], Made]) -> Made:
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made

    def _named(self, do: Callable[[], Made]) -> Made:
        """`do()`, with the user's word for this model in the errors."""
        try:
            return do()
        except UserError as error:
            raise UserError(str(error).replace("model=", "generator=", 1)) from error

    # --- replies ------------------------------------------------------------------------------------------------------

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies batch by batch, longest prompts first. A prompt that leaves the model no room is refused."""
        source = iter(requests)
        while some := list(islice(source, REQUESTS_AT_ONCE)):
            prompts, failed = self._prompts(some)
            yield from failed
            lost = {reply.key for reply in failed}
            some = [request for request in some if request.key not in lost]
            room = [self._room(len(ids)) for ids in prompts]
            for request, ids, left in zip(some, prompts, room, strict=True):
                if left < 1:
                    said = f"the prompt of {len(ids)} tokens leaves no room in the model's {self._positions} positions"
                    yield Reply(key=request.key, prompt_tokens=len(ids), finish_reason="refused", error=said)
            fits = [index for index, left in enumerate(room) if left >= 1]
            caps = [min(request.max_new_tokens, left) for request, left in zip(some, room, strict=True)]
            for batch in self._batches(fits, [len(ids) for ids in prompts], caps):
                yield from self._answer([some[i] for i in batch], [prompts[i] for i in batch], [caps[i] for i in batch])

    def _prompts(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[Reply]]:
        """The prompts of the requests that can be put to the model, in order, and a refusal for each of the others."""
        prompts, failed = [], []
        for request in requests:
            try:
                prompts.append(self.prompt(request))
            except BadRow as bad:
                failed.append(Reply(key=request.key, finish_reason="refused", error=str(bad)))
        return prompts, failed

    def prompt(self, request: Request) -> list[int]:
        """Token ids of a request's conversation, ready for the reply. Raises `BadRow` where template or tokenizer fail."""
        tokenizer = self._named(lambda: self.files.tokenizer)
        turns = [{"role": role, "content": content} for role, content in request.messages]
        with quiet(), row_failures("tokenizer fails"):
            if getattr(tokenizer, "chat_template", None):
                text, special = templated(tokenizer, turns), False
            else:
                text, special = "\n\n".join(turn["content"] for turn in turns) + "\n", True
            return [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]]

    @property
    def _positions(self) -> int | None:
        found = getattr(self.files.config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def _room(self, prompt: int) -> int:
        """Tokens that a reply may have after a prompt of so many; an empty prompt cannot be continued."""
        if prompt == 0:
            return 0
        return 2**31 if self._positions is None else self._positions - prompt

    def _batches(self, fits: Sequence[int], lengths: Sequence[int], caps: Sequence[int]) -> Iterator[list[int]]:
        """Requests in batches of near-equal prompts and caps; the order is that of lengths alone, so that what is left
        of an interrupted list falls into the same batches."""
        kind = self.files.torch_device.type
        budget = self.token_budget or TOKEN_BUDGET.get(kind, TOKEN_BUDGET["cpu"])
        rows = self.rows or ROWS.get(kind, ROWS["cpu"])
        order = sorted(fits, key=lambda index: (-caps[index], -lengths[index], index))
        batch: list[int] = []
        for index in order:
            longest = max([lengths[index], *(lengths[i] for i in batch)]) + caps[batch[0] if batch else index]
            if batch and (len(batch) == rows or (len(batch) + 1) * longest > budget):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def _answer(self, requests: list[Request], prompts: list[list[int]], caps: list[int]) -> list[Reply]:
        """The replies of one batch."""
        network, tokenizer, device = self.network, self.files.tokenizer, self.files.torch_device
        ends = self._once("ends", lambda: end_tokens(network, tokenizer))
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
        longest = max(len(ids) for ids in prompts)
        ids_BT = torch.full((len(prompts), longest), filler, dtype=torch.long)
        mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BT[row, longest - len(ids) :] = 1
        stopper = _Stop(requests, caps, tokenizer, longest)
        with quiet():
            output_BT = network.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(caps), do_sample=False, eos_token_id=ends or None, pad_token_id=filler
                ),
                logits_processor=LogitsProcessorList([_Draw(requests, caps, longest, device)]),
                stopping_criteria=StoppingCriteriaList([stopper]),
            )
        new_BT = output_BT[:, longest:].tolist()
        return [
            _reply(request, ids, new[:cap], tokenizer, ends)
            for request, ids, new, cap in zip(requests, prompts, new_BT, caps, strict=True)
        ]


def _reply(request: Request, prompt: list[int], new: list[int], tokenizer: Any, ends: list[int]) -> Reply:
    """One row's new tokens as a reply: up to its end token or its stop string."""
    own = next((new[:at] for at, token in enumerate(new) if token in ends), new)
    text = tokenizer.decode(own, skip_special_tokens=True)
    places = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
    while places and own and own[-1] == tokenizer.pad_token_id:  # the rest of the batch went on
        own = own[:-1]
    ended = len(own) < len(new) or bool(places)
    return Reply(
        key=request.key,
        text=text[: min(places)] if places else text,
        prompt_tokens=len(prompt),
        completion_tokens=len(own),
        finish_reason="stop" if ended else "length",
    )


# --- one token per row ------------------------------------------------------------------------------------------------


class _Draw(LogitsProcessor):
    """Leaves one token per row possible: the one that the row's own random number points at."""

    def __init__(self, requests: Sequence[Request], caps: Sequence[int], start: int, device: torch.device) -> None:
        longest = max(caps)
        uniforms = [
            torch.rand(longest, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
            for request in requests
        ]
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.uniform_BT = torch.stack(uniforms).to(device, wide)
        self.temperature_B1 = torch.tensor([[r.temperature] for r in requests], dtype=wide, device=device)
        self.top_p_B1 = torch.tensor([[r.top_p] for r in requests], dtype=wide, device=device)
        self.start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.start
        token_B1 = draw(scores, self.temperature_B1, self.top_p_B1, self.uniform_BT[:, step : step + 1])
        only_BV = torch.full_like(scores, -torch.inf)
        return only_BV.scatter(1, token_B1, 0.0)  # type: ignore[return-value]


def draw(
    logits_BV: torch.Tensor, temperature_B1: torch.Tensor, top_p_B1: torch.Tensor, uniform_B1: torch.Tensor
) -> torch.Tensor:
    """Tokens `(B, 1)` at the rows' uniform numbers: the first, likeliest first, whose cumulative probability passes it.

    Temperature 0 is the likeliest token. Raises `UserError` for logits that are NaN.

    >>> one = torch.ones(1, 1)
    >>> draw(torch.tensor([[0.0, 2.0, 1.0]]), one, one, 0 * one).item()
    1
    """
    sorted_BV, order_BV = logits_BV.to(uniform_B1.dtype).sort(dim=1, descending=True, stable=True)
    if not bool(torch.isfinite(sorted_BV[:, 0]).all()):
        raise UserError("the generator's logits are NaN or infinite; try dtype=float32, or another generator")
    greedy_B1 = temperature_B1 == 0
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / torch.where(greedy_B1, 1.0, temperature_B1)
    p_BV = scaled_BV.softmax(dim=1)
    before_BV = p_BV.cumsum(dim=1) - p_BV
    kept_BV = torch.where(before_BV < top_p_B1, p_BV, 0.0)  # the likeliest always stays: nothing is before it
    mass_BV = kept_BV.cumsum(dim=1)
    place_B1 = (mass_BV <= uniform_B1 * mass_BV[:, -1:]).sum(dim=1, keepdim=True)
    last_B1 = (kept_BV > 0).sum(dim=1, keepdim=True) - 1
    place_B1 = torch.where(greedy_B1, 0, torch.minimum(place_B1, last_B1))
    return order_BV.gather(1, place_B1)


class _Stop(StoppingCriteria):
    """Ends a row at its own cap or at one of its stop strings."""

    def __init__(self, requests: Sequence[Request], caps: Sequence[int], tokenizer: Any, start: int) -> None:
        self.stops, self.caps = [request.stop for request in requests], list(caps)
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        made = input_ids.shape[1] - self.start
        done = [
            made >= cap or self._met(stops, input_ids[row])
            for row, (stops, cap) in enumerate(zip(self.stops, self.caps, strict=True))
        ]
        return torch.tensor(done, device=input_ids.device)  # type: ignore[return-value]

    def _met(self, stops: tuple[str, ...], ids_T: torch.Tensor) -> bool:
        """Is a stop string in the last tokens? Every token holds at least a byte, so a window of its bytes does."""
        if not stops:
            return False
        window = max(len(stop.encode()) for stop in stops) + 8
        tail = self.tokenizer.decode(ids_T[max(self.start, len(ids_T) - window) :].tolist(), skip_special_tokens=True)
        return any(stop in tail for stop in stops)
