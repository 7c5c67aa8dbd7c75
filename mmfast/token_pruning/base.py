"""The kinds of method: what each receives, and what it returns.

A method receives tensors and returns a decision. It never holds the model, registers a hook or
touches a cache; the adapters do that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmfast.budget import check_keep, count, resolve_layer
from mmfast.tokens import Keep, Layout, VisualTokens

Positions = Literal["keep", "compact"] | None

SIGNALS = frozenset(
    {
        "attention_rows",
        "cls_attention",
        "clip_image_embeds",
        "keys",
        "patch_features",
        "queries",
        "received_attention",
        "text_embeds",
        "text_embed_pooled",
    }
)
"""Every signal a method may name in ``needs``."""


class Method(ABC):
    """Base of every method; a subclass is a frozen dataclass whose fields are its options."""

    kind: ClassVar[str] = "Method"
    name: ClassVar[str]
    stage: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def to_text(self) -> str:
        """Write the method as it stands in a plan, naming only what differs from the defaults.

        Example:
            >>> from mmfast.registry import get
            >>> get("divprune").method(keep=64).to_text()
            'divprune(keep=64)'
        """
        changed = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)  # type: ignore[arg-type]
            if getattr(self, item.name) != item.default
        ]
        return f"{self.name}({', '.join(changed)})"

    def options(self) -> dict[str, object]:
        """Return every option with its value."""
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]


def check_choice(field_name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among ``choices``.

    Raises:
        ValueError: naming the field, the value and the choices.

    Example:
        >>> check_choice("positions", "keep", ["keep", "compact"])
    """
    if value not in choices:
        raise ValueError(f"{field_name}={value!r} must be one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class BeforeLLM(Method):
    """Reduce the visual tokens of one image or video before the language model reads them.

    Attributes:
        keep: what survives; int = count per image or video, float in (0, 1] = fraction.
        positions: ``"keep"`` leaves each survivor its position id, ``"compact"`` renumbers the
            shortened prompt; None takes what suits the model (compact for one-dimensional RoPE).
        newline: what happens to learned end-of-row tokens (AnyRes models): ``"keep_nonempty"`` keeps
            those of rows of which a token survives, ``"keep"`` all, ``"drop"`` none. They come on
            top of ``keep``.
    """

    kind: ClassVar[str] = "BeforeLLM"

    keep: int | float = 0.5
    positions: Positions = None
    newline: Literal["keep_nonempty", "keep", "drop"] = "keep_nonempty"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, [None, "keep", "compact"])
        check_choice("newline", self.newline, ["keep_nonempty", "keep", "drop"])

    def keep_count(self, candidates: int) -> int:
        """Say how many of ``candidates`` tokens survive; the promise that tests hold."""
        return count(self.keep, candidates)

    @abstractmethod
    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Choose ``kept`` of the candidate tokens (newline tokens are already taken out)."""

    def __call__(self, tokens: VisualTokens) -> Keep | None:
        """Reduce one image or video; None means that nothing changes.

        Newline tokens are no candidates: they are set aside, and come back by the policy.
        """
        layout = tokens.layout
        candidates = (~layout.is_newline).nonzero().squeeze(-1)
        if candidates.numel() == 0:
            return None
        kept = self.keep_count(int(candidates.numel()))
        if kept >= candidates.numel():
            return None
        if candidates.numel() == len(layout):
            return self.reduce(tokens, kept)
        chosen = self.reduce(tokens.take(candidates.to(tokens.features.device)), kept)
        return self._with_newlines(chosen, layout, candidates, len(tokens))

    def _with_newlines(self, chosen: Keep, layout: Layout, candidates: Tensor, total: int) -> Keep:
        """Map a decision over the candidates back to all tokens and add the newline tokens due."""
        device = chosen.indices.device
        places = candidates.to(device)[chosen.indices]
        newlines = layout.is_newline.nonzero().squeeze(-1)
        if self.newline == "drop":
            newlines = newlines[:0]
        elif self.newline == "keep_nonempty":
            rows = set(_row_keys(layout, places.cpu()))
            # A newline that belongs to no row (the one that closes a video) always stays.
            stays = [key in rows or key[2] < 0 for key in _row_keys(layout, newlines)]
            newlines = newlines[torch.tensor(stays, dtype=torch.bool)]
        merged, order = torch.cat([places, newlines.to(device)]).sort()
        if chosen.source is None and chosen.features is None:
            return Keep(merged)
        extra = newlines.numel()
        features = sizes = source = None
        if chosen.features is not None:
            # The newline embeddings stay as they are: rows of NaN mark "leave untouched".
            blank = chosen.features.new_full((extra, chosen.features.shape[1]), float("nan"))
            features = torch.cat([chosen.features, blank])[order]
        if chosen.sizes is not None:
            sizes = torch.cat([chosen.sizes, chosen.sizes.new_ones(extra)])[order]
        if chosen.source is not None:
            rank = order.argsort()
            source = chosen.source.new_full((total,), -1)
            moved = chosen.source
            source[candidates.to(device)] = torch.where(moved >= 0, rank[moved.clamp_min(0)], moved)
            source[newlines.to(device)] = rank[places.numel() :]
        return Keep(merged, features, sizes, source)


def _row_keys(layout: Layout, places: Tensor) -> list[tuple[int, int, int]]:
    return list(
        zip(
            layout.frame[places].tolist(),
            layout.tile[places].tolist(),
            layout.row[places].tolist(),
            strict=True,
        )
    )


@dataclass(frozen=True)
class Scorer(BeforeLLM):
    """Give each token a score; the highest survive, ties going to the earlier token."""

    kind: ClassVar[str] = "Scorer"

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Return float32 ``[N]``, higher meaning more worth keeping."""

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Keep the ``kept`` tokens of highest score."""
        return Keep(top_indices(self.score(tokens), kept))


@dataclass(frozen=True)
class Selector(BeforeLLM):
    """Choose the survivors jointly, because the worth of a token depends on the others."""

    kind: ClassVar[str] = "Selector"

    @abstractmethod
    def select(self, tokens: VisualTokens, kept: int) -> Tensor:
        """Return ``kept`` distinct int64 indices in any order."""

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Keep what ``select`` chose, in raster order."""
        return Keep(self.select(tokens, kept).sort().values)


@dataclass(frozen=True)
class Merger(BeforeLLM):
    """Replace tokens by fewer, merged ones that take over the slots of some of them."""

    kind: ClassVar[str] = "Merger"

    @abstractmethod
    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Return a Keep with ``features`` (and ``source``) set."""

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Return what ``merge`` decided."""
        return self.merge(tokens, kept)


def top_indices(score: Tensor, kept: int) -> Tensor:
    """Return the indices of the ``kept`` highest scores, ascending; ties go to the lower index.

    Args:
        score: ``[N]``; NaN counts as the lowest.
        kept: number of indices.

    Example:
        >>> top_indices(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist()
        [1, 2]
        >>> top_indices(torch.tensor([1.0, 1.0, 1.0]), 2).tolist()
        [0, 1]
    """
    clean = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return clean.sort(descending=True, stable=True).indices[:kept].sort().values


@dataclass(frozen=True)
class LayerEvent:
    """One place in the stack where visual tokens may be dropped.

    Attributes:
        layer: the layer whose input is shortened.
        keep: what survives of the tokens that entered the language model.
        power: for a count in a schedule of several steps, how much of the (logarithmic) way to the
            count this step goes; 1.0 is all of it.
    """

    layer: int
    keep: int | float
    power: float = 1.0


@dataclass(frozen=True)
class RowRequest:
    """Ask for rows of one layer's attention, post-softmax, float32.

    Attributes:
        layer: the layer whose attention is read.
        ahead: read the layer's own attention from its input before the layer runs, which lets that
            layer already work on fewer tokens; otherwise read it while the layer runs.
    """

    layer: int
    ahead: bool = False


@dataclass(frozen=True)
class LayerTokens:
    """The tokens of ONE prompt at one event inside the language model.

    Attributes:
        hidden: ``[n, D]`` hidden states of the prompt's tokens at the input of the layer.
        candidates: ``[V]`` int64, ascending: the positions in ``hidden`` of droppable visual tokens.
        origin: ``[V]`` int64, number of each candidate among the visual tokens that entered the
            language model (0-based, newline tokens not counted).
        media: ``[V]`` int64, which image or video of the prompt each candidate belongs to.
        total: number of droppable visual tokens that entered the language model.
        media_totals: the same per image or video.
        attention_rows: ``[H, n]`` attention of the last prompt token over ``hidden``, float32, if asked for.
    """

    hidden: Tensor
    candidates: Tensor
    origin: Tensor
    media: Tensor
    total: int
    media_totals: tuple[int, ...]
    attention_rows: Tensor | None = None


@dataclass(frozen=True)
class LayerDropper(Method):
    """Drop visual tokens between two layers of the language model.

    Attributes:
        positions: ``"keep"`` (default) leaves each survivor its position id, ``"compact"`` renumbers
            what is left at each event, as the official code of some methods does.
        scope: share the budget over all images of the prompt (``"global"``) or give each its own.
    """

    kind: ClassVar[str] = "LayerDropper"

    positions: Positions = None
    scope: Literal["global", "per_image"] = "global"

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, [None, "keep", "compact"])
        check_choice("scope", self.scope, ["global", "per_image"])

    @abstractmethod
    def events(self, depth: int) -> list[LayerEvent]:
        """Say where tokens are dropped in a model of ``depth`` layers, ascending by layer.

        Raises:
            ValueError: if the schedule does not fit the model.
        """

    def rows(self, event: LayerEvent) -> RowRequest | None:
        """Say which attention rows the event needs; None for none."""
        return None

    def keep_count(self, event: LayerEvent, total: int) -> int:
        """Say how many of ``total`` visual tokens are left after the event."""
        return count(event.keep, total)

    @abstractmethod
    def choose(self, tokens: LayerTokens, kept: int, event: LayerEvent) -> Tensor:
        """Return the ``kept`` indices into ``candidates`` that survive, ascending int64."""

    def drops(self, event: LayerEvent, media_totals: Sequence[int]) -> bool:
        """Say whether an event takes anything from a prompt, given its visual tokens per image or video.

        Example:
            >>> from mmfast.registry import get
            >>> method = get("fastv").method(keep=9)
            >>> [method.drops(method.events(4)[0], totals) for totals in ((16,), (9,), ())]
            [True, False, False]
        """
        if self.scope == "per_image":
            return any(self.keep_count(event, total) < total for total in media_totals)
        return self._shared_count(event, media_totals) < sum(media_totals)

    def __call__(self, tokens: LayerTokens, event: LayerEvent) -> Tensor | None:
        """Return the surviving positions in ``hidden`` among the candidates; None drops nothing."""
        if self.scope == "per_image" and len(tokens.media_totals) > 1:
            return self._per_image(tokens, event)
        kept = self._shared_count(event, tokens.media_totals)
        if kept >= tokens.candidates.numel():
            return None
        return tokens.candidates[self.choose(tokens, kept, event)]

    def _shared_count(self, event: LayerEvent, media_totals: Sequence[int]) -> int:
        """A count is a count per image: several images share the sum of their counts."""
        if not sum(media_totals):
            return 0
        keep = event.keep * len(media_totals) if isinstance(event.keep, int) else event.keep
        return self.keep_count(replace(event, keep=keep), sum(media_totals))

    def _per_image(self, tokens: LayerTokens, event: LayerEvent) -> Tensor | None:
        parts, dropped, before = [], False, 0
        for index, total in enumerate(tokens.media_totals):
            mine = (tokens.media == index).nonzero().squeeze(-1)
            own = replace(
                tokens,
                candidates=tokens.candidates[mine],
                origin=tokens.origin[mine] - before,
                media=tokens.media[mine],
                total=total,
                media_totals=(total,),
            )
            before += total
            kept = self.keep_count(event, total)
            if kept < mine.numel():
                dropped = True
                parts.append(own.candidates[self.choose(own, kept, event)])
            else:
                parts.append(own.candidates)
        return torch.cat(parts).sort().values if dropped else None

    def tokens_per_layer(self, visual: int, text: int, depth: int) -> list[int]:
        """Predict how many tokens each layer reads, without running the model.

        Args:
            visual: visual tokens that enter the language model.
            text: all other tokens.
            depth: number of layers.

        Example:
            >>> from mmfast.registry import get
            >>> get("fastv").method(layer=2, keep=0.5).tokens_per_layer(576, 64, 4)
            [640, 640, 352, 352]
        """
        per_layer, left = [], visual
        remaining = list(self.events(depth))
        for layer in range(depth):
            while remaining and remaining[0].layer == layer:
                left = min(left, self.keep_count(remaining.pop(0), visual))
            per_layer.append(left + text)
        return per_layer


@dataclass(frozen=True)
class LayerScorer(LayerDropper):
    """Give each candidate a score; the highest survive, ties going to the earlier token."""

    kind: ClassVar[str] = "LayerScorer"

    @abstractmethod
    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Return float32 ``[V]`` for the candidates, higher meaning more worth keeping."""

    def choose(self, tokens: LayerTokens, kept: int, event: LayerEvent) -> Tensor:
        """Keep the candidates of highest score."""
        return top_indices(self.score(tokens, event), kept)


@dataclass(frozen=True)
class DropOnce(LayerDropper):
    """Drop at a single place; combine with a scorer: ``class Mine(DropOnce, LayerScorer)``.

    Attributes:
        keep: visual tokens left after the drop; int = count per image, float = fraction.
        layer: first layer that reads the shortened prompt, as index (int) or relative depth (float).
    """

    keep: int | float = 0.5
    layer: int | float = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def events(self, depth: int) -> list[LayerEvent]:
        """Return the single event."""
        return [LayerEvent(resolve_layer(self.layer, depth), self.keep)]


@dataclass(frozen=True)
class FrameTokens:
    """Cheap features of the frames of ONE video, for a FrameSelector.

    Attributes:
        features: ``[T, D]`` one vector per frame.
        timestamps: ``[T]`` float32 seconds.
        signals: further tensors by name.
    """

    features: Tensor
    timestamps: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FrameSelector(Method):
    """Decide which frames of a video are encoded at all.

    Attributes:
        keep: number (int) or fraction (float) of frames.
    """

    kind: ClassVar[str] = "FrameSelector"

    keep: int | float = 8

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @abstractmethod
    def select(self, frames: FrameTokens, kept: int) -> Tensor:
        """Return int64 frame indices, ascending."""
