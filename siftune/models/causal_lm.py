"""A complete causal language model: logits at some positions of a text, mean losses of spans.

Sequences are sorted by length and batched by a token budget; padding is on the right, where no real token attends to
it. The head is applied to the requested positions only, in blocks, so no array of batch x tokens x vocabulary exists.
Cost: one forward of the decoder over the real tokens (plus the padding among near-equal lengths), and V*D products per
requested position. Memory beyond the weights: one batch of states, one block of logits.

Shapes: `B` sequences of a batch, `T` tokens, `N` requested positions, `D` hidden width, `V` vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.formats import BadRow
from ..errors import UserError
from ..files import hash_json
from . import chat
from .backbone import Backbone, DType
from .features import TOKEN_BUDGET, batches, pad_right
from .head import read_head
from .hidden_states import ModelParts, exact_math, iter_hidden_states, iter_logits, unwrap_model
from .load import WEIGHT_FILES, loading, quiet, read_causal
from .tokenise import CUT_CHARACTERS, in_isolation
from .tokenize_rows import IGNORED, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
LOGITS = {"cpu": 1 << 24, "mps": 1 << 24, "cuda": 1 << 28}
"""Elements of a block of logits: 64 MB on a CPU, 1 GB on a GPU, in float32."""
AGREE, AGREE_HALF = 1e-3, 2e-2
"""Largest relative distance between the computed logits and the model's own, in float32 and in 16-bit types."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text's tokens, and the characters that each one covers."""

    ids: Ids
    """Shape `(T,)`, the tokenizer's own special tokens included."""
    begin: NDArray[np.int64]
    """Shape `(T,)`, first character of each token; special tokens cover no characters: begin = end = 0."""
    end: NDArray[np.int64]
    """Shape `(T,)`, one past its last character."""
    complete: bool = True
    """False where the text is too long for all its tokens to be computed; there are then more than the model reads."""
    reason: str | None = None
    """Why there are no tokens, where the text could not be built or tokenised."""

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens that cover any character of `begin .. end - 1`, as (first, one past the last)."""
        covered = np.flatnonzero((self.end > begin) & (self.begin < end) & (self.end > self.begin))
        return (int(covered[0]), int(covered[-1]) + 1) if len(covered) else (0, 0)

    def opened(self, token: int | None) -> Encoded:
        """With `token` in front, unless it is there or None."""
        if token is None or (len(self.ids) and self.ids[0] == token):
            return self
        ids = np.concatenate([np.array([token], dtype=np.int32), self.ids])
        return Encoded(ids, np.insert(self.begin, 0, 0), np.insert(self.end, 0, 0), self.complete, self.reason)

    @classmethod
    def failed(cls, bad: BadRow) -> Encoded:
        """No tokens, and why."""
        none = np.empty(0, dtype=np.int64)
        return cls(none.astype(np.int32), none, none, reason=str(bad))


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM with its head and tokenizer, in a folder or on the hub; weights load on first use, never pickled.

    Raises `UserError`, on first use, for what `Backbone` refuses, for a checkpoint without a head, and for a tokenizer
    without offsets.

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
    _cached: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_cached": {}}.items():
            object.__setattr__(self, name, value)

    # --- properties, known without the weights ------------------------------------------------------------------------

    @property
    def files(self) -> Backbone:
        """The model's folder: configuration, tokenizer, device."""
        if "files" not in self._cached:
            requested = {"device": self.device, "dtype": self.dtype, "max_length": self.max_length}
            self._cached["files"] = Backbone(str(self.model), layer=1, **requested)  # type: ignore[arg-type]
        files: Backbone = self._cached["files"]
        return files

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which must have offsets."""
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
        start_tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in start_tokens if token is not None), None)

    @property
    def key(self) -> str:
        """Content hash of weights, configuration, tokenizer, types and lengths: everything that determines its
        results."""
        if "key" not in self._cached:
            content = ["causal-lm", 1, chat.content_key(self.files), self.length, self.token_budget]
            self._cached["key"] = hash_json(content)
        return str(self._cached["key"])

    def check(self) -> None:
        """Check everything that does not need the weights. Raises `UserError`."""
        _ = self.files.config, self.tokenizer

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str | BadRow]) -> list[Encoded]:
        """Tokens of every text, complete except where far more than `length` of them follow.

        A text that already starts with the beginning-of-text token (chat templates write it) gets no second one. A row
        without a text or without tokens has a reason instead (see `in_isolation`).
        """
        with quiet():
            return in_isolation(self._few, texts, Encoded.failed)

    def _few(self, texts: Sequence[str]) -> list[Encoded]:
        """As `encode`, for one block of texts; raises what the tokenizer raises."""
        done: list[Encoded] = []
        limit = CUT_CHARACTERS * self.length
        for text, encoded in zip(texts, self._encode([text[:limit] for text in texts]), strict=True):
            if len(text) <= limit:
                done.append(encoded)
            elif len(encoded.ids) >= 2 * self.length:
                done.append(Encoded(encoded.ids, encoded.begin, encoded.end, complete=False))
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
        """The model's decoder and head, in eval mode, on its device."""
        if "parts" not in self._cached:
            self._cached["parts"] = unwrap_model(_load(self.files))
        parts: ModelParts = self._cached["parts"]
        return parts

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        for name in ("parts", "trusted"):
            self._cached.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def formula_holds(self, states: torch.Tensor, logits: torch.Tensor | None) -> bool:
        """Whether head(states), with multiplier and soft cap, equals the model's own logits. Checked once, warned
        once."""
        if "trusted" not in self._cached:
            self._cached["trusted"] = read_head(self.parts) is not None and _agree(self.parts, states, logits)
            if not self._cached["trusted"]:
                warnings.warn(
                    f"the head of model={self.model!r} is not a plain linear map; its logits are computed one "
                    "row at a time, more slowly",
                    stacklevel=2,
                )
        return bool(self._cached["trusted"])


def _load(files: Backbone) -> torch.nn.Module:
    device = files.torch_device  # fails before gigabytes are read
    model_name = f"model={files.model!r}"
    if not any((files.folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{model_name} has no model.safetensors; convert it with save_pretrained")
    read: Any = loading(
        f"{model_name} could not be loaded",
        lambda: read_causal(files.folder, dtype=files.torch_dtype, use_safetensors=True, output_loading_info=True),
    )
    network, facts = read
    if absent := sorted(facts["missing_keys"]):
        raise UserError(
            f"{model_name} lacks {len(absent)} tensors of its language model ({absent[0]}, ...); use a model saved with its head"
        )
    loaded: torch.nn.Module = network.eval().requires_grad_(False).to(device)
    return loaded


# --- logits and losses ------------------------------------------------------------------------------------------------


def head_logits(parts: ModelParts, states_ND: torch.Tensor) -> torch.Tensor:
    """The model's own head on hidden states, with its configuration's multiplier and soft cap: float32 `(N, V)`.

    The module itself, in its own type of number, so that a loss is the model's; `Head.logits` multiplies in float32.
    """
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
        computed, expected = head_logits(parts, states_RD[:8]), logits_RV[:8].float()
    if computed.shape != expected.shape:
        return False
    allowed = AGREE if states_RD.dtype == torch.float32 else AGREE_HALF
    finite = torch.isfinite(expected).all(dim=1) & torch.isfinite(computed).all(dim=1)
    distance, size = (computed - expected)[finite].norm(), expected[finite].norm()
    return bool(distance <= allowed * size)


def logits(
    lm: CausalLM, sequences: Sequence[Ids], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]]:
    """Logits at positions `first .. last - 1` of every sequence, in blocks: (sequence `(N,)`, position `(N,)`, float32
    `(N, V)`). Every position occurs once, in unspecified order. Empty spans are left out.

    >>> for owner, position, block in logits(lm, [ids], [(0, len(ids))]): ...
    """
    requested = [index for index, (first, last) in enumerate(spans) if last > first]
    lengths = np.array([len(sequences[index]) for index in requested], dtype=np.int32)
    _check(lm, sequences, lengths)
    kind = lm.files.torch_device.type
    budget = lm.token_budget or TOKEN_BUDGET.get(kind, TOKEN_BUDGET["cuda"])
    for batch in batches(lengths, budget):
        yield from _batch(lm, [requested[index] for index in batch], sequences, spans)


def _batch(
    lm: CausalLM, members: list[int], sequences: Sequence[Ids], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], torch.Tensor]]:
    """As `logits`, for one batch: one forward, then the head on blocks of positions."""
    ids_BT = pad_right([sequences[index] for index in members])
    place_T = np.arange(ids_BT.shape[1])
    positions_BT = np.stack([(place_T >= spans[i][0]) & (place_T < spans[i][1]) for i in members])
    batch, positions = {"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(positions_BT)
    parts = lm.parts
    for chunk in iter_hidden_states(parts, batch, positions):
        if not lm.formula_holds(chunk.probe_states, chunk.probe_logits):
            break
        owner_N = np.repeat([members[row] for row in chunk.rows], [len(states) for states in chunk.states])
        position_N = np.concatenate([np.flatnonzero(positions_BT[row]) for row in chunk.rows])
        states_ND = torch.cat(chunk.states)
        step = max(1, LOGITS.get(states_ND.device.type, LOGITS["cuda"]) // int(parts.config.vocab_size))
        for start in range(0, len(states_ND), step):
            block = slice(start, start + step)
            with exact_math(states_ND.device):
                logits_NV = head_logits(parts, states_ND[block])
            yield owner_N[block], position_N[block], logits_NV
    else:
        return
    for row, logits_NV in iter_logits(parts, batch, positions):
        position_N = np.flatnonzero(positions_BT[row])
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
        # All of V at once, in float32 as the model's own loss is; the float64 sum of `online.label_losses` is for blocks.
        loss_N = logits_NV.logsumexp(dim=1) - logits_NV.gather(1, target_N1)[:, 0]
        np.add.at(total_B, owner_N, loss_N.double().cpu().numpy())
    with np.errstate(invalid="ignore"):
        return np.where(count_B > 0, total_B / count_B, np.nan)


def label_losses(lm: CausalLM, rows: Sequence[Tokens]) -> NDArray[np.float64]:
    """Mean cross-entropy over the label tokens of every row, each given all before it. Shape `(B,)`; sums in float64."""
    sequences = [np.asarray(row.input_ids, dtype=np.int32) for row in rows]
    labels = [np.asarray(row.labels, dtype=np.int64) for row in rows]
    places = [np.flatnonzero(label != IGNORED) for label in labels]
    total_B = np.zeros(len(rows))
    for owner_N, position_N, logits_NV in logits(lm, sequences, [(int(at[0]) - 1, int(at[-1])) for at in places]):
        target_N = np.array([labels[owner][at + 1] for owner, at in zip(owner_N, position_N, strict=True)])
        wanted_N = torch.from_numpy(np.maximum(target_N, 0))[:, None].to(logits_NV.device)
        loss_N = (logits_NV.logsumexp(dim=1) - logits_NV.gather(1, wanted_N)[:, 0]).double().cpu().numpy()
        np.add.at(total_B, owner_N, np.where(target_N == IGNORED, 0.0, loss_N))
    return total_B / np.array([len(at) for at in places], dtype=np.int64)
