"""Replies from a local chat model through `transformers`: batched, left-padded, sampled by each request's own seed.

Every request draws its uniform numbers from a generator of its own, one per token, and a token is the point where the
cumulative probability (float64, likeliest first, cut at top-p) passes its number. So a reply depends on its request,
not on its batch, up to the rounding of the model's own arithmetic (about 1e-6 in float32; in bfloat16 a near-tie may
fall otherwise). The decoding loop and the cache of keys and values are `generate`'s; a row whose reply has ended leaves
the batch and its reply is yielded at once. Cost: one forward per token and batch.

Shapes: `B` requests of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..data.formats import BadRow, row_failures
from ..errors import UserError
from .backbone import Backbone, DType
from .chat import content_key, end_tokens, load, templated
from .generate import Reply, Request
from .grouping import consecutive_groups
from .load import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result = TypeVar("Result")

TOKEN_BUDGET = {"cpu": 32_768, "mps": 32_768, "cuda": 262_144}
"""Tokens of a batch, prompts and replies at their longest: the memory bound of their keys and values."""
ROWS = {"cpu": 16, "mps": 32, "cuda": 128}
"""Requests of a batch at most: beyond it a step costs as much as the rows do."""
CHECK_EVERY = 8
"""Tokens of a reply after which its request's end rule is applied again."""
LIKELIEST = 1024
"""Tokens that are sorted to draw one, unless the nucleus holds more: sorting a large vocabulary costs more than a small
model's forward."""
REQUESTS_AT_ONCE = 2048
"""Requests that are sorted by length together."""


@dataclass(eq=False)
class TransformersGenerator:
    """A chat model in a folder or on the hub; a model without a chat template continues the plain text.

    Raises `UserError`, on first use, for everything that `Backbone` refuses: no folder, no safetensors, no causal
    language model.

    >>> replies = TransformersGenerator("Qwen/Qwen2.5-0.5B-Instruct").replies(requests)
    """

    model: str
    """A folder, or a hub id."""
    _: KW_ONLY
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; or any torch device."""
    dtype: DType = "auto"
    """`auto` is bfloat16 for a 16-bit checkpoint on CUDA, float32 everywhere else."""
    token_budget: int | None = None
    """Tokens of a batch, replies at their longest; None is the device's default."""
    rows: int | None = None
    """Requests of a batch at most; None is the device's default."""
    _cached: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Check everything that does not need the weights. Raises `UserError`."""
        self._named(lambda: (self.files.config, self.files.tokenizer))

    @property
    def key(self) -> str:
        """Content hash of the model's files, type of number and of device: another model has another key."""
        return self._once("key", lambda: self._named(lambda: content_key(self.files)))

    @property
    def files(self) -> Backbone:
        """The model's folder, configuration and tokenizer; the weights are not loaded through it."""
        return self._once("files", lambda: Backbone(self.model, layer=1, device=self.device, dtype=self.dtype))

    @property
    def network(self) -> PreTrainedModel:
        """The complete model, in eval mode, on its device."""
        return self._once("network", lambda: self._named(lambda: load(self.files)))

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self._cached.pop("network", None)

    def _once(self, name: str, make: Callable[[], Result]) -> Result:
        if name not in self._cached:
            self._cached[name] = make()
        result: Result = self._cached[name]
        return result

    def _named(self, do: Callable[[], Result]) -> Result:
        """`do()`, with the option's name `generator` in the errors."""
        try:
            return do()
        except UserError as error:
            raise UserError(str(error).replace("model=", "generator=", 1)) from error

    # --- replies ------------------------------------------------------------------------------------------------------

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies batch by batch, longest prompts first, each as it ends. A prompt that leaves no tokens for a reply is
        refused."""
        source = iter(requests)
        while chunk := list(islice(source, REQUESTS_AT_ONCE)):
            prompts, failed = self._prompts(chunk)
            yield from failed
            refused = {reply.key for reply in failed}
            chunk = [request for request in chunk if request.key not in refused]
            rooms = [self._room(len(ids)) for ids in prompts]
            for request, ids, remaining in zip(chunk, prompts, rooms, strict=True):
                if remaining < 1:
                    message = f"the prompt of {len(ids)} tokens leaves no token for a reply in the model's {self._positions} positions"
                    yield Reply(key=request.key, prompt_tokens=len(ids), finish_reason="refused", error=message)
            fits = [index for index, remaining in enumerate(rooms) if remaining >= 1]
            caps = [min(request.max_new_tokens, remaining) for request, remaining in zip(chunk, rooms, strict=True)]
            for batch in self._batches(fits, [len(ids) for ids in prompts], caps):
                yield from self._answer(
                    [chunk[i] for i in batch], [prompts[i] for i in batch], [caps[i] for i in batch]
                )

    def _prompts(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[Reply]]:
        """The prompts of the requests that can be sent to the model, in order, and a refusal for each of the others."""
        prompts, failed = [], []
        for request in requests:
            try:
                prompts.append(self.prompt(request))
            except BadRow as bad:
                failed.append(Reply(key=request.key, finish_reason="refused", error=str(bad)))
        return prompts, failed

    def prompt(self, request: Request) -> list[int]:
        """Token ids of a request's conversation, ready for the reply. Raises `BadRow` where template or tokenizer
        fail."""
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
        positions = getattr(self.files.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def _room(self, prompt: int) -> int:
        """Tokens that a reply may have after a prompt of so many; an empty prompt cannot be continued."""
        if prompt == 0:
            return 0
        return 2**31 if self._positions is None else self._positions - prompt

    def _batches(self, fits: Sequence[int], lengths: Sequence[int], caps: Sequence[int]) -> Iterator[list[int]]:
        """Requests in batches of near-equal caps and prompts, which pad least; no reply depends on the order."""
        kind = self.files.torch_device.type
        budget = self.token_budget or TOKEN_BUDGET.get(kind, TOKEN_BUDGET["cpu"])
        rows = self.rows or ROWS.get(kind, ROWS["cpu"])
        order = sorted(fits, key=lambda index: (-caps[index], -lengths[index], index))

        def fits_batch(batch: list[int], index: int) -> bool:
            longest = max(lengths[member] for member in (*batch, index)) + caps[batch[0]]
            return len(batch) < rows and (len(batch) + 1) * longest <= budget

        yield from consecutive_groups(order, fits_batch)

    @torch.no_grad()
    def _answer(self, requests: list[Request], prompts: list[list[int]], caps: list[int]) -> Iterator[Reply]:
        """The replies of one batch, each as soon as it ends; `generate` then continues with the other rows alone."""
        network: Any = self.network
        tokenizer, device = self.files.tokenizer, self.files.torch_device
        ends = self._once("ends", lambda: end_tokens(network, tokenizer))
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
        ids_BT, mask_BT = _left_padded(prompts, filler, device)
        start, cache, remaining = ids_BT.shape[1], None, list(range(len(requests)))
        while remaining:
            batch, longest = [requests[i] for i in remaining], max(caps[i] for i in remaining)
            stop = _Stop(batch, [caps[i] for i in remaining], tokenizer, start, ends)
            with quiet():
                output = network.generate(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    **({} if cache is None else {"past_key_values": cache}),
                    generation_config=GenerationConfig(
                        max_new_tokens=start + longest - ids_BT.shape[1],
                        do_sample=False,
                        eos_token_id=ends or None,
                        pad_token_id=filler,
                        return_dict_in_generate=True,
                    ),
                    logits_processor=LogitsProcessorList([_Draw(batch, longest, start, device)]),
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
            open_rows = [row for row in range(len(remaining)) if row not in stop.replies]
            for row, reply in stop.replies.items():
                yield replace(reply, prompt_tokens=len(prompts[remaining[row]]))
            kept = torch.tensor(open_rows, dtype=torch.long, device=device)
            ids_BT, cache = output.sequences[kept], _rows_of_cache(output, kept)
            mask_BT = torch.cat([mask_BT[kept], mask_BT.new_ones(len(kept), ids_BT.shape[1] - mask_BT.shape[1])], dim=1)
            remaining = [remaining[row] for row in open_rows]


def _left_padded(
    prompts: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `(B, T)` of prompts that end in the same column."""
    longest = max(len(ids) for ids in prompts)
    ids_BT = torch.full((len(prompts), longest), filler, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, ids in enumerate(prompts):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BT[row, longest - len(ids) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _rows_of_cache(output: Any, rows_B: torch.Tensor) -> Any:
    """The keys and values of some rows; None where the model keeps them otherwise, so that they are computed again."""
    cache = getattr(output, "past_key_values", None)
    if not len(rows_B) or cache is None or not hasattr(cache, "reorder_cache"):
        return None
    cache.reorder_cache(rows_B)
    return cache


# --- one token per row ------------------------------------------------------------------------------------------------


class _Draw(LogitsProcessor):
    """Leaves one token per row possible: the one that the row's own random number points at."""

    def __init__(self, requests: Sequence[Request], longest: int, start: int, device: torch.device) -> None:
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
    wide_BV = logits_BV.to(uniform_B1.dtype)
    largest_B1 = wide_BV.amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(largest_B1).all()):
        raise UserError("the generator's logits are NaN or infinite; try dtype=float32, or another generator")
    greedy_B1 = temperature_B1 == 0
    scaled_BV = (wide_BV - largest_B1) / torch.where(greedy_B1, 1.0, temperature_B1)
    total_B1 = scaled_BV.exp().sum(dim=1, keepdim=True)
    nucleus_B1 = torch.where(greedy_B1, 1e-9, top_p_B1)
    for count in sorted({min(LIKELIEST, logits_BV.shape[1]), logits_BV.shape[1]}):
        sorted_BV, order_BV = _largest(scaled_BV, count)
        p_BV = sorted_BV.exp() / total_B1
        before_BV = p_BV.cumsum(dim=1) - p_BV
        kept_BV = torch.where(before_BV < nucleus_B1, p_BV, 0.0)  # the likeliest always stays: nothing is before it
        # Tokens as likely as the last one here may be missing; the nucleus has to end before them.
        if not bool(((kept_BV > 0) & (sorted_BV == sorted_BV[:, -1:])).any()):
            break
    mass_BV = kept_BV.cumsum(dim=1)
    place_B1 = (mass_BV <= uniform_B1 * mass_BV[:, -1:]).sum(dim=1, keepdim=True)
    last_B1 = (kept_BV > 0).sum(dim=1, keepdim=True) - 1
    place_B1 = torch.where(greedy_B1, 0, torch.minimum(place_B1, last_B1))
    return order_BV.gather(1, place_B1)


def _largest(values_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, largest first, and their places; equal ones in the order of their places."""
    if count >= values_BV.shape[1]:
        return values_BV.sort(dim=1, descending=True, stable=True)
    order_BK = values_BV.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    sorted_BK, inner_BK = values_BV.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return sorted_BK, order_BK.gather(1, inner_BK)


class _Stop(StoppingCriteria):
    """Ends `generate` at the first step in which a row's reply ends, and holds the replies that did.

    A reply ends at an end token, at its cap, at a stop string, or where its request's own rule ends it; the rule is
    applied after every `CHECK_EVERY` tokens of the reply, whatever the other rows do.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        caps: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        start: int,
        ends: Sequence[int],
    ) -> None:
        self.requests, self.caps, self.ends = list(requests), list(caps), frozenset(ends)
        self.tokenizer, self.start = tokenizer, start
        self.replies: dict[int, Reply] = {}
        """By row; the prompt's tokens are not counted here."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        for row, new in enumerate(input_ids[:, self.start :].tolist()):
            if (reply := self._reply(self.requests[row], new, self.caps[row])) is not None:
                self.replies[row] = reply
        return torch.full((len(input_ids),), bool(self.replies), device=input_ids.device)  # type: ignore[return-value]

    def _reply(self, request: Request, new: list[int], cap: int) -> Reply | None:
        """The reply of a row that ends with its last token; None for a row that has to be continued."""
        if new[-1] in self.ends:
            return self._ended_reply(request, new[:-1], "stop")
        if request.stop and any(stop in self._tail(request.stop, new) for stop in request.stop):
            text = self._text(new)
            places = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
            if places:
                return self._ended_reply(request, new, "stop", min(places))
        rule = request.end_rule if len(new) % CHECK_EVERY == 0 else None
        ending = rule(self._text(new)) if rule is not None else None
        if ending is not None:
            return self._ended_reply(request, new, ending.finish_reason, ending.length)
        return self._ended_reply(request, new, "length") if len(new) >= cap else None

    def _ended_reply(self, request: Request, new: list[int], reason: str, length: int | None = None) -> Reply:
        text = self._text(new)[:length]
        return Reply(key=request.key, text=text, completion_tokens=len(new), finish_reason=reason)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _tail(self, stops: tuple[str, ...], new: list[int]) -> str:
        """The last tokens' text: every token holds at least a byte, so a window of a stop string's bytes holds it."""
        window = max(len(stop.encode()) for stop in stops) + 8
        return self._text(new[-window:])
