"""A whole causal language model, asked for its opinion of a text: logits at some positions, mean losses of spans.

Sequences are sorted by length and batched by a token budget; padding stands on the right, where no real token sees it.
The head sees only the positions asked for, some at a time, so no array of batch x tokens x vocabulary exists.
Cost: one forward of the decoder over the real tokens (plus the padding among near-equal lengths), and V*D products per
position asked for. Memory beyond the weights: one batch of states, one block of logits.

Shapes: `B` sequences of a batch, `T` tokens, `N` positions asked for, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import BadRow
from ..errors import UserError
from ..files import hash_json
from . import chat
from .backbone import Backbone, DType
from .features import TOKEN_BUDGET, batches
from .head import read_head
from .hidden_states import ModelParts, exact_math, iter_hidden_states, iter_logits, unwrap_model
from .load import WEIGHT_FILES, loading, quiet
from .tokenise import CUT_CHARACTERS, in_isolation

Ids = NDArray[np.int32]
LOGITS = {"cpu": 1 << 24, "mps": 1 << 24, "cuda": 1 << 28}
"""Numbers of a block of logits: 64 MB on a CPU, 1 GB on a GPU, in float32."""
AGREE, AGREE_HALF = 1e-3, 2e-2
"""Largest relative distance between our logits and the model's own, in float32 and in 16-bit types."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text's tokens, and the characters of it that each one stands for."""

    ids: Ids
    """Shape `(T,)`, the tokenizer's own special tokens included."""
    begin: NDArray[np.int64]
    """Shape `(T,)`, first character of each token; special tokens stand for no characters: begin = end = 0."""
    end: NDArray[np.int64]
    """Shape `(T,)`, one past its last character."""
    whole: bool = True
    """False where the text is so long that its tokens were not all made: more than the model reads, in any case."""
    reason: str | None = None
    """Why there are no tokens, where the text could not be made or tokenised."""

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens that stand for any character of `begin .. end - 1`, as (first, one past the last)."""
        inside = np.flatnonzero((self.end > begin) & (self.begin < end) & (self.end > self.begin))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)

    def opened(self, token: int | None) -> Encoded:
        """With `token` in front, unless it is there or None."""
        if token is None or (len(self.ids) and self.ids[0] == token):
            return self
        ids = np.concatenate([np.array([token], dtype=np.int32), self.ids])
        return Encoded(ids, np.insert(self.begin, 0, 0), np.insert(self.end, 0, 0), self.whole, self.reason)

    @classmethod
    def failed(cls, bad: BadRow) -> Encoded:
        """No tokens, and why."""
        none = np.empty(0, dtype=np.int64)
        return cls(none.astype(np.int32), none, none, reason=str(bad))


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM with its head and tokenizer, in a folder or on the hub; weights load on first use, never pickled.

    Raises `UserError`, on first use, for what `Backbone` refuses, for a checkpoint without a head, and for a tokenizer
    that cannot say which characters a token stands for.

    >>> lm = CausalLM("gpt2")
    >>> mean_losses(lm, [lm.encode(["one text"])[0].ids], [(1, 2)])
    """

    model: str
    """A folder, or a hub id."""
    _: KW_ONLY
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; or any torch device."""
    dtype: DType = "auto"
    """`auto` is bfloat16 for a 16-bit checkpoint on CUDA, float32 everywhere else."""
    max_length: int = 1024
    """Tokens of a sequence at most; lowered to the model's own number of positions."""
    token_budget: int | None = None
    """Tokens of a batch, padding counted; None is the device's default."""
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_made": {}}.items():
            object.__setattr__(self, name, value)

    # --- what it is, known without the weights ------------------------------------------------------------------------

    @property
    def files(self) -> Backbone:
        """The model's folder: configuration, tokenizer, device."""
        if "files" not in self._made:
            asked = {"device": self.device, "dtype": self.dtype, "max_length": self.max_length}
            self._made["files"] = Backbone(str(self.model), layer=1, **asked)  # type: ignore[arg-type]
        files: Backbone = self._made["files"]
        return files

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, one that knows offsets."""
        tokenizer = self.files.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"model={self.model!r} has a tokenizer without offsets; save a fast one (tokenizer.json) into its folder"
            )
        return tokenizer

    @property
    def length(self) -> int:
        """Tokens of a sequence at most."""
        return self.files.length

    @property
    def start(self) -> int | None:
        """What a text begins with: the beginning-of-text token, else the end-of-text one that separates documents."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), None)

    @property
    def key(self) -> str:
        """Content hash of weights, configuration, tokenizer, types and lengths: all that decides its numbers."""
        if "key" not in self._made:
            said = ["causal-lm", 1, chat.content_key(self.files), self.length, self.token_budget]
            self._made["key"] = hash_json(said)
        return str(self._made["key"])

    def check(self) -> None:
        """Refuse what can be told wrong without the weights. Raises `UserError`."""
        _ = self.files.config, self.tokenizer

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str | BadRow]) -> list[Encoded]:
        """Tokens of every text, none cut off but where far more than `length` of them are sure to follow.

        A text that already opens with the beginning-of-text token (chat templates write it) gets no second one. What
        could not be made into a text, or not into tokens, has a reason instead (see `in_isolation`).
        """
        with quiet():
            return in_isolation(self._some, texts, Encoded.failed)

    def _some(self, texts: Sequence[str]) -> list[Encoded]:
        """As `encode`, for a handful; raises what the tokenizer does."""
        done: list[Encoded] = []
        limit = CUT_CHARACTERS * self.length
        for text, encoded in zip(texts, self._encode([text[:limit] for text in texts]), strict=True):
            if len(text) <= limit:
                done.append(encoded)
            elif len(encoded.ids) >= 2 * self.length:
                done.append(Encoded(encoded.ids, encoded.begin, encoded.end, whole=False))
            else:
                done += self._encode([text])
        return done

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        opening = self.files.opening
        plain = [text.removeprefix(opening) for text in texts]
        batch = self.tokenizer(plain, return_offsets_mapping=True, return_attention_mask=False)
        done = []
        for text, short, ids, offsets in zip(texts, plain, batch["input_ids"], batch["offset_mapping"], strict=True):
            places_T2 = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            places_T2[places_T2[:, 1] > places_T2[:, 0]] += len(text) - len(short)
            done.append(Encoded(np.asarray(ids, dtype=np.int32), places_T2[:, 0], places_T2[:, 1]))
        return done

    # --- the weights --------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> ModelParts:
        """The model taken apart into decoder and head, in eval mode, on its device."""
        if "parts" not in self._made:
            self._made["parts"] = unwrap_model(_load(self.files))
        parts: ModelParts = self._made["parts"]
        return parts

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        for name in ("parts", "trusted"):
            self._made.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def formula_holds(self, states: torch.Tensor, logits: torch.Tensor | None) -> bool:
        """Does head(states), with multiplier and soft cap, give the model's own logits? Asked once, said once."""
        if "trusted" not in self._made:
            self._made["trusted"] = read_head(self.parts) is not None and _agree(self.parts, states, logits)
            if not self._made["trusted"]:
                warnings.warn(
                    f"the head of model={self.model!r} is not a plain linear map; its logits are computed one "
                    "row at a time, more slowly",
                    stacklevel=2,
                )
        return bool(self._made["trusted"])


def _load(files: Backbone) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    device = files.torch_device  # a wrong one is better known before gigabytes are read
    said = f"model={files.model!r}"
    if not any((files.folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{said} has no model.safetensors; convert it with save_pretrained")
    read: Any = loading(
        f"{said} could not be loaded",
        lambda: AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=files.torch_dtype, use_safetensors=True, output_loading_info=True
        ),
    )
    network, facts = read
    if absent := sorted(facts["missing_keys"]):
        raise UserError(
            f"{said} lacks {len(absent)} tensors of its language model ({absent[0]}, ...); use a model saved with its head"
        )
    loaded: torch.nn.Module = network.eval().requires_grad_(False).to(device)
    return loaded


# --- logits and losses ------------------------------------------------------------------------------------------------


def head_logits(parts: ModelParts, states_ND: torch.Tensor) -> torch.Tensor:
    """The model's own head on hidden states, with its configuration's multiplier and soft cap: float32 `(N, V)`."""
    head = read_head(parts)
    assert head is not None
    logits_NV: torch.Tensor = parts.head(states_ND).float()
    if head.multiplier != 1.0:
        logits_NV = logits_NV * head.multiplier
    if head.cap is not None:
        logits_NV = head.cap * torch.tanh(logits_NV / head.cap)
    return logits_NV


def _agree(parts: ModelParts, states_RD: torch.Tensor, logits_RV: torch.Tensor | None) -> bool:
    if logits_RV is None:
        return False
    with exact_math(states_RD.device):
        ours, theirs = head_logits(parts, states_RD[:8]), logits_RV[:8].float()
    if ours.shape != theirs.shape:
        return False
    allowed = AGREE if states_RD.dtype == torch.float32 else AGREE_HALF
    finite = torch.isfinite(theirs).all(dim=1) & torch.isfinite(ours).all(dim=1)
    apart, size = (ours - theirs)[finite].norm(), theirs[finite].norm()
    return bool(apart <= allowed * size)


def logits(
    lm: CausalLM, sequences: Sequence[Ids], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]]:
    """Logits at positions `first .. last - 1` of every sequence, in blocks: (sequence `(N,)`, position `(N,)`, float32
    `(N, V)`). Every position comes once, in no order that a caller may rely on. Empty spans are left out.

    >>> for owner, position, block in logits(lm, [ids], [(0, len(ids))]): ...
    """
    asked = [index for index, (first, last) in enumerate(spans) if last > first]
    lengths = np.array([len(sequences[index]) for index in asked], dtype=np.int32)
    _check(lm, sequences, lengths)
    kind = lm.files.torch_device.type
    budget = lm.token_budget or TOKEN_BUDGET.get(kind, TOKEN_BUDGET["cuda"])
    for batch in batches(lengths, budget):
        yield from _batch(lm, [asked[index] for index in batch], sequences, spans)


def _batch(
    lm: CausalLM, members: list[int], sequences: Sequence[Ids], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]]:
    """As `logits`, for one batch: one forward, then the head on blocks of positions."""
    longest = max(len(sequences[index]) for index in members)
    # The padding repeats a row's last token: any real id does, for no real token sees it.
    ids_BT = np.stack([np.pad(sequences[i], (0, longest - len(sequences[i])), mode="edge") for i in members])
    place_T = np.arange(longest)
    wanted_BT = np.stack([(place_T >= spans[i][0]) & (place_T < spans[i][1]) for i in members])
    batch, wanted = {"input_ids": torch.from_numpy(ids_BT.astype(np.int64))}, torch.from_numpy(wanted_BT)
    parts = lm.parts
    for chunk in iter_hidden_states(parts, batch, wanted):
        if not lm.formula_holds(chunk.probe_states, chunk.probe_logits):
            break
        owner_N = np.repeat([members[row] for row in chunk.rows], [len(states) for states in chunk.states])
        position_N = np.concatenate([np.flatnonzero(wanted_BT[row]) for row in chunk.rows])
        states_ND = torch.cat(chunk.states)
        step = max(1, LOGITS.get(states_ND.device.type, LOGITS["cuda"]) // int(parts.config.vocab_size))
        for start in range(0, len(states_ND), step):
            block = slice(start, start + step)
            with exact_math(states_ND.device):
                logits_NV = head_logits(parts, states_ND[block])
            yield owner_N[block], position_N[block], logits_NV
    else:
        return
    for row, logits_NV in iter_logits(parts, batch, wanted):
        position_N = np.flatnonzero(wanted_BT[row])
        yield np.full(len(position_N), members[row]), position_N, logits_NV.float()


def _check(lm: CausalLM, sequences: Sequence[Ids], lengths: NDArray[np.int32]) -> None:
    assert not len(lengths) or int(lengths.max()) <= lm.length, "a sequence longer than the model reads"
    largest, known = max((int(ids.max()) for ids in sequences if len(ids)), default=-1), int(lm.files.config.vocab_size)
    if largest >= known:
        raise UserError(
            f"the tokenizer of model={lm.model!r} produces token {largest}, but the model's "
            f"vocabulary has {known} tokens; use the model's own tokenizer"
        )


def mean_losses(lm: CausalLM, sequences: Sequence[Ids], spans: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Mean cross-entropy of tokens `first .. last - 1` of every sequence, each given all before it. Shape `(B,)`.

    `first` is at least 1: nothing predicts a first token. NaN for an empty span. Sums run in float64.
    """
    total_B = np.zeros(len(sequences))
    count_B = np.array([last - first for first, last in spans], dtype=np.int64)
    assert all(first >= 1 for first, last in spans if last > first), "nothing predicts a sequence's first token"
    flat = np.concatenate([*sequences, np.empty(0, np.int32)]).astype(np.int64)
    start_B = np.cumsum([0, *(len(ids) for ids in sequences)])
    for owner_N, position_N, logits_NV in logits(lm, sequences, [(first - 1, last - 1) for first, last in spans]):
        target_N1 = torch.from_numpy(flat[start_B[owner_N] + position_N + 1])[:, None].to(logits_NV.device)
        loss_N = logits_NV.logsumexp(dim=1) - logits_NV.gather(1, target_N1)[:, 0]
        np.add.at(total_B, owner_N, loss_N.double().cpu().numpy())
    with np.errstate(invalid="ignore"):
        return np.where(count_B > 0, total_B / count_B, np.nan)
