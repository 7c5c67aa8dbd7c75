"""The kinds of method that act inside the language model: droppers, bypasses and masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmfast.budget import average_of, check_keep, count, resolve_layer, solve_average, truncated_count
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import Method, Positions, check_choice, top_indices
from mmfast.token_pruning.weights import Lesson
from mmfast.tokens import Keep, Layout


@dataclass(frozen=True)
class LayerEvent:
    """One place in the stack where a method acts.

    Attributes:
        layer: the layer whose input is shortened (0-based).
        step: number of the event in its schedule.
        depth: number of layers of the model.
    """

    layer: int
    step: int = 0
    depth: int = 0


@dataclass(frozen=True)
class LayerRequest:
    """Ask for the attention of one layer.

    Attributes:
        layer: the layer whose attention is read.
        ahead: read the layer's own attention from its input before the layer runs, which lets that layer already work
            on fewer tokens; otherwise it is read while the layer runs.
        queries: ``"last"`` looks at the row of the last prompt token only, which spares others when reading ahead.
        rotary: False reads queries and keys without rotary position embedding.
        values: whether values are needed too, when reading ahead.
    """

    layer: int
    ahead: bool = False
    queries: Literal["last", "all"] = "all"
    rotary: bool = True
    values: bool = False


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of ONE prompt at one event inside the language model.

    Attributes:
        hidden: ``[n, D]`` hidden states of the prompt's tokens at the input of the layer.
        candidates: ``[V]`` int64, ascending: the positions in ``hidden`` of droppable visual tokens.
        origin: ``[V]`` int64, number of each candidate among the visual tokens that entered the language model
            (0-based, newline tokens not counted); -1 for text, where a bypass routes it too.
        media: ``[V]`` int64, which image or video of the prompt each candidate belongs to; -1 for text.
        total: number of droppable visual tokens that entered the language model.
        media_totals: the same per image or video.
        last: position in ``hidden`` of the last prompt token; None = the last of ``hidden``.
        places: ``[n]`` int64, place of each token in the prompt before anything was dropped; None = as they stand.
        visual: ``[U]`` int64, positions in ``hidden`` of all visual tokens, where ``candidates`` are those of
            one image only; None = they are the candidates.
        layouts: per image or video, where the tokens that entered lie (index it with ``origin`` less
            the totals of the images before); empty where not known.
        attention: attention of the layer asked for in ``request``; else None.
        embeds: ``[n, D]`` embeddings with which the tokens entered, if ``"embeds"`` is in ``needs``.
        normed: ``[n, D]`` ``hidden`` through the final norm (``"final_norm"``) or the layer's (``"layer_norm"``).
        activations: ``[n, M]`` input of the down projection of the layer before (``"activations"``).
        signals: tensors of ``vision_signals``, per candidate.
        memory: what the method remembers from one event of a prompt to the next; it may write here alone.
        lesson: set where learned parts follow their training form.
        answers: ``[n]`` bool, which tokens are answers, in a lesson.
    """

    hidden: Tensor
    candidates: Tensor
    origin: Tensor
    media: Tensor
    total: int
    media_totals: tuple[int, ...]
    last: int | None = None
    places: Tensor | None = None
    visual: Tensor | None = None
    layouts: tuple[Layout, ...] = ()
    attention: AttentionView | None = None
    embeds: Tensor | None = None
    normed: Tensor | None = None
    activations: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    lesson: Lesson | None = None
    answers: Tensor | None = None

    @property
    def last_token(self) -> int:
        """Position in ``hidden`` of the last prompt token."""
        return self.hidden.shape[0] - 1 if self.last is None else self.last

    @property
    def question(self) -> Tensor:
        """Positions in ``hidden`` of the text that asks, ascending int64, never empty.

        That is the text after the last visual token, up to the last prompt token. Where there is none,
        it is all text before the last visual token; where there is none either, the last prompt token.

        Example:
            >>> both = torch.arange(1, 3)
            >>> LayerTokens(torch.zeros(5, 4), both, both - 1, both * 0, 2, (2,)).question.tolist()
            [3, 4]
        """
        device = self.candidates.device
        end = self.last_token + 1
        visual = self.candidates if self.visual is None else self.visual
        start = int(visual[-1]) + 1 if visual.numel() else 0
        if start < end:
            return torch.arange(start, end, device=device)
        text = torch.ones(end, dtype=torch.bool, device=device)
        text[visual[visual < end]] = False
        found = text.nonzero().squeeze(-1)
        return found if found.numel() else torch.tensor([end - 1], device=device)

    def view(self) -> AttentionView:
        """Return the attention that was asked for.

        Raises:
            ValueError: if it was not.
        """
        if self.attention is None:
            raise ValueError("attention is missing; ask for it in request()")
        return self.attention


@dataclass(frozen=True)
class LayerDropper(Method):
    """Drop visual tokens between two layers of the language model.

    Attributes:
        positions: ``"keep"`` (default) leaves each survivor its position id, ``"compact"`` renumbers
            what is left at each event, as the official code of some methods does.
        scope: share the budget over all images of the prompt (``"global"``) or give each its own.
    """

    kind: ClassVar[str] = "LayerDropper"
    reads_question: ClassVar[bool] = True

    positions: Positions = None
    scope: Literal["global", "per_image"] = "global"

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, [None, "keep", "compact"])
        check_choice("scope", self.scope, ["global", "per_image"])

    @abstractmethod
    def events(self, depth: int) -> list[LayerEvent]:
        """Say where tokens may be dropped in a model of ``depth`` layers, ascending by layer.

        Raises:
            ValueError: if the schedule does not fit the model.
        """

    def request(self, event: LayerEvent) -> LayerRequest | None:
        """Say which attention the event needs; None for none."""
        return None

    @abstractmethod
    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Say how many of ``total`` visual tokens are left after each event, non-increasing.

        Args:
            total: visual tokens that entered the language model.
            depth: number of layers.
            images: how many images or videos they belong to; a count in ``keep`` is one per image.

        Returns:
            One count per event; None where the data decide.
        """

    @abstractmethod
    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        """Return the indices into ``candidates`` that survive, ascending int64.

        Args:
            tokens: the prompt.
            kept: how many survive; None where :meth:`counts` leaves it to the data.
            event: the event.

        Returns:
            The indices, or a Keep whose indices count in ``candidates`` and whose features, if any,
            replace the hidden states of the survivors (rows of NaN leave one untouched).
        """

    def truncations(self, depth: int) -> list[tuple[int, int, int]]:
        """Say which caches of earlier layers are cut down to the survivors of an event after the prefill.

        Returns:
            (layer of the event, first cache layer, last cache layer + 1) each.
        """
        return []

    def drops(self, event: LayerEvent, media_totals: Sequence[int]) -> bool:
        """Say whether an event may take anything from a prompt, given its visual tokens per image or video.

        Example:
            >>> from mmfast.registry import get
            >>> method = get("fastv").method(keep=9)
            >>> [method.drops(method.events(4)[0], totals) for totals in ((16,), (9,), ())]
            [True, False, False]
        """
        groups = [(total, 1) for total in media_totals] if self.scope == "per_image" else []
        groups = groups or [(sum(media_totals), len(media_totals))]
        return any(self._drops(event, total, images) for total, images in groups)

    def _drops(self, event: LayerEvent, total: int, images: int) -> bool:
        if total == 0:
            return False
        counts = self.counts(total, event.depth, images)
        # Where an earlier event left this many already, there is nothing to do here.
        return counts is None or counts[event.step] < (counts[event.step - 1] if event.step else total)

    def __call__(self, tokens: LayerTokens, event: LayerEvent) -> Keep | None:
        """Return what survives, as indices into ``candidates``; None drops nothing."""
        if self.scope == "per_image" and len(tokens.media_totals) > 1:
            return self._per_image(tokens, event)
        return self._one(tokens, event)

    def _one(self, tokens: LayerTokens, event: LayerEvent) -> Keep | None:
        counts = self.counts(tokens.total, event.depth, len(tokens.media_totals)) if tokens.total else []
        kept = None if counts is None else (counts[event.step] if counts else 0)
        alive = tokens.candidates.numel()
        if alive == 0 or (kept is not None and kept >= alive):
            return None
        chosen = self.choose(tokens, kept, event)
        decision = chosen if isinstance(chosen, Keep) else Keep(chosen)
        return None if len(decision) == alive and decision.features is None else decision

    def _per_image(self, tokens: LayerTokens, event: LayerEvent) -> Keep | None:
        indices, features, dropped, before = [], [], False, 0
        for index, total in enumerate(tokens.media_totals):
            mine = (tokens.media == index).nonzero().squeeze(-1)
            own = replace(
                tokens,
                candidates=tokens.candidates[mine],
                visual=tokens.candidates,
                origin=tokens.origin[mine] - before,
                media=torch.zeros_like(mine),
                total=total,
                media_totals=(total,),
                layouts=tokens.layouts[index : index + 1],
                signals={name: value[mine] for name, value in tokens.signals.items()},
                memory=tokens.memory.setdefault(f"image {index}", {}),
            )
            before += total
            decision = self._one(own, event)
            dropped = dropped or decision is not None
            decision = Keep(torch.arange(mine.numel(), device=mine.device)) if decision is None else decision
            blank = tokens.hidden.new_full((len(decision), tokens.hidden.shape[1]), float("nan"))
            indices.append(mine[decision.indices])
            features.append(blank if decision.features is None else decision.features)
        if not dropped:
            return None
        merged, order = torch.cat(indices).sort()
        states = torch.cat(features)[order]
        return Keep(merged, None if bool(states.isnan().all()) else states)

    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int] | None:
        """Predict how many tokens each layer reads, without running the model.

        Args:
            visual: visual tokens that enter the language model.
            text: all other tokens.
            depth: number of layers.
            images: how many images or videos the visual tokens belong to.

        Returns:
            One count per layer; None where the data decide.

        Example:
            >>> from mmfast.registry import get
            >>> get("fastv").method(layer=2, keep=0.5).keep_counts(576, 64, 4)
            [640, 640, 352, 352]
        """
        counts = self.counts(visual, depth, images) if visual else [0] * len(self.events(depth))
        if counts is None:
            return None
        left = dict(zip((event.layer for event in self.events(depth)), counts, strict=True))
        per_layer, alive = [], visual
        for layer in range(depth):
            alive = min(alive, left.get(layer, alive))
            per_layer.append(alive + text)
        return per_layer


@dataclass(frozen=True)
class LayerScorer(LayerDropper):
    """Give each candidate a score; the highest survive, ties going to the earlier token."""

    kind: ClassVar[str] = "LayerScorer"

    @abstractmethod
    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Return float32 ``[V]`` for the candidates, higher meaning more worth keeping."""

    def choose(self, tokens: LayerTokens, kept: int | None, event: LayerEvent) -> Tensor | Keep:
        """Keep the candidates of highest score."""
        if kept is None:
            raise ValueError(f"method {self.name!r} needs a count; give keep")
        return top_indices(self.score(tokens, event), kept)


@dataclass(frozen=True)
class DropOnce(LayerDropper):
    """Drop at a single place; combine with a scorer: ``class Mine(DropOnce, LayerScorer)``.

    Attributes:
        keep: visual tokens left after the drop; int = count per image, float = fraction.
        layer: first layer that reads the shortened prompt, as index (int) or relative depth (float).
    """

    keep: int | float | None = 0.5
    layer: int | float = 2

    adaptive: ClassVar[bool] = False
    """Whether ``keep=None`` is allowed and means the method's own, data-dependent count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None or not self.adaptive:
            check_keep(self.keep)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return the single event."""
        return [LayerEvent(resolve_layer(self.layer, depth), 0, depth)]

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Return what is left after the drop."""
        if self.keep is None:
            return None
        return [count(self.keep * images if isinstance(self.keep, int) else self.keep, total)]


@dataclass(frozen=True)
class Schedule(LayerDropper):
    """Drop in several steps; ``keep`` is the average over all layers, for which the steps are solved.

    Steps that fall on the same layer of a shallow model become one.

    Attributes:
        keep: visual tokens a layer reads on average; int = count per image, float = fraction, None = take
            ``fractions`` as they stand.
        layers: layers whose input is shortened, as indices (int) or relative depths (float).
        fractions: what is left after each step at the published setting; another ``keep`` scales all
            steps alike (on a logarithmic scale).
    """

    keep: int | float | None = 0.5
    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    fractions: tuple[float, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep(self.keep)
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if not self.layers or len(self.layers) != len(self.fractions):
            raise ValueError(
                f"layers={self.layers} and fractions={self.fractions} must name the same number of steps, at least one"
            )
        if any(not 0.0 < value < 1.0 for value in self.fractions) or sorted(self.fractions, reverse=True) != list(
            self.fractions
        ):
            raise ValueError(f"fractions={self.fractions} must fall and lie in (0, 1)")

    def steps(self, depth: int) -> dict[int, float]:
        """Return layer -> published fraction, ascending by layer."""
        resolved = [resolve_layer(layer, depth) for layer in self.layers]
        if sorted(resolved) != resolved:
            raise ValueError(f"layers={self.layers} means {resolved} in a model of {depth} layers; they must ascend")
        return dict(zip(resolved, self.fractions, strict=True))

    def events(self, depth: int) -> list[LayerEvent]:
        """Return one event per layer of the schedule."""
        return [LayerEvent(layer, step, depth) for step, layer in enumerate(self.steps(depth))]

    def notice(self, depth: int) -> str:
        """Say when ``keep`` is a fraction that no setting of the schedule reaches."""
        layers = list(self.steps(depth))
        least = average_of([0.0] * len(layers), layers, depth)
        if not isinstance(self.keep, float) or self.keep >= least:
            return ""
        return (
            f"keep={self.keep:g} as an average over the layers cannot be reached: the {layers[0]} of {depth} layers "
            f"before the first drop read every token, so the least, {least:.3f}, is what it comes to; drop in earlier "
            "layers or before the LLM for less"
        )

    def solved(self, total: int, depth: int, images: int = 1) -> list[float]:
        """Return the fractions left after each step for this ``keep``."""
        steps = self.steps(depth)
        if self.keep is None:
            return list(steps.values())
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep * images / total)
        return solve_average(share, list(steps.values()), list(steps), depth)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int] | None:
        """Cut off instead of rounding, always from the full number of visual tokens."""
        return [truncated_count(max(fraction, 1e-9), total) for fraction in self.solved(total, depth, images)]


@dataclass(frozen=True)
class Route:
    """Which tokens take part in one layer.

    Attributes:
        selected: ``[S]`` int64, ascending indices into ``candidates``: the tokens that take part.
        gate: ``[V]`` float32, multiplies what the feed-forward part adds to a token that takes part; None = 1.
        skipped: ``[V]`` float32 factor of the hidden state of a token that does not; None = 1.
        states: ``[V, D]`` hidden states that frozen tokens show to this layer instead of their own.
    """

    selected: Tensor
    gate: Tensor | None = None
    skipped: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True)
class LayerBypass(Method):
    """Let some visual tokens go around a layer; none is dropped for good.

    What a token that does not take part still does is the class's ``bypass``: ``"skip"`` nothing, and the layer's
    cache does not hold it; ``"freeze"`` it shows its key and value, so that others attend to it, and stays as it is;
    ``"attention"`` it takes no part in attention but runs the feed-forward part.
    """

    kind: ClassVar[str] = "LayerBypass"
    role: ClassVar[str] = "bypass"
    bypass: ClassVar[Literal["skip", "freeze", "attention"]] = "skip"
    routes_text: ClassVar[bool] = False
    """Whether text tokens are candidates too."""
    routes_decode: ClassVar[bool] = False
    """Whether generated tokens may go around layers too; they leave nothing in the caches of those."""

    @abstractmethod
    def layers_of(self, depth: int) -> list[int]:
        """Say which layers have a bypass, ascending.

        Raises:
            ValueError: if that does not fit the model.
        """

    @abstractmethod
    def route(self, tokens: LayerTokens, layer: int, depth: int) -> Route:
        """Choose the tokens that take part in a layer."""

    def request(self, layer: int) -> LayerRequest | None:
        """Say which attention the choice needs; None for none."""
        return None

    def decode_route(self, normed: Tensor, layer: int) -> Tensor | None:
        """Weigh generated tokens in a layer, for classes whose ``routes_decode`` is True.

        Args:
            normed: ``[B, D]`` hidden states of one new token per prompt, through the layer's input norm.
            layer: the layer.

        Returns:
            float32 ``[B]``: 0 = the token goes around the layer, else the weight of what its feed-forward part
            adds; None = 1 for all.
        """
        return None

    @abstractmethod
    def keep_counts(self, visual: int, text: int, depth: int, images: int = 1) -> list[int] | None:
        """Predict how many tokens take part in each layer; None where the data decide."""


@dataclass(frozen=True)
class LayerMask(Method):
    """Change who may look at whom; no token is dropped."""

    kind: ClassVar[str] = "LayerMask"
    role: ClassVar[str] = "mask"

    @abstractmethod
    def visible(self, media: Sequence[Tensor], text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return further pairs of rows and columns that become visible, as rectangles.

        Args:
            media: ``[n]`` int64 places of the visual tokens, one tensor per image or video.
            text: ``[t]`` int64 places of the text tokens of the prompt.
        """
