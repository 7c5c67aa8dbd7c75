"""Which tokens of a prompt belong to which image or video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmfast.token_pruning.base import VisionSignal
from mmfast.tokens import Layout

FEATURE_KEYS = {"pixel_values": "image", "pixel_values_images": "image", "pixel_values_videos": "video"}
_TAG = "_mmfast_layouts"


@dataclass(frozen=True)
class Segment:
    """One image or video inside one prompt.

    Attributes:
        slots: ``[n]`` int64 places of its visual tokens in the padded prompt, ascending.
        layout: where each token lies.
        signals: what was read of the vision encoder: ``[n]`` or ``[n, C]``, of class tokens ``[tiles, C]``; of the
            encoded tokens alone.
        projections: for those of the signals that the projector turns into embeddings, how it does.
        encoded: ``[n]`` bool, on the CPU, which tokens were encoded; None = all.
    """

    slots: Tensor
    layout: Layout
    signals: Mapping[VisionSignal, Tensor] = field(default_factory=dict)
    projections: Mapping[VisionSignal, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    encoded: Tensor | None = None

    def bare(self) -> Segment:
        """Leave out everything but the places."""
        return replace(self, signals={}, projections={})

    def frames(self) -> tuple[int, Tensor | None]:
        """Return how many frames a video has, 0 for an image, and which were encoded, if not all."""
        frame = self.layout.frame
        if self.layout.modality != "video":
            return 0, None
        count = int(frame[frame >= 0].unique().numel())
        return count, None if self.encoded is None else frame[self.encoded & (frame >= 0)].unique()

    def shown(self) -> Segment:
        """Leave out what was not encoded; the frames that are left are numbered anew."""
        if self.encoded is None:
            return self
        layout = self.layout.take(self.encoded)
        belongs = layout.frame >= 0
        frame = layout.frame.clone()
        frame[belongs] = layout.frame[belongs].unique(return_inverse=True)[1]
        layout = replace(layout, frame=frame)
        return replace(self, slots=self.slots[self.encoded.to(self.slots.device)], layout=layout, encoded=None)


class Described(list[Layout]):
    """The layouts of what one call encoded, and beside each what was read of the vision encoder.

    Attributes:
        signals: per layout, the tensors by what was asked for.
        projections: per layout, how its signals are projected, where that works token by token.
        encoded: per layout, which of its tokens were encoded; None = all.
    """

    def __init__(self, layouts: Iterable[Layout] = ()) -> None:
        super().__init__(layouts)
        self.signals: list[dict[VisionSignal, Tensor]] = [{} for _ in self]
        self.projections: list[dict[VisionSignal, Callable[[Tensor], Tensor]]] = [{} for _ in self]
        self.encoded: list[Tensor | None] = [None for _ in self]

    def segment(self, place: int, slots: Tensor) -> Segment:
        """Give the media at ``place`` the slots where it stands in a prompt."""
        return Segment(slots, self[place], self.signals[place], self.projections[place], self.encoded[place])


def items_of(features: Any) -> list[Tensor]:
    """Split what ``get_image_features`` returned into one ``[n, D]`` tensor per item."""
    pooled = getattr(features, "pooler_output", features)
    if isinstance(pooled, Tensor):
        return [pooled] if pooled.ndim == 2 else list(pooled.flatten(0, -3))
    return [item.flatten(0, -2) for item in pooled]


def tag(output: Any, layouts: list[Layout]) -> None:
    """Attach layouts, and what was read beside them, to features, which later arrive in ``mm_encoder_outputs``."""
    if hasattr(output, "__dict__"):
        setattr(output, _TAG, layouts)


def tagged(output: Any) -> list[Layout] | None:
    """Read layouts back."""
    found: list[Layout] | None = getattr(output, _TAG, None)
    return found


def modalities(kwargs: dict[str, Any]) -> set[str]:
    """Say which features a call of the outer model brings; a placeholder without them is a plain token."""
    pixels = {modality for key, modality in FEATURE_KEYS.items() if kwargs.get(key) is not None}
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return pixels | {modality for modality, output in encoded.items() if output is not None}


def feature_source(kwargs: dict[str, Any]) -> Any:
    """Return the object that brings the features of a call; the same object means the same features."""
    for source in (
        *(kwargs.get("mm_encoder_outputs") or {}).values(),
        *(kwargs.get(key) for key in FEATURE_KEYS),
    ):
        if source is not None:
            return source
    return None


def segments(visual: dict[str, Tensor], layouts: dict[str, list[Layout]]) -> list[list[Segment]]:
    """Assign layouts to the placeholders of each row.

    Rows that repeat a prompt (beams, several returned sequences) share the layouts of the first.

    Args:
        visual: modality -> ``[B, S]`` bool placeholders.
        layouts: modality -> layouts in the order of the placeholders.

    Returns:
        Per row, its segments in the order of the prompt.

    Example:
        >>> places = torch.tensor([[False, True, True, False, True, True]])
        >>> [part.slots.tolist() for part in segments({"image": places}, {"image": [Layout.grid(1, 2)] * 2})[0]]
        [[1, 2], [4, 5]]
    """
    rows = next(iter(visual.values())).shape[0]
    found: list[list[Segment]] = [[] for _ in range(rows)]
    for modality, places in visual.items():
        counts = places.sum(dim=1).tolist()
        known = layouts.get(modality, [])
        known = known if isinstance(known, Described) else Described(known)
        for row, parts in enumerate(assigned(counts, known)):
            slots = places[row].nonzero().squeeze(-1)
            if parts is None:
                found[row].extend(_runs(slots, modality))
                continue
            for place, own in zip(parts, slots.split([len(known[place]) for place in parts]), strict=True):
                found[row].append(known.segment(place, own))
    for own_parts in found:
        own_parts.sort(key=lambda part: int(part.slots[0]))
    return found


def assigned(counts: Sequence[int], layouts: Sequence[Sized]) -> list[list[int] | None]:
    """Hand images or videos out to the rows of a batch.

    Rows that repeat a prompt share those of the first.

    Args:
        counts: placeholders of each row.
        layouts: each as long as it has tokens, in the order of the placeholders.

    Returns:
        Per row, the places of its own; None where they do not fit the number of placeholders.

    Example:
        >>> assigned([3, 0, 2], [range(1), range(2), range(2)])
        [[0, 1], [], [2]]
    """
    total = sum(len(layout) for layout in layouts)
    repeats = sum(counts) // total if total and sum(counts) % total == 0 else 0
    if repeats == 0:
        return [None if count else [] for count in counts]
    rest = list(range(len(layouts)))
    assigned: list[list[int] | None] = []
    for start in range(0, len(counts), repeats):
        need, own = counts[start], []
        while need > 0 and rest:
            own.append(rest.pop(0))
            need -= len(layouts[own[-1]])
        fits = need == 0 and all(count == counts[start] for count in counts[start : start + repeats])
        if not fits:
            return [None if count else [] for count in counts]
        assigned.extend([own] * repeats)
    return assigned


def _runs(slots: Tensor, modality: str) -> list[Segment]:
    """Without layouts, take each unbroken run of placeholders for one item."""
    if slots.numel() == 0:
        return []
    breaks = ((slots[1:] - slots[:-1]) > 1).nonzero().squeeze(-1) + 1
    return [Segment(run, Layout.unknown(run.numel(), modality)) for run in slots.tensor_split(breaks.cpu())]


def placeholder_masks(kwargs: dict[str, Any], ids: dict[str, int], embedding: Any) -> dict[str, Tensor]:
    """Find the placeholders of a call, by id or, with embeddings only, by the placeholder's own row.

    Returns:
        Modality -> ``[B, S]`` bool; a token id shared by two modalities is counted once.
    """
    input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    found: dict[str, Tensor] = {}
    for modality, token in ids.items():
        if token in [ids[other] for other in found]:
            continue
        if input_ids is not None:
            found[modality] = input_ids == token
        elif embeds is not None:
            row = embedding(torch.tensor(token, device=embeds.device))
            found[modality] = (embeds == row.to(embeds.dtype)).all(dim=-1)
    return found
