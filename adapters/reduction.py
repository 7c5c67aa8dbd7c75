"""Before the decoder: let a method choose among the visual tokens, and number those that enter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmfast.adapters.call import Inner
from mmfast.adapters.clip import ClipReader
from mmfast.adapters.media import Segment
from mmfast.token_pruning.base import BeforeLLM, Merger, Method
from mmfast.tokens import Keep, Layout, VisualTokens


def reduce_media(
    method: BeforeLLM | None, inner: Inner, embeds: Tensor, valid: Tensor, clip: ClipReader | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Ask a method about each image and video, and leave out what was not encoded.

    Args:
        method: the method of the stage; None drops nothing of what was encoded.
        inner: the call, with its segments.
        embeds: ``[B, S, D]`` embeddings, visual features in place.
        valid: ``[B, S]`` bool, False for padding.
        clip: what a CLIP model says of the prompts, for methods that want it.

    Returns:
        ``[B, S]`` bool of what stays, the embeddings with merged features in place, and whether
        anything was dropped or merged.
    """
    keep, embeddings, changed = valid.clone(), embeds, False
    for row, parts in enumerate(inner.segments):
        text = {} if method is None else _text(method, embeds, valid, inner, row)
        if clip is not None:
            text.update(clip.text(row, parts))
        for index, whole in enumerate(parts):
            part = whole.shown()
            slots = part.slots.to(embeds.device)
            decision = None if method is None else _decision(method, index, part, embeds[row, slots], text, clip)
            if decision is None and part is whole:
                continue
            changed = True
            keep[row, whole.slots.to(embeds.device)] = False
            keep[row, slots if decision is None else slots[decision.indices]] = True
            if decision is None:
                continue
            if decision.features is not None:
                embeddings = _overwrite(embeddings, row, slots, decision)
            if decision.sizes is not None:
                if inner.sizes is None:
                    inner.sizes = torch.ones(valid.shape, device=embeds.device)
                inner.sizes[row, slots[decision.indices]] = decision.sizes.to(embeds.device)
    return keep, embeddings, changed


def _decision(
    method: BeforeLLM, index: int, part: Segment, features: Tensor, text: dict[str, Tensor], clip: ClipReader | None
) -> Keep | None:
    """Ask a method about one image or video.

    Args:
        method: the method.
        index: which one of its prompt this is.
        part: the image or video.
        features: ``[n, D]`` its embeddings.
        text: signals of the prompt.
        clip: what a CLIP model says, for methods that want it.
    """
    merging = isinstance(method, Merger)
    features = features if merging else features.detach()
    signals = {**text, **_vision(method, part, features.device, detach=not merging)}
    if clip is not None:
        signals.update(clip.image(part))
    projectable = method.vision_signals().get("patch_features") in part.projections
    with torch.set_grad_enabled(merging and torch.is_grad_enabled()):
        decision = method(VisualTokens(features, part.layout, index, signals, projectable))
        if decision is not None and decision.space == "vision":
            decision = _projected(method, part, decision)
    return decision


def number_candidates(inner: Inner, keep: Tensor) -> None:
    """Number the tokens that layers may drop; newline tokens are none of them."""
    batch, length = keep.shape
    inner.candidate = torch.zeros(batch, length, dtype=torch.bool)
    # Text belongs to no image: methods that route text too tell it by -1.
    inner.number = torch.full((batch, length), -1, dtype=torch.int64)
    inner.media = torch.full((batch, length), -1, dtype=torch.int64)
    entering = keep.cpu()
    for row, parts in enumerate(inner.segments):
        totals: list[int] = []
        layouts: list[Layout] = []
        for index, part in enumerate(parts):
            slots = part.slots.cpu()
            enters = entering[row, slots] & ~part.layout.is_newline
            slots = slots[enters]
            layouts.append(part.layout.take(enters))
            inner.candidate[row, slots] = True
            inner.media[row, slots] = index
            inner.number[row, slots] = torch.arange(slots.numel()) + sum(totals)
            totals.append(int(slots.numel()))
        inner.media_totals.append(tuple(totals))
        inner.layouts.append(tuple(layouts))
        inner.memory.append({})


def _text(method: BeforeLLM, embeds: Tensor, valid: Tensor, inner: Inner, row: int) -> dict[str, Tensor]:
    if "text_embeds" not in method.needs:
        return {}
    text = valid[row].clone()
    for part in inner.segments[row]:
        text[part.slots.to(text.device)] = False
    return {"text_embeds": embeds[row, text].detach()}


def _overwrite(embeddings: Tensor, row: int, slots: Tensor, decision: Keep) -> Tensor:
    """Put merged features into the slots that stay; rows of NaN mark slots left as they are."""
    features = decision.features
    if features is None:
        return embeddings
    merged = ~features[:, 0].isnan()
    places = slots[decision.indices[merged]]
    rows = torch.full_like(places, row)
    return embeddings.index_put((rows, places), features[merged].to(embeddings.dtype))


def _vision(method: Method, part: Segment, device: torch.device, *, detach: bool = True) -> dict[str, Tensor]:
    """Name what a method asked to know of the vision encoder.

    Raises:
        ValueError: if it was not read when the media were encoded.
    """
    found = {}
    for name, spec in method.vision_signals().items():
        value = part.signals.get(spec)
        if value is None:
            raise ValueError(
                f"method {method.name!r} needs {spec.kind!r} of the vision encoder, which was not read for this "
                f"{part.layout.modality}: its features were made before this plan was active, or they do not fit the "
                "placeholders row by row; encode the media after accelerate(), in the order of the prompts"
            )
        found[name] = (value.detach() if detach else value).to(device)
    return found


def _projected(method: Method, part: Segment, decision: Keep) -> Keep:
    """Turn features of the vision encoder into embeddings; rows of NaN stay what they are.

    Raises:
        ValueError: if the model's projector does not work token by token.
    """
    spec = method.vision_signals().get("patch_features")
    project = None if spec is None else part.projections.get(spec)
    if project is None or decision.features is None:
        raise ValueError(
            f"method {method.name!r} returned features of the vision encoder, but for this {part.layout.modality} the "
            "projector cannot work on them token by token; return space='llm' where tokens.projectable is False"
        )
    merged = ~decision.features[:, 0].isnan()
    rows = project(decision.features[merged])
    features = rows.new_full((len(decision), rows.shape[-1]), float("nan"))
    return replace(decision, features=features.index_put((merged.nonzero().squeeze(-1),), rows), space="llm")


def slot_signals(parts: list[Segment], slots: Tensor, method: Method) -> dict[str, Tensor]:
    """Collect what a method asked to know of the vision encoder, for some slots of one prompt.

    Args:
        parts: the images and videos of the prompt.
        slots: ``[V]`` int64, ascending places of tokens in the prompt, on the CPU; text gets zeros.
        method: the method.

    Returns:
        By the method's names, ``[V]`` or ``[V, C]``.

    Raises:
        ValueError: if it was not read when the media were encoded.
    """
    found: dict[str, Tensor] = {}
    for part in (whole.shown() for whole in parts):
        own = part.slots.cpu()
        # Slots of a part ascend, so a binary search finds the place of each.
        places = torch.searchsorted(own, slots).clamp_max(len(own) - 1)
        mine = (own[places] == slots).nonzero().squeeze(-1)
        if not mine.numel():
            continue
        for name, value in _vision(method, part, part.slots.device).items():
            target = found.setdefault(name, value.new_zeros(len(slots), *value.shape[1:]))
            target[mine.to(value.device)] = value[places[mine].to(value.device)]
    return found
