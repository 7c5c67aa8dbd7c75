"""Encode some frames of a video alone: choose them ahead of the vision encoder, and tell the rest what is missing.

The encoding call gets the pixels of the chosen frames and nothing else. Behind it the features of the other frames
are zeros, so that the model finds as many features as placeholders; they never enter the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from mmfast.adapters.base import Adapter
from mmfast.adapters.clip import ClipReader, ClipTower
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import FEATURE_KEYS, Described, Segment, assigned, placeholder_masks
from mmfast.adapters.outer import OuterBoundary
from mmfast.adapters.resizing import is_of_grids, resized_to
from mmfast.plan import Plan
from mmfast.token_pruning.frame_base import FrameSelector, VideoFrames
from mmfast.tokens import Layout

_SIDE = 32
"""Frames are shrunk to so many pixels per side before they are compared."""


def check_frames(adapter: Adapter, plan: Plan) -> None:
    """Refuse to choose frames for models that are given none.

    Raises:
        ValueError: naming the method, the reason and what to do.
    """
    for method in plan.at("frames"):
        if "video_frames" not in adapter.signals:
            raise ValueError(
                f"method {method.name!r} chooses among the frames of a video, but models of type "
                f"{adapter.model.config.model_type!r} read pictures alone: frames come as pictures of their own, which "
                "cannot be told from images; give the processor fewer frames instead"
            )


class _Videos(Protocol):
    """The videos of one encoding call."""

    def frames(self) -> list[Tensor]:
        """Return the frames of each video, ``[T, 3, H, W]``."""

    def tokens(self, placeholders: int) -> list[int]:
        """Return the visual tokens of each video, ``placeholders`` in all."""

    def without(self, chosen: Sequence[Tensor | None]) -> dict[str, Any]:
        """Return the arguments of a call that encodes the chosen frames alone."""


class _Stacked:
    """Videos of equally many frames of one size, ``[V, T, 3, H, W]``."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.name = next(name for name in FEATURE_KEYS if arguments.get(name) is not None)
        self.pixels: Tensor = arguments[self.name]

    def frames(self) -> list[Tensor]:
        """As in the protocol."""
        return list(self.pixels)

    def tokens(self, placeholders: int) -> list[int]:
        """As in the protocol."""
        return [placeholders // len(self.pixels)] * len(self.pixels)

    def without(self, chosen: Sequence[Tensor | None]) -> dict[str, Any]:
        """As in the protocol: all videos keep equally many frames."""
        parts = [
            video if own is None else video[own.to(video.device)]
            for video, own in zip(self.pixels, chosen, strict=True)
        ]
        return {**self.arguments, self.name: torch.stack(parts)}


class _Packed:
    """Videos whose patches, of some neighbouring frames each, follow one another in one sequence."""

    def __init__(self, adapter: Adapter, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        vision = adapter.tower("video").config
        self.side, self.patch = int(vision.spatial_merge_size), int(vision.patch_size)
        self.time = int(vision.temporal_patch_size)
        self.grids: Tensor = arguments["video_grid_thw"]
        self.patches: Tensor = arguments["pixel_values_videos"]

    def _videos(self) -> list[Tensor]:
        """Return ``[T, patches, C]`` of each video, T the number of temporal patches."""
        parts = self.patches.split(self.grids.prod(dim=-1).tolist())
        return [part.unflatten(0, (int(time), -1)) for part, time in zip(parts, self.grids[:, 0], strict=True)]

    def frames(self) -> list[Tensor]:
        """As in the protocol; a temporal patch is shown by the first frame in it."""
        pattern = "t (h w a b) (c s p q) -> s t c (h a p) (w b q)"
        axes = {"a": self.side, "b": self.side, "s": self.time, "p": self.patch, "q": self.patch}
        return [
            rearrange(video, pattern, h=rows // self.side, w=cols // self.side, **axes)[0]
            for video, (_, rows, cols) in zip(self._videos(), self.grids.tolist(), strict=True)
        ]

    def tokens(self, placeholders: int) -> list[int]:
        """As in the protocol."""
        return [int(count) // self.side**2 for count in self.grids.prod(dim=-1)]

    def without(self, chosen: Sequence[Tensor | None]) -> dict[str, Any]:
        """As in the protocol."""
        videos = self._videos()
        parts = [v if own is None else v[own.to(v.device)] for v, own in zip(videos, chosen, strict=True)]
        grids = self.grids.clone()
        grids[:, 0] = torch.tensor([len(part) for part in parts])
        # What the caller worked out for all frames, the encoder works out anew.
        rest = {name: value for name, value in self.arguments.items() if not is_of_grids(name)}
        return {**rest, "pixel_values_videos": torch.cat([p.flatten(0, 1) for p in parts]), "video_grid_thw": grids}


@dataclass(frozen=True)
class Cut:
    """What one encoding call is spared.

    Attributes:
        arguments: arguments of the call that is left.
        chosen: per video, int64 ``[K]`` frames that are encoded; None = all.
        frames: per video, the frames there are.
    """

    arguments: dict[str, Any]
    chosen: list[Tensor | None]
    frames: list[int]

    def spread(self, output: Any, described: Described) -> Described:
        """Give the features of a call the length they would have had, and say which of them are real.

        Args:
            output: what the call returned; its features are replaced.
            described: the layouts of the encoded frames, with what was read beside them.

        Returns:
            The layouts of all frames.
        """
        for place, (layout, chosen, total) in enumerate(zip(list(described), self.chosen, self.frames, strict=True)):
            if chosen is not None:
                described[place] = full = grown(layout, len(chosen), total)
                described.encoded[place] = torch.isin(full.frame, chosen) | (full.frame < 0)
        output.pooler_output = self._spread_features(output.pooler_output, described)
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [self._spread_features(features, described) for features in deep]
        return described

    def _spread_features(self, features: Any, described: Described) -> Any:
        """Spread features in whatever way a release puts the videos together."""
        if not isinstance(features, Tensor):
            return tuple(self._spread_videos(list(features), described))
        if features.ndim == 2:
            counts = [
                len(layout) if encoded is None else int(encoded.sum())
                for layout, encoded in zip(described, described.encoded, strict=True)
            ]
            return torch.cat(self._spread_videos(list(features.split(counts)), described))
        videos = len(described)
        rows = features.reshape(videos, -1, features.shape[-1])
        full = torch.stack(self._spread_videos(list(rows), described))
        # Some families return frame by frame, others video by video.
        apart = features.shape[0] > videos
        return full.unflatten(1, (self.frames[0], -1)).flatten(0, 1) if apart else full

    def _spread_videos(self, features: list[Tensor], described: Described) -> list[Tensor]:
        """Spread the features of each video, ``[m, D]`` or ``[K, p, D]``."""
        found = []
        for own, encoded, layout, total in zip(features, described.encoded, described, self.frames, strict=True):
            if encoded is None:
                found.append(own)
                continue
            full = _filled(own.flatten(0, -2), encoded, layout)
            found.append(full if own.ndim == 2 else full.unflatten(0, (total, -1)))
        return found


def _filled(features: Tensor, encoded: Tensor, layout: Layout) -> Tensor:
    """Put the features ``[m, D]`` of the encoded tokens into their places among all, zeros elsewhere."""
    if len(features) < int(encoded.sum()):
        # Some releases append the newline behind this call.
        encoded = encoded[layout.frame >= 0]
    full = features.new_zeros(len(encoded), features.shape[-1])
    return full.index_put((encoded.nonzero().squeeze(-1).to(features.device),), features)


def grown(layout: Layout, frames: int, total: int) -> Layout:
    """Lay out a longer video whose frames lie as those of a shorter one.

    Args:
        layout: of ``frames`` frames with equally many tokens each, and of tokens that belong to no frame behind them.
        frames: frames it has.
        total: frames the longer video has.

    Raises:
        ValueError: if its tokens cannot be told apart by frame.

    Example:
        >>> grown(Layout.grid(1, 2, frames=1).with_newline(), 1, 3).frame.tolist()
        [0, 0, 1, 1, 2, 2, -1]
    """
    own, last = layout.frame[layout.frame >= 0], (layout.frame < 0).nonzero().squeeze(-1)
    each = own.numel() // frames
    if not own.equal(torch.arange(frames).repeat_interleave(each)) or not layout.frame[own.numel() :].lt(0).all():
        raise ValueError(
            "the visual tokens of this video cannot be told apart by frame, so frames cannot be chosen; leave the "
            "method of the stage 'frames' out"
        )
    longer = layout.take(torch.cat([torch.arange(each).repeat(total), last]))
    return replace(longer, frame=torch.cat([torch.arange(total).repeat_interleave(each), layout.frame[last]]))


class FrameRunner:
    """Choose frames ahead of each call that encodes videos.

    Args:
        adapter: the adapter of the model.
        plan: the plan, which may have a method of the stage.
        clip: a CLIP model, for methods that want one.
        outer: knows the call of the outer model that is running, if one is.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        clip: ClipTower | None,
        outer: OuterBoundary,
    ) -> None:
        self.adapter, self.outer = adapter, outer
        self.selector = next((method for method in plan.at("frames") if isinstance(method, FrameSelector)), None)
        self.clip = clip if self.selector is not None and self.selector.wants_clip else None
        self._prompt: tuple[Tensor, Tensor | None] | None = None

    def attach(self, ledger: Ledger) -> None:
        """Listen to ``generate``, which encodes media before it shows the model any text."""
        if self.clip is not None:
            ledger.set_attribute(self.adapter.model, "generate", self._listening(self.adapter.model.generate))

    def _listening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            # Hooks do not run after Ctrl-C: what is encoded now must not be taken for a part of the call it broke off.
            self.outer.forget()
            ids = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
            cache = kwargs.get("past_key_values")
            if isinstance(ids, Tensor):
                # What the cache holds has been read: the videos that come now stand behind it.
                seen = 0 if cache is None else int(cache.get_seq_length())
                mask = kwargs.get("attention_mask")
                mask = mask[:, -ids.shape[1] :] if isinstance(mask, Tensor) else None
                start = seen if seen < ids.shape[1] else 0
                self._prompt = ids[:, start:], None if mask is None else mask[:, start:].bool()
            try:
                return original(*args, **kwargs)
            finally:
                self._prompt = None

        return generate

    def chooses_anew(self, modality: str) -> bool:
        """Say whether a new question needs other frames than those encoded before."""
        return modality == "video" and self.clip is not None

    @torch.no_grad()
    def cut(self, modality: str, arguments: Mapping[str, Any]) -> Cut | None:
        """Choose the frames of one encoding call; None where it encodes everything.

        Args:
            modality: ``"image"`` or ``"video"``.
            arguments: arguments of ``get_{modality}_features`` by name.
        """
        if self.selector is None or modality != "video":
            return None
        packed = self.adapter.packs_patches
        videos: _Videos = _Packed(self.adapter, arguments) if packed else _Stacked(arguments)
        frames = videos.frames()
        questions = self._questions(videos) if self.clip is not None else [{}] * len(frames)
        chosen: list[Tensor | None] = []
        for own, question in zip(frames, questions, strict=True):
            signals = dict(question)
            if self.clip is not None and self.selector.keep_count(len(own)) < len(own):
                signals["clip_frame_embeds"] = self.clip.frame_embeds(own)
            small = resized_to(own.float(), (min(_SIDE, own.shape[-2]), min(_SIDE, own.shape[-1])))
            chosen.append(self.selector(VideoFrames(small, signals)))
        if all(own is None for own in chosen):
            return None
        return Cut(videos.without(chosen), chosen, [len(own) for own in frames])

    def _questions(self, videos: _Videos) -> list[dict[str, Tensor]]:
        """Embed for each video the question of the prompt it stands in.

        Raises:
            ValueError: if there is no text to read, or it does not say which video belongs to which prompt.
        """
        outer = self.outer.call
        ids, mask = (outer.input_ids, outer.attention_mask) if outer is not None else self._prompt or (None, None)
        if ids is None or self.selector is None or self.clip is None:
            raise ValueError(
                f"method {'' if self.selector is None else self.selector.name!r} with relevance='clip' has to read the "
                "question before the video is encoded: call generate() or the model with input_ids"
            )
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
        embedding = self.adapter.base.get_input_embeddings()
        masks = placeholder_masks({"input_ids": ids}, self.adapter.placeholders, embedding)
        places = {name: own & valid for name, own in masks.items()}
        counts = places["video"].sum(dim=1).tolist()
        rows = assigned(counts, [range(count) for count in videos.tokens(sum(counts))])
        reader = ClipReader(self.clip, ids, valid)
        found: dict[int, dict[str, Tensor]] = {}
        for row, own in enumerate(rows):
            if own is None:
                raise ValueError(
                    f"method {self.selector.name!r}: the placeholders of the videos do not say which video belongs to "
                    "which prompt; pass the prompts and their videos together"
                )
            slots = [part[row].nonzero().squeeze(-1) for part in places.values() if bool(part[row].any())]
            if own:
                text = reader.text(row, [Segment(part, Layout.unknown(part.numel())) for part in slots])
                found.update(dict.fromkeys(own, text))
        return [found[video] for video in sorted(found)]
