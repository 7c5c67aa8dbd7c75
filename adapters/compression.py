"""Compression tokens of a model: their entry in the vocabulary, what they hide, and what leaves the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken

from mmfast.adapters.base import Adapter
from mmfast.adapters.call import Inner
from mmfast.plan import Plan
from mmfast.token_pruning.base import check_choice
from mmfast.token_pruning.compression_base import Compressor, Hidden

_TOKEN = "<voco>"  # noqa: S105 - no password
_KEY = "voco"
"""Where the configuration of the model and that of the tokenizer keep it."""


@dataclass(frozen=True)
class CompressionTokens:
    """What a model and its processor know of their compression tokens.

    Attributes:
        token: how it is written.
        token_id: its number in the vocabulary.
        tokens: how many of them stand behind each image.
        hide_prefix: what they hide beside the image, see the method ``voco``.
    """

    token: str
    token_id: int
    tokens: int
    hide_prefix: str


def add_compression_tokens(
    model: nn.Module, processor: Any, tokens: int = 4, hide_prefix: str = "all"
) -> CompressionTokens:
    """Give a model and its processor the token ``<voco>``, in place.

    Both write it down with ``save_pretrained`` and know it again after ``from_pretrained``. The new row of the
    vocabulary is the mean of the others: it has to be trained. Where the token is there already, only the numbers
    change.

    Args:
        model: a vision-language model, without a plan at work on it.
        processor: its processor; :func:`mmfast.adapters.prepare` will write the tokens behind each image.
        tokens: how many behind each image.
        hide_prefix: ``"all"`` or ``"visual"``, see the method ``voco``.

    Returns:
        What was added.

    Raises:
        ValueError: if a number is out of range, or ``<voco>`` means something else to the tokenizer.

    Example:
        >>> import mmfast
        >>> model, processor = mmfast.load_default()
        >>> add_compression_tokens(model, processor, tokens=2).token_id
        617
    """
    if isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} must be an int of at least 1")
    check_choice("hide_prefix", hide_prefix, ["all", "visual"])
    tokenizer, config = processor.tokenizer, model.config
    known = compression_tokens(model)
    if known is None:
        if len(tokenizer(_TOKEN, add_special_tokens=False)["input_ids"]) == 1:
            raise ValueError(f"the tokenizer has a token {_TOKEN!r} already, of which the model knows nothing")
        tokenizer.add_tokens([AddedToken(_TOKEN, special=True, normalized=False)], special_tokens=True)
        _add_row(model, int(tokenizer.convert_tokens_to_ids(_TOKEN)), len(tokenizer))
    token_id = int(tokenizer.convert_tokens_to_ids(_TOKEN))
    added = CompressionTokens(_TOKEN, token_id, tokens, hide_prefix)
    setattr(config, _KEY, asdict(added))
    tokenizer.init_kwargs[_KEY] = asdict(added)
    return added


def _add_row(model: Any, token: int, size: int) -> None:
    """Make room for a token, and let it begin as the mean of all others."""
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(table.weight): table.weight for table in tables if table is not None}.values():
            weight[token] = weight[:token].float().mean(dim=0).to(weight.dtype)


def compression_tokens(owner: Any) -> CompressionTokens | None:
    """Read what a model or a processor knows of compression tokens; None if it has none.

    Args:
        owner: a model or a processor.

    Example:
        >>> import mmfast
        >>> compression_tokens(mmfast.load_default()[0]) is None
        True
    """
    tokenizer = getattr(owner, "tokenizer", None)
    known = getattr(owner.config, _KEY, None) if tokenizer is None else getattr(tokenizer, "init_kwargs", {}).get(_KEY)
    return CompressionTokens(**known) if isinstance(known, Mapping) else None


def split_compressed(processor: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Cut ONE prompt behind its last compression token.

    Args:
        processor: of the model.
        inputs: what :func:`mmfast.adapters.prepare` made, with one row.

    Returns:
        The inputs up to there, to be read once by :class:`mmfast.SharedContext`, and the token ids of the rest, the
        first question for its ``ask``.

    Raises:
        ValueError: if there are several prompts, or no compression token.

    Example:
        >>> import mmfast
        >>> from mmfast.adapters import prepare
        >>> from PIL import Image
        >>> model, processor = mmfast.load_default()
        >>> _ = add_compression_tokens(model, processor, tokens=2)
        >>> image, question = split_compressed(processor, prepare(processor, "red?", Image.new("RGB", (64, 64))))
        >>> tuple(image["input_ids"].shape), processor.decode(question)
        ((1, 260), 'red?<|assistant|>')
    """
    ids, known = inputs["input_ids"], compression_tokens(processor)
    places = [] if known is None else (ids == known.token_id).any(dim=0).nonzero().flatten().tolist()
    if ids.shape[0] != 1 or not places:
        raise ValueError(f"inputs must be one prompt with compression tokens, got {ids.shape[0]} with {len(places)}")
    end = places[-1] + 1
    first = {
        name: value[:, :end] if isinstance(value, Tensor) and value.ndim == 2 and value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    return first, ids[0, end:].tolist()


def settled_tokens(adapter: Adapter, plan: Plan) -> Plan:
    """Decide in the plan what methods with compression tokens leave to the model.

    Raises:
        ValueError: if the model has no such tokens, or cannot use them.
    """
    methods = list(plan.methods)
    for place, method in enumerate(methods):
        if not isinstance(method, Compressor):
            continue
        known = compression_tokens(adapter.model)
        if known is None:
            raise ValueError(
                f"method {method.name!r} needs a model with compression tokens, and this one has none: add them with "
                "mmfast.adapters.add_compression_tokens(model, processor) and train it (recipes/voco.toml), or load "
                "one that was"
            )
        if adapter.reads_both_ways:
            raise ValueError(
                f"method {method.name!r} is not possible for model type {adapter.model.config.model_type!r}, which "
                "reads prompts in both directions: what stands for an image would depend on the question"
            )
        if getattr(method, "hide_prefix", "") is None:
            methods[place] = replace(method, hide_prefix=known.hide_prefix)  # type: ignore[call-arg]
    return Plan(tuple(methods))


# ------------------------------------------------------------------------------ in a call


def hide_compressed(adapter: Adapter, inner: Inner, method: Compressor, embeds: Tensor) -> bool:
    """Ask a method, prompt by prompt, what is hidden, and note that for the call.

    Args:
        adapter: the adapter of the model.
        inner: the call, with its first level.
        method: the method.
        embeds: ``[B, S, D]`` embeddings of the prompt, to find the tokens where there are no ids.

    Returns:
        Whether anything is hidden.
    """
    marked = _marked(adapter, inner, embeds).cpu()
    slots = inner.levels[0].slots.cpu()
    found: list[list[Hidden]] = []
    for row, parts in enumerate(inner.segments):
        own = slots[row] if inner.levels[0].real is None else slots[row, inner.levels[0].real[row].cpu()]
        media = [part.slots.cpu() for part in parts]
        text = own[~torch.isin(own, torch.cat(media))] if media else own
        tokens = text[marked[row, text]]
        found.append(method.hidden(media, text, tokens) if media and tokens.numel() else [])
        if media and not tokens.numel():
            # A prompt that says nothing of compression tokens runs as it is, unless they were asked for.
            method.hidden(media, text, tokens)
    inner.tables["hidden"] = found
    return any(found)


def _marked(adapter: Adapter, inner: Inner, embeds: Tensor) -> Tensor:
    """Find the compression tokens of a call, bool ``[B, S]``."""
    known = compression_tokens(adapter.model)
    if known is None:
        return torch.zeros(embeds.shape[:2], dtype=torch.bool)
    if inner.input_ids is not None:
        return inner.input_ids == known.token_id
    table = adapter.base.get_input_embeddings()
    row: Tensor = table(torch.tensor(known.token_id, device=table.weight.device)).to(embeds)
    return (embeds == row).all(dim=-1)


def hide_pairs(visible: Tensor, inner: Inner) -> None:
    """Take what is hidden out of a mask, bool ``[B, 1, K, past + K]``, in place."""
    level = inner.levels[0]
    slots = level.slots.to(visible.device)
    stored = visible.shape[-1] - level.length
    for row, parts in enumerate(inner.tables["hidden"]):
        for one in parts:
            rows = slots[row] >= one.start
            columns = torch.isin(slots[row], one.places.to(slots.device))
            visible[row, 0, :, stored:] &= ~(rows[:, None] & columns)


def forget_hidden(inner: Inner) -> None:
    """Let the caches of all layers forget what no later token sees."""
    found: list[list[Hidden]] | None = inner.tables.pop("hidden", None)
    if not found or inner.cache is None or not any(found):
        return
    for layer in inner.cache.layers:
        keep = layer.real_entries().clone()
        places = (layer.slots - inner.seen)[:, None] if layer.places is None else layer.places - inner.seen
        for row, parts in enumerate(found):
            for one in parts:
                keep[row] &= ~torch.isin(places[row].long(), one.places.to(keep.device))
        layer.compact(keep)
