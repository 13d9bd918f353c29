"""UDS: the rows of a batch that are useful and novel, from the forward pass alone (arXiv 2510.16882).

    s_intra = ‖L‖_*                           nuclear norm of the row's logits L: utility and diversity inside the row
    s_inter = mean over memory of ‖z − z_j‖   distance of the row's sketch z to those of recently kept rows
    s       = s_intra + α s_inter             higher is better; the best K of B are kept and remembered

A linear head's logits are never formed (siftune.online.terms); padding never enters a score.
Cost: one forward of the backbone, and about 1 % of it for the scores of a frozen head.

Axes: `B` candidates, `T` columns, `N` tokens of a row, `D` inputs of the head, `V` vocabulary, `F` = d₁ and `G` = d₂
sides and `S` = d₁·d₂ elements of a sketch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ..errors import UserError
from ..models.hidden_states import exact_math, predicting_tokens, real_tokens
from ..records import RowScores
from .base import Batch, Measured, ModelScored, check_choice, check_minimum
from .collected import DeviceMeasurements, MeasuredColumns, RowEntry
from .label_losses import label_targets
from .logit_access import HeadInputs, LogitAccess
from .memory import Memory, pairwise
from .nuclear import NormRoute, Norms, device_norms, norms_of_grams
from .residual import residual_terms
from .route import EXACT_ROUTES, ExactRoute, ExactRouteName
from .sketch import Sketch
from .terms import RowTerms, estimated_terms, row_terms

PAPER_ALPHA = 1.5e-3
"""α of the authors' training script."""
NUCLEAR_SHARES = {"nuclear": 1.0, "frobenius": 0.0, "blend": 0.5, "head-gradient": 1.0}
"""Weight of the nuclear norm, beside that of the Frobenius norm, of every named `norm`."""
SPREAD_DECAY = 0.99
"""Weight that the running spreads of `alpha="auto"` keep per selection: a memory of about 100 selections."""


@dataclass(kw_only=True, eq=False)
class UDS(ModelScored):
    """Keeps the K candidates with the largest `intra + alpha * inter`.

    >>> kept = UDS(keep=2).select(model, batch)
    >>> kept.indices, kept.scores.total, kept.scores.intra, kept.scores.inter
    """

    name: ClassVar[str] = "uds"

    alpha: float | Literal["auto"] = "auto"
    """Weight of `inter`, >= 0. `auto` is the ratio of the two terms' running spreads among candidates that were
    compared with each other; with `compat="paper"` it is the authors' 1.5e-3."""
    memory: int = 1024
    """Kept rows that are remembered (the paper's M); 0 turns the memory off."""
    sketch: tuple[int, int] = (128, 8)
    """(d₁, d₂) of the sketch, over vocabulary and positions. `uds.sketch.signs` and `.indices` show its draw."""
    matrix: Literal["logits", "residual"] = "logits"
    """What `intra` and `inter` measure: the logits L (the paper), or the residual `softmax(L) - onehot(label)` at the
    tokens that predict a label. With `residual` the row's loss is the part `loss` (siftune.online.residual)."""
    norm: Literal["nuclear", "frobenius", "blend", "head-gradient"] | float = "nuclear"
    """Norm of the matrix. A number w in [0, 1] is `w * nuclear + (1 - w) * frobenius`; `blend` is w = 0.5;
    `head-gradient` is the nuclear norm of the loss's gradient in the head, and needs `matrix="residual"`."""
    tokens: Literal["all", "answer"] = "all"
    """Logits that count: at every real token (the paper), or at those that predict a token with a label. A residual
    exists at the latter alone."""
    seed: int = 0
    """Seed of the sketch, of the reservoir and of Lanczos probes."""
    compat: Literal["paper"] | None = None
    """`paper`: the authors' scaling of the sketch and their α, so that their α means the same."""
    within: float = 0.0
    """Weight, >= 0, of a further term inside `inter`: the mean distance to the other candidates of the same choice."""
    apart: float = 0.0
    """Greedy diversity inside a choice: a candidate whose sketch is nearer to a better kept one than this share, in
    [0, 1], of the longer of the two is kept only when nothing else is left. 0 is off; 0.1 catches near-copies."""
    length_norm: Literal["none", "sqrt", "tokens"] = "none"
    """Divide `intra` by 1 (the paper), by √N or by N, the tokens that count."""
    keep_tokens: int | None = None
    """Token budget of one choice, beside `keep`: best rows first while the tokens that count fit, at least one row. In
    a packed batch all tokens of a segment count, and segments that no longer fit are passed over for smaller ones."""
    precision: Literal["exact", "fast"] = "exact"
    """`fast`: matrix products in place of eigenvalues (to 1e-4, shown per row, else exact); pays on accelerators."""
    route: Literal["auto", "eigenvalues", "polar"] = "auto"
    """How `precision="exact"` is computed. `auto`: eigenvalues on a CPU; on an accelerator the faster one on the first
    batch of eigenvalues and the float64 polar iteration (to 1e-7, shown per row, else eigenvalues)."""
    memory_policy: Literal["fifo", "reservoir"] = "fifo"
    """Which rows are remembered: the latest (the paper), or a uniform sample of all kept so far."""
    lanczos_above: int | None = None
    """Rows with more tokens than this have their nuclear norm estimated by stochastic Lanczos quadrature; the
    relative standard error is the part `intra_error`. None is exact at every length."""

    def __post_init__(self) -> None:
        if isinstance(self.sketch, (tuple, list)):  # equal to the tuple, with the signs and indices of its draw
            self.sketch = Sketch(self.sketch, seed=self.seed, paper=self.compat == "paper")
        self._memory = Memory(self.memory, policy=self.memory_policy, seed=self.seed)
        self._logit_access = LogitAccess()
        self._exact_route = ExactRoute(self.route)
        self._spread_intra = 0.0
        self._spread_inter = 0.0

    def check(self) -> None:
        super().check()
        if self.alpha != "auto":
            check_minimum("alpha", self.alpha, 0.0)
        check_minimum("memory", self.memory, 0)
        if not isinstance(self.sketch, Sketch) or len(self.sketch) != 2:
            raise UserError(f"sketch={self.sketch!r} must be two numbers, such as (128, 8)")
        for side in self.sketch:
            check_minimum("sketch", side, 1)
        if isinstance(self.norm, str):
            check_choice("norm", self.norm, ("nuclear", "frobenius", "blend", "head-gradient"))
        elif isinstance(self.norm, bool) or not 0 <= self.norm <= 1:
            raise UserError(
                f"norm={self.norm!r} must be nuclear, frobenius, blend, head-gradient or the nuclear share in [0, 1]"
            )
        self._check_matrix()
        check_choice("tokens", self.tokens, ("all", "answer"))
        if self.compat is not None:
            check_choice("compat", self.compat, ("paper",))
        check_minimum("within", self.within, 0.0)
        if not 0 <= self.apart <= 1:
            raise UserError(f"apart={self.apart!r} must be a share of a sketch's length in [0, 1]")
        check_choice("length_norm", self.length_norm, ("none", "sqrt", "tokens"))
        check_choice("precision", self.precision, ("exact", "fast"))
        check_choice("route", self.route, ("auto", *EXACT_ROUTES))
        if self.precision == "fast" and self.route != "auto":
            raise UserError(
                f"route={self.route!r} is for precision='exact', and precision is 'fast'; remove one of them"
            )
        check_choice("memory_policy", self.memory_policy, ("fifo", "reservoir"))
        if self.lanczos_above is not None:
            check_minimum("lanczos_above", self.lanczos_above, 1)

    def _check_matrix(self) -> None:
        check_choice("matrix", self.matrix, ("logits", "residual"))
        if self.matrix == "logits" and self.norm == "head-gradient":
            raise UserError("norm='head-gradient' needs the residual; set matrix='residual' or another norm")
        if self.matrix == "residual" and self.compat == "paper":
            raise UserError(
                "compat='paper' is the paper's score, which is of the logits; remove it or matrix='residual'"
            )
        if self.matrix == "residual" and self.lanczos_above is not None:
            raise UserError(
                f"lanczos_above={self.lanczos_above!r} estimates norms of logits alone; remove it or matrix='residual'"
            )

    # --- measure ------------------------------------------------------------------------------------------------------

    def measure(self, model: torch.nn.Module, batch: Batch) -> Measured:
        """Columns `intra` `(B,)`, `sketch` `(B, S)` (float64), `tokens` `(B,)` (int64), `intra_error` with
        `lanczos_above`, `loss` `(B,)` with `matrix="residual"`."""
        positions_BT = real_tokens(batch)
        if self._counts_answers:
            positions_BT &= predicting_tokens(batch)
        targets = label_targets(batch, positions_BT) if self.matrix == "residual" else None
        losses: list[tuple[list[int], torch.Tensor]] = []
        measurements = DeviceMeasurements()
        gather_again, self._head_stale = self._head_stale, False
        device = torch.device("cpu")
        for head_inputs in self._logit_access.rows(
            model, batch, positions_BT, score_tokens=self.score_tokens, gather_again=gather_again
        ):
            self._bind_sketch(head_inputs.vocabulary)
            if head_inputs.head is not None:
                self._logit_access.drop_stale(head_inputs.head, stale=self._derived_stale)
                self._derived_stale = False
            device = head_inputs.device
            with exact_math(device):
                losses += self._measure_rows(head_inputs, measurements, targets)
        with exact_math(device):  # rows that have to be computed again
            result = self._read_columns(measurements, positions_BT)
        columns = {"intra": result.intra, "sketch": result.sketch, "tokens": positions_BT.sum(dim=1)}
        if self.lanczos_above is not None:
            columns["intra_error"] = result.error
        if self.matrix == "residual":
            columns["loss"] = torch.full_like(result.intra, torch.nan)
            for rows, loss in losses:
                columns["loss"][rows] = loss.cpu()
            columns["loss"].masked_fill_(torch.isnan(result.intra), torch.nan)
        return Measured(len(positions_BT), columns, result.reasons)

    def _measure_rows(
        self, head_inputs: HeadInputs, measurements: DeviceMeasurements, targets: list[torch.Tensor] | None
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Norms and sketches of every row, launched on the head's device and not waited for; the losses of some rows at
        a time, where `targets` (each candidate's labels) are given: of their residuals then."""
        losses = []
        long = self._long_rows(head_inputs)
        for index in long:
            measurements.add_host_norms(
                *estimated_terms(head_inputs, index, self._logit_access, self._sketch, seed=self.seed)
            )
        short = [index for index in range(len(head_inputs.rows)) if index not in long]

        def terms() -> Iterator[RowTerms]:
            if targets is None:
                return row_terms(head_inputs, short, self._logit_access, self._sketch)
            row_targets = [targets[row] for row in head_inputs.rows]
            return residual_terms(head_inputs, row_targets, self._sketch, head_gradient=self.norm == "head-gradient")

        def trial(route: ExactRouteName) -> None:
            for group in terms():
                norms_of_grams(group.grams_RKK, group.ranks, route=route)

        for group in terms():
            route = self._norm_route(head_inputs.device, trial)
            entries = [
                RowEntry(row, tokens, group.multiplier, None if route == "eigenvalues" else by_eigenvalues)
                for row, tokens, by_eigenvalues in zip(group.rows, group.tokens, group.by_eigenvalues, strict=True)
            ]
            measurements.add(entries, device_norms(group.grams_RKK, group.ranks, route), group.sketches_RS)
            if group.losses is not None:
                losses.append((group.rows, group.losses))
        return losses

    def _long_rows(self, head_inputs: HeadInputs) -> set[int]:
        """Rows whose norm is estimated (`lanczos_above`); rows that have to form their logits are computed exactly."""
        if self.lanczos_above is None or head_inputs.head is None or head_inputs.head.cap is not None:
            return set()
        return {index for index, inputs in enumerate(head_inputs.inputs) if len(inputs) > self.lanczos_above}

    def _norm_route(self, device: torch.device, trial: Callable[[ExactRouteName], object]) -> NormRoute:
        """The way to nuclear norms on this device; `trial` computes some of them by a given exact route."""
        return "fast" if self.precision == "fast" else self._exact_route.choose(device, trial)

    def _read_columns(self, measurements: DeviceMeasurements, positions_BT: torch.Tensor) -> MeasuredColumns:
        """Everything measured, read from the device."""
        result = MeasuredColumns(len(positions_BT), self.sketch[0] * self.sketch[1])
        for entry, norm, sketch in measurements.read():
            result.put(entry.row, self._intra(norm, entry.tokens, entry.multiplier), norm, sketch)
        kind = "answer" if self._counts_answers else "real"
        result.close(positions_BT, f"no {kind} tokens to score")
        return result

    def _intra(self, norm: Norms, tokens: int, multiplier: float) -> float:
        if norm.fell_back and self.precision == "fast":
            warnings.warn(
                "precision='fast' could not show 1e-4 for some rows, which were computed exactly", stacklevel=5
            )
        share = NUCLEAR_SHARES[self.norm] if isinstance(self.norm, str) else self.norm
        value = multiplier * (share * norm.nuclear + (1 - share) * norm.frobenius)
        return value / {"none": 1.0, "sqrt": math.sqrt(tokens), "tokens": tokens}[self.length_norm]

    def provenance(self) -> dict[str, str]:
        return {"exact_route": route} if (route := self._exact_route.describe()) else {}

    # --- combine, choose, commit --------------------------------------------------------------------------------------

    def compare(self, measured: Measured) -> Measured:
        """One more column, `novelty` `(B,)` (float64): the mean distance to the memory."""
        if "novelty" in measured.columns:
            return measured
        novelty = self._memory.distances(measured.columns["sketch"])
        return replace(measured, columns={**measured.columns, "novelty": novelty})

    def combine(self, measured: Measured) -> RowScores:
        """Parts `intra`, `inter`, `alpha` (the α in use, the same for all rows), `intra_error` with `lanczos_above`
        and `loss` with `matrix="residual"`."""
        measured = self.compare(measured)
        intra, sketch_BS = measured.columns["intra"], measured.columns["sketch"]
        inter = measured.columns["novelty"] + self._within(sketch_BS)
        alpha = torch.full_like(intra, self._alpha(intra, inter)).masked_fill(torch.isnan(intra), torch.nan)
        parts = {"intra": intra, "inter": inter, "alpha": alpha}
        if "intra_error" in measured.columns:
            parts["intra_error"] = measured.columns["intra_error"]
        if "loss" in measured.columns:
            parts["loss"] = measured.columns["loss"]
        return RowScores(intra + alpha * inter, parts, dict(measured.reasons))

    def choose(self, scores: RowScores, measured: Measured, count: int) -> torch.Tensor:
        """As `OnlineMethod.choose`; with `apart`, near-copies of better rows come after all others."""
        if self.apart == 0:
            return super().choose(scores, measured, count)
        total = torch.where(torch.isnan(scores.total), -torch.inf, scores.total)
        sketch_BS = measured.columns["sketch"]
        lengths = sketch_BS.norm(dim=1)
        is_near_copy_BB = pairwise(sketch_BS, sketch_BS) < self.apart * torch.maximum(lengths[:, None], lengths)
        distinct: list[int] = []
        near_copies: list[int] = []
        for row in torch.argsort(-total, stable=True).tolist():
            (near_copies if distinct and bool(is_near_copy_BB[row, distinct].any()) else distinct).append(row)
        unscored = [row for row in distinct if bool(torch.isnan(scores.total[row]))]
        order = [row for row in distinct if row not in unscored] + near_copies + unscored
        return self.within_token_budget(torch.tensor(order, dtype=torch.int64), measured)[:count].sort().values

    def commit(self, measured: Measured, scores: RowScores, kept: torch.Tensor) -> None:
        self._spread_intra, self._spread_inter = self._spreads(scores.intra, scores.inter)
        sketches_BS = measured.columns["sketch"][kept]
        self._memory.push(sketches_BS[torch.isfinite(sketches_BS).all(dim=1)])
        self._selections += 1

    def _within(self, sketch_BS: torch.Tensor) -> torch.Tensor:
        """`within` times the mean distance to the other candidates that have a score, `(B,)`."""
        finite = torch.isfinite(sketch_BS).all(dim=1)
        others = int(finite.sum()) - 1
        if self.within == 0 or others < 1:
            return torch.zeros(len(sketch_BS), dtype=torch.float64)
        return self.within * pairwise(sketch_BS, sketch_BS[finite]).sum(dim=1) / others

    def _alpha(self, intra: torch.Tensor, inter: torch.Tensor) -> float:
        if self.alpha != "auto":
            return float(self.alpha)
        if self.compat == "paper":
            return PAPER_ALPHA
        spread_intra, spread_inter = self._spreads(intra, inter)
        return math.sqrt(spread_intra / spread_inter) if spread_inter > 0 else 0.0

    def _spreads(self, intra: torch.Tensor, inter: torch.Tensor) -> tuple[float, float]:
        """Running sums of the two terms' variances among candidates that were compared, these included.

        Variances inside a choice, because a drift of all candidates together changes no choice; both with the same
        weights, so that their ratio is that of the spreads. Choices in which `inter` is constant are left out.
        """
        finite = torch.isfinite(intra) & torch.isfinite(inter)
        if int(finite.sum()) < 2 or float(inter[finite].var()) == 0:
            return self._spread_intra, self._spread_inter
        return (
            SPREAD_DECAY * self._spread_intra + float(intra[finite].var()),
            SPREAD_DECAY * self._spread_inter + float(inter[finite].var()),
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensor `sketches` `(<= M, S)` and plain numbers: counters, spreads, and what the sketches were drawn with."""
        state = self._memory.state_dict()
        if len(self._memory) == 0:
            state["sketches"] = torch.zeros(0, self.sketch[0] * self.sketch[1], dtype=torch.float64)
        return {
            **state,
            **super().state_dict(),
            "spread_intra": self._spread_intra,
            "spread_inter": self._spread_inter,
            "drawn": self._sketch_options(),
            "vocabulary": self._sketch.vocabulary or 0 if len(self._memory) else 0,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` when the state belongs to another method or was drawn with other options."""
        if set(state) | {"steps"} != set(self.state_dict()):
            raise UserError(f"this is no state of uds: it holds {', '.join(state) or 'nothing'}; start without it")
        saved = {"matrix": "logits", **state["drawn"]}  # states of before the option have none
        for name, current in self._sketch_options().items():
            if saved.get(name) != current:
                raise UserError(
                    f"the saved state has {name}={saved.get(name)!r} and this selector has {current!r}; "
                    f"set {name} to the saved value"
                )
        self._memory.load_state_dict(state)
        self._load_counters(state)
        self._spread_intra, self._spread_inter = float(state["spread_intra"]), float(state["spread_inter"])
        if state["vocabulary"]:
            self._sketch.bind(int(state["vocabulary"]))

    def _sketch_options(self) -> dict[str, Any]:
        """Options that the remembered sketches depend on, as plain values."""
        return {
            "sketch": list(self.sketch),
            "seed": self.seed,
            "compat": self.compat,
            "memory_policy": self.memory_policy,
            "matrix": self.matrix,
        }

    @property
    def _counts_answers(self) -> bool:
        return self.tokens == "answer" or self.matrix == "residual"

    @property
    def _sketch(self) -> Sketch:
        assert isinstance(self.sketch, Sketch)
        return self.sketch

    def _bind_sketch(self, vocabulary: int) -> None:
        if len(self._memory) and self._sketch.vocabulary not in (None, vocabulary):
            raise UserError(
                f"this selector remembers rows of a model with {self._sketch.vocabulary} logits, and this model has "
                f"{vocabulary}; use a new selector"
            )
        self._sketch.bind(vocabulary)
