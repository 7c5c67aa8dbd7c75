"""The kinds of method: what each receives, and what it returns.

A method receives tensors and returns a decision. It never holds the model, registers a hook or
touches a cache; the adapters do that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmfast.budget import check_keep, count, shares
from mmfast.tokens import Keep, Layout, VisualTokens

Positions = Literal["keep", "compact"] | None

SIGNALS = frozenset(
    {
        # of a video that has not been encoded yet
        "video_frames",
        # of the vision encoder, per visual token
        "cls_attention",
        "cls_logits",
        "received_attention",
        "keys",
        "queries",
        "patch_features",
        # of the vision encoder, per tile
        "cls_features",
        # of a CLIP model beside the language model
        "clip_image_embeds",
        "clip_text_embeds",
        # of the prompt's text
        "text_embeds",
        # inside the language model
        "attention",
        "embeds",
        "final_norm",
        "layer_norm",
        "activations",
        # of the layers whose keys and values are cached
        "rotation",
        "output_projection",
    }
)
"""Every signal a method may name in ``needs``."""

Compat = Literal["official"] | None
"""``compat="official"`` reproduces what the official code does where it differs from the sane behaviour."""


@dataclass(frozen=True)
class VisionSignal:
    """Ask for one tensor of the vision encoder; it arrives per visual token, aligned with the features.

    Encoders without a class token give the attention a patch receives (mean over heads and queries)
    instead of ``cls_attention`` and ``cls_logits``; none of them has ``cls_features``. Where the model
    merges patches, the signal of a merged token is the mean over its patches.

    Attributes:
        kind: what to read. ``"cls_attention"`` ``[N]``: attention of the class token, post-softmax over
            all tokens; ``"cls_logits"`` ``[N]``: the same before the softmax, scaled;
            ``"received_attention"`` ``[N]``: mean over heads and all queries of what a token receives;
            ``"keys"``, ``"queries"`` ``[N, d]``: without heads averaged or joined, see ``heads``;
            ``"patch_features"`` ``[N, C]``: output of a block; ``"cls_features"`` ``[tiles, C]``: the same
            of the class tokens, in the order of ``layout.tiles()``. All float32 but features, which keep the
            model's dtype. ``"groups"`` ``[N]`` int64: tokens with the same number share one token of the
            encoder, where a method made it run on fewer.
        layer: the block, 0-based: an index, a relative depth (float in (0, 1)), ``"features"`` for the
            block whose output the model uses as features, or ``"last"``.
        heads: average the heads (``"mean"``), add them up (``"sum"``) or join them (``"join"``: keys and
            queries in the full width of the projection, attention as that of a single head of this width).
    """

    kind: Literal[
        "cls_attention",
        "cls_logits",
        "received_attention",
        "keys",
        "queries",
        "patch_features",
        "cls_features",
        "groups",
    ]
    layer: int | float | Literal["features", "last"] = "features"
    heads: Literal["mean", "sum", "join"] = "mean"


class Method(ABC):
    """Base of every method; a subclass is a frozen dataclass whose fields are its options."""

    kind: ClassVar[str] = "Method"
    name: ClassVar[str]
    stage: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    role: ClassVar[str] = "reduce"
    """What it does inside its stage; a plan may hold one method of each role."""
    merges: ClassVar[bool] = False
    """Whether survivors take over something of what was dropped."""
    reads_question: ClassVar[bool] = False
    """Whether the text decides what survives: in later turns the choice of the first question stays."""

    def __post_init__(self) -> None:  # noqa: B027 - where there is nothing to check, nothing is checked
        """Check the options; subclasses call this first."""

    def notice(self, depth: int) -> str:
        """Say what a user should know about these options in a model of ``depth`` layers; empty for nothing."""
        return ""

    def vision_signals(self) -> Mapping[str, VisionSignal]:
        """Name the tensors of the vision encoder this method reads; they arrive under these names."""
        return {}

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
        scope: ``"global"`` lets all tiles of an image or frames of a video compete for one budget,
            ``"per_tile"`` gives each its share.
    """

    kind: ClassVar[str] = "BeforeLLM"

    keep: int | float | None = 0.5
    positions: Positions = None
    newline: Literal["keep_nonempty", "keep", "drop"] = "keep_nonempty"
    scope: Literal["global", "per_tile"] = "global"

    adaptive: ClassVar[bool] = False
    """Whether ``keep=None`` is allowed and means the method's own, data-dependent count."""
    fits_grid: ClassVar[bool] = False
    """Whether what is left fills a smaller grid, so that it can be fewer than ``keep`` says."""

    def __post_init__(self) -> None:
        if self.keep is not None or not self.adaptive:
            check_keep(self.keep)
        check_choice("scope", self.scope, ["global", "per_tile"])
        check_choice("positions", self.positions, [None, "keep", "compact"])
        check_choice("newline", self.newline, ["keep_nonempty", "keep", "drop"])

    @property
    def wants_clip(self) -> bool:
        """Whether ``clip_image_embeds`` and ``clip_text_embeds`` of a CLIP model are needed."""
        return False

    def keep_count(self, candidates: int) -> int:
        """Say how many of ``candidates`` tokens survive; the promise that tests hold.

        Raises:
            ValueError: if ``keep`` is None, so that the data decide.
        """
        if self.keep is None:
            raise ValueError(f"method {self.name!r} with keep=None decides from the data; give keep to know the count")
        return count(self.keep, candidates)

    def own_count(self, tokens: VisualTokens) -> int:
        """Say how many tokens survive by the method's own rule, for ``keep=None``."""
        raise ValueError(f"method {self.name!r} has no rule of its own for the count; give keep")

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
        plain = candidates.numel() == len(layout)
        own = tokens if plain else tokens.take(candidates.to(tokens.features.device))
        kept = self.own_count(own) if self.keep is None else self.keep_count(len(own))
        if kept >= len(own):
            return None
        chosen = self._per_tile(own, kept) if self.scope == "per_tile" else self.reduce(own, kept)
        return chosen if plain else self._with_newlines(chosen, layout, candidates, len(tokens))

    def _per_tile(self, tokens: VisualTokens, kept: int) -> Keep:
        """Give each tile or frame its share of the budget and put the decisions together."""
        parts = tokens.layout.tiles()
        if len(parts) == 1:
            return self.reduce(tokens, kept)
        device = tokens.features.device
        indices, pieces = [], []
        for places, share in zip(parts, shares(kept, [part.numel() for part in parts]), strict=True):
            places = places.to(device)
            if share == 0:
                continue
            whole = Keep(torch.arange(places.numel(), device=device))
            piece = whole if share == places.numel() else self.reduce(tokens.take(places), share)
            indices.append(places[piece.indices])
            pieces.append((places, piece))
        merged, order = torch.cat(indices).sort()
        if all(piece.features is None for _, piece in pieces):
            return Keep(merged)
        width = next(piece.features.shape[1] for _, piece in pieces if piece.features is not None)
        space = next(piece.space for _, piece in pieces if piece.features is not None)
        # Rows of NaN mark slots that are left as they are.
        features = [
            tokens.features.new_full((len(piece), width), float("nan")) if piece.features is None else piece.features
            for _, piece in pieces
        ]
        sizes = [torch.ones(len(piece), device=device) if piece.sizes is None else piece.sizes for _, piece in pieces]
        source = torch.full((len(tokens),), -1, dtype=torch.int64, device=device)
        rank, before = order.argsort(), 0
        for places, piece in pieces:
            into = piece.source
            if into is None:
                into = torch.full_like(places, -1)
                into[piece.indices] = torch.arange(len(piece), device=device)
            source[places] = torch.where(into >= 0, rank[(into + before).clamp(0, rank.numel() - 1)], into)
            before += len(piece)
        return Keep(merged, torch.cat(features)[order], torch.cat(sizes)[order], source, space)

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
        return Keep(merged, features, sizes, source, chosen.space)


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
    """Replace tokens by fewer, merged ones that take over the slots of some of them.

    Where the projector works token by token and ``patch_features`` was asked for, official code merges
    what the encoder gave and projects the result: take the tensor to merge from :meth:`material` and
    hand its ``space`` on to Keep.
    """

    kind: ClassVar[str] = "Merger"
    merges: ClassVar[bool] = True

    @abstractmethod
    def merge(self, tokens: VisualTokens, kept: int) -> Keep:
        """Return a Keep with ``features`` (and ``source``) set."""

    def reduce(self, tokens: VisualTokens, kept: int) -> Keep:
        """Return what ``merge`` decided."""
        return self.merge(tokens, kept)

    @staticmethod
    def material(tokens: VisualTokens) -> tuple[Tensor, Literal["llm", "vision"]]:
        """Return the features to merge, ``[N, C]``, and their space for Keep."""
        patches = tokens.signals.get("patch_features")
        if patches is not None and tokens.projectable:
            return patches, "vision"
        return tokens.features, "llm"


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
