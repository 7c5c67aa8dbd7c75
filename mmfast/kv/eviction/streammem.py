"""StreamMem: the end of the prompt asks in place of a question, and each frame leaves a summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Retained
from mmfast.kv.eviction.quickprefill import VisualScorer
from mmfast.kv.retrieval.rekv import frame_blocks
from mmfast.registry import register


@register("streammem", stage="cache", paper="arXiv 2508.15717")
@dataclass(frozen=True)
class StreamMem(VisualScorer):
    """Keep the visual entries that the end of the prompt attends to, and one summary of each frame; all text stays.

    The last tokens of a prompt are those of the chat template that opens the answer. Their attention among the
    visual entries, averaged over all heads, ranks these; all heads of a layer keep the same. The summary
    (prototype) of a frame is the mean of its keys and of its values, weighted by the attention of the own head, and
    takes the slot of the last entry of the frame that is dropped. A frame that stays whole needs none; its place
    goes to another entry. Where there are more frames than the budget holds, those with most attention are
    summarised and nothing else stays. An image counts as one frame.

    The paper goes through a stream in clips, and averages frames that are nearly equal before the model reads them;
    here the prompt is one clip, read before any of it goes. In its prompts the template comes before any question;
    here it may stand after one, and then has read it.

    Paper: "StreamMem: Query-Agnostic KV Cache Memory for Streaming Video Understanding".

    Attributes:
        keep: visual entries per head, summaries included.
        proxies: last tokens of the prompt whose attention counts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    reads_question: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    proxies: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.proxies, bool) or not isinstance(self.proxies, int) or self.proxies < 1:
            raise ValueError(f"proxies={self.proxies!r} must be an int of at least 1: last tokens of the prompt")

    def score(self, entries: Entries, kept: int) -> Tensor:
        """Return the attention that the visual entries get, averaged over all heads, ``[n]``."""
        return self.attention(entries).mean(dim=0)

    def attention(self, entries: Entries) -> Tensor:
        """Return what the last tokens give to visual entries, which share all of it, float32 ``[H, n]``."""
        view, total = entries.view, len(entries)
        rows = torch.arange(max(0, total - self.proxies), total, device=entries.keys.device)
        logits = view.logits(rows, masked=False)[..., view.past :].masked_fill(~entries.visual, -torch.inf)
        return torch.nan_to_num(logits.softmax(dim=-1)).mean(dim=1)

    def retain(self, entries: Entries, kept: int) -> Retained:
        """Keep the best entries and the summaries."""
        attention = self.attention(entries)
        places = entries.visual.nonzero().squeeze(-1)
        score, room = attention.mean(dim=0)[places], kept - (len(entries) - len(places))
        framed = entries.frame[places] >= 0
        # Entries without a frame belong to no number.
        frame = torch.full_like(places, -1)
        frame[framed] = frame_blocks(entries)[places[framed]].unique_consecutive(return_inverse=True)[1]
        stays, slots = choose_slots(score, frame, room)

        mask = ~entries.visual
        mask[places] = stays
        keys, values = entries.keys.clone(), entries.values.clone()
        own = entries.per_group(attention)[:, places]
        for source, states in ((entries.keys, keys), (entries.values, values)):
            summaries = frame_means(source[:, places[framed]], own[:, framed], frame[framed])
            states[:, places[slots]] = summaries[:, frame[slots]].to(states.dtype)
        return Retained(mask, keys=keys, values=values)


def choose_slots(score: Tensor, frame: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Choose what stays of the visual entries, and where the summaries of frames go.

    Args:
        score: ``[v]``.
        frame: int64 ``[v]``, frames counted from 0; -1 = of no frame.
        room: entries that stay, summaries included; fewer than v.

    Returns:
        bool ``[v]`` of what stays, with ``room`` true entries, and bool ``[v]`` of those among them that are
        replaced by the summary of their frame.

    Example:
        >>> stays, slots = choose_slots(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1]), 3)
        >>> stays.tolist(), slots.tolist()
        ([True, True, False, True], [False, True, False, True])
    """
    framed = frame >= 0
    sizes = frame[framed].bincount()
    mass = torch.zeros_like(sizes, dtype=score.dtype).index_add(0, frame[framed], score[framed])
    summarised = top_mask(mass, min(room, len(sizes)))
    raw = top_mask(score, room - int(summarised.sum()))
    place = torch.arange(len(score), device=score.device)
    free = place.masked_fill(raw, -1)[framed]
    last = torch.full_like(sizes, -1).scatter_reduce(0, frame[framed], free, "amax")
    slots = torch.zeros_like(raw)
    slots[last[summarised & (last >= 0)]] = True
    left = room - int(raw.sum()) - int(slots.sum())
    further = top_mask(score.masked_fill(raw | slots, -torch.inf), left)
    return raw | slots | further, slots


def frame_means(states: Tensor, weights: Tensor, frame: Tensor) -> Tensor:
    """Average the entries of each frame, all alike where none has weight.

    Args:
        states: ``[G, v, d]``.
        weights: ``[G, v]``, at least 0.
        frame: int64 ``[v]``, frames counted from 0.

    Returns:
        float32 ``[G, F, d]``.

    Example:
        >>> states, weights = torch.tensor([[[1.0], [5.0], [3.0]]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> frame_means(states, weights, torch.tensor([0, 0, 1])).tolist()
        [[[2.0], [3.0]]]
    """
    count = len(frame.bincount())
    mass = weights.new_zeros(len(weights), count).index_add(1, frame, weights)
    weights = torch.where(mass[:, frame] > 0, weights, 1.0)
    mass = weights.new_zeros(len(weights), count).index_add(1, frame, weights)
    share = (weights / mass[:, frame])[..., None]
    total = torch.zeros(len(states), count, states.shape[-1], device=states.device)
    return total.index_add(1, frame, share * states.float())
