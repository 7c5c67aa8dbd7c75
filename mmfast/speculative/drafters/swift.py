"""SWIFT: the model drafts with some of its own sublayers left out, and finds out which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from mmfast.registry import register
from mmfast.speculative.base import Draft, Drafter, Request, Session, Verified, check_count
from mmfast.speculative.skipping import SkipSearch, searched_sublayers
from mmfast.token_pruning.base import check_choice


class SelfModel(Protocol):
    """A model that drafts for itself between its rounds."""

    depth: int
    """Decoder layers."""
    fixed: frozenset[int]
    """Layers that have to run."""
    rereads: bool
    """Whether answers can be run anew."""

    def drafting(
        self, attention: Collection[int] = (), feed_forward: Collection[int] = ()
    ) -> AbstractContextManager[None]:
        """Let steps run without some sublayers; afterwards everything is as it was."""

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Run one token of each row named; ``[B, V]`` logits of what follows."""

    def reread(self, answers: Mapping[int, Sequence[int]]) -> Tensor:
        """Run beginnings of answers straight after their prompts; ``[B, n, V]`` logits of what follows each token."""


def candidate_widths(probabilities: Iterable[float], mode: Literal["greedy", "sampling"] = "greedy") -> list[int]:
    """Return how many alternatives a comb has at each depth: the less sure of the likeliest, the more.

    Args:
        probabilities: of the likeliest token, depth by depth.
        mode: whether the call samples.

    Example:
        >>> candidate_widths([0.97, 0.85, 0.6, 0.3]), candidate_widths([0.97], "sampling")
        ([3, 5, 8, 10], [1])
    """
    few = (3, 5, 8) if mode == "greedy" else (1, 3, 5)
    return [next((w for bound, w in zip((0.95, 0.8, 0.5), few, strict=True) if p > bound), 10) for p in probabilities]


@dataclass(frozen=True)
class Likeliest:
    """What a step says of one row: the likeliest tokens, and how likely the first is."""

    tokens: list[int]
    probability: float


def read_step(request: Request, logits: Tensor, width: int) -> list[Likeliest]:
    """Read ``[B, V]`` logits of a step without tokens that are never drafted."""
    scores = logits[..., : request.vocabulary].float()
    if request.excluded:
        scores = scores.index_fill(
            -1, torch.tensor([t for t in request.excluded if t < scores.shape[-1]], device=scores.device), -torch.inf
        )
    if width == 1:
        tokens = scores.argmax(dim=-1, keepdim=True)
    else:
        tokens = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    likeliest = scores.gather(-1, tokens[..., :1])[..., 0]
    probability = (likeliest - scores.logsumexp(dim=-1)).exp()
    return [Likeliest(row, sure) for row, sure in zip(tokens.tolist(), probability.tolist(), strict=True)]


def draft_in_step(
    model: SelfModel,
    request: Request,
    roots: Mapping[int, int],
    budget: Mapping[int, int],
    *,
    depth: int,
    threshold: float,
    comb: bool = False,
) -> dict[int, Draft]:
    """Let all rows draft greedily, one token each per step; a row ends where the model is not sure of itself.

    Args:
        model: the model, drafting.
        request: the call.
        roots: row -> last token of its answer.
        budget: row -> at most so many tokens.
        depth: tokens of a path at most.
        threshold: a token less likely than that is the last of its path.
        comb: hang the likeliest alternatives beside each token of the path.
    """
    tokens: dict[int, list[int]] = {row: [] for row in roots}
    parents: dict[int, list[int]] = {row: [] for row in roots}
    at, last = dict.fromkeys(roots, 0), dict(roots)
    mode: Literal["greedy", "sampling"] = "sampling" if request.sampling else "greedy"
    for level in range(depth):
        if not last:
            break
        steps = read_step(request, model.step(last), 10 if comb else 1)
        following = {}
        for row in last:
            step, used = steps[row], len(tokens[row])
            width = candidate_widths([step.probability], mode)[0] if comb else 1
            tokens[row] += step.tokens[: min(width, budget[row] - used)]
            parents[row] += [at[row]] * (len(tokens[row]) - used)
            at[row] = used + 1
            best = step.tokens[0]
            full = len(tokens[row]) >= budget[row]
            if not full and level + 1 < depth and step.probability >= threshold and best not in request.stop:
                following[row] = best
        last = following
    return {row: Draft(tuple(tokens[row]), tuple(parents[row]) if comb else ()) for row in roots}


@register("swift", stage="decode", paper="arXiv 2410.06916", source="hemingkx/SWIFT")
@dataclass(frozen=True)
class Swift(Drafter):
    """Draft with the model itself, some attention and feed-forward sublayers left out.

    Drafts are written into the model's own cache by the layers that run, and taken back before it verifies. Which
    sublayers to leave out is searched for while answers are written: every round tries a set on the first tokens of
    the answer in one forward, and the best is remembered from call to call. The answer costs that forward per round
    until the search has ended, so that it pays over many calls only.

    Paper: "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration".

    Attributes:
        num_draft: tokens of a draft at most, alternatives not counted.
        threshold: a token less likely than that is the last of its draft.
        skip_ratio: share of the sublayers, of all layers but the first and the last, that the search leaves out.
        search: ``False`` stays with both sublayers of every second layer, or with what an earlier call found.
        context_window: tokens of the answer a set is tried on.
        bayes_interval: every so many trials is suggested by Bayesian optimisation instead of drawn; 0 for none.
        patience: trials without a better one that end the search.
        trials: trials at most.
        enough: share of tokens that come out the same with which the search ends.
        tree: draft alternatives beside each token, more of them the less sure the model is.
    """

    needs_model: ClassVar[bool] = True

    num_draft: int = 25
    threshold: float = 0.8
    skip_ratio: float = 0.45
    search: bool = True
    context_window: int = 32
    bayes_interval: int = 25
    patience: int = 300
    trials: int = 1000
    enough: float = 0.95
    tree: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("num_draft", 1),
            ("context_window", 1),
            ("bayes_interval", 0),
            ("patience", 1),
            ("trials", 1),
        ):
            check_count(name, getattr(self, name), least)
        check_share("threshold", self.threshold, lowest=0.0)
        check_share("enough", self.enough, lowest=0.0)
        check_share("skip_ratio", self.skip_ratio, highest=0.95)
        check_choice("search", self.search, [True, False])
        check_choice("tree", self.tree, [True, False])
        # Only trees need a mask that some attention implementations cannot read.
        object.__setattr__(self, "trees", self.tree)

    @property
    def most(self) -> int:
        """Tokens it proposes at most in a round, the root not counted."""
        return self.num_draft * (10 if self.tree else 1)

    def notice(self, depth: int) -> str:
        """Say where skipping layers hardly pays."""
        return few_layers(depth)

    def start(self, request: Request) -> Session:
        """Begin a call of ``generate``."""
        model = request.model.itself()
        search = search_of(
            request,
            model,
            self.skip_ratio,
            bayes_interval=self.bayes_interval,
            patience=self.patience,
            trials=self.trials,
            enough=self.enough,
        )
        return SkippingSession(
            model,
            request,
            search,
            depth=self.num_draft,
            threshold=self.threshold,
            window=self.context_window if self.search else 0,
            comb=self.tree,
        )


def search_of(
    request: Request,
    model: SelfModel,
    skip_ratio: float,
    *,
    bayes_interval: int = 25,
    patience: int = 300,
    trials: int = 1000,
    enough: float = 0.95,
) -> SkipSearch:
    """Return the search that earlier calls have begun, or begin one."""
    found = request.memory.get("skips")
    if not isinstance(found, SkipSearch):
        count = searched_sublayers(model.depth, skip_ratio)
        found = request.memory["skips"] = SkipSearch(
            model.depth,
            model.fixed,
            count,
            bayes_interval=bayes_interval,
            patience=patience,
            trials=trials,
            enough=enough,
        )
    return found


class SkippingSession(Session):
    """One call of ``generate`` in which the model drafts with sublayers left out.

    Args:
        model: the model.
        request: the call.
        search: knows which sublayers.
        depth: tokens of a path at most.
        threshold: a token less likely than that is the last of its path.
        window: tokens a set is tried on; 0 for no trials.
        comb: hang alternatives beside each token of the path.
    """

    def __init__(
        self,
        model: SelfModel,
        request: Request,
        search: SkipSearch,
        *,
        depth: int,
        threshold: float,
        window: int = 0,
        comb: bool = False,
    ) -> None:
        self.model, self.request, self.search = model, request, search
        self._depth, self._threshold, self._comb = depth, threshold, comb
        self._window = window if model.rereads else 0
        self._answers = [[token] for token in request.first]

    def propose(self, roots: Mapping[int, int], budget: Mapping[int, int]) -> dict[int, Draft]:
        """Try a set of sublayers, and draft without the best known."""
        self._try()
        skips = self.search.best
        with self.model.drafting(skips.attention, skips.feed_forward):
            return draft_in_step(
                self.model,
                self.request,
                roots,
                budget,
                depth=self._depth,
                threshold=self._threshold,
                comb=self._comb,
            )

    def _try(self) -> None:
        long = {row: answer for row, answer in enumerate(self._answers) if len(answer) > self._window}
        if not self._window or not long or self.search.ended:
            return
        skips = self.search.trial
        with self.model.drafting(skips.attention, skips.feed_forward):
            logits = self.model.reread({row: answer[:-1] for row, answer in long.items()})
        rows = torch.tensor(list(long), device=logits.device)
        said = logits[rows].argmax(dim=-1)
        wanted = torch.tensor([answer[1:] for answer in long.values()], device=said.device)
        self.search.tell(float((said == wanted).double().mean()))

    def observe(self, verified: Mapping[int, Verified]) -> None:
        """Remember the beginnings of the answers."""
        for row, seen in verified.items():
            answer = self._answers[row]
            answer += seen.emitted[: max(0, self._window + 1 - len(answer))]


def few_layers(depth: int) -> str:
    """Say so where a model has too few layers to leave some out.

    Example:
        >>> few_layers(32)
        ''
    """
    if depth >= 16:
        return ""
    return (
        f"leaving layers out hardly pays in a model of {depth} layers, where each is a large part of what it knows; it "
        "is made for models of 16 layers and more"
    )


def check_share(name: str, value: object, *, lowest: float = 0.0, highest: float = 1.0) -> None:
    """Refuse what is no share in ``[lowest, highest]``.

    Raises:
        ValueError: naming the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise ValueError(f"{name}={value!r} must be a number from {lowest} to {highest}")
