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
        token: how the first is written.
        token_id: its number in the vocabulary.
        tokens: how many stand behind each image.
        hide_prefix: what they hide beside the image, see the method ``voco``.
        entries: of the vocabulary, ``token_id`` and the following numbers. 1 (the official code): all tokens are copies
            of one; more: each is another, and there cannot be more of them.
    """

    token: str
    token_id: int
    tokens: int
    hide_prefix: str
    entries: int = 1

    def names(self) -> list[str]:
        """Return how each entry is written."""
        return [self.token, *(f"{self.token[:-1]}_{number}>" for number in range(2, self.entries + 1))]

    def written(self) -> str:
        """Return what stands behind each image."""
        return self.token * self.tokens if self.entries == 1 else "".join(self.names()[: self.tokens])

    def find(self, ids: Tensor) -> Tensor:
        """Say which token ids are compression tokens, bool of the same shape."""
        return (ids >= self.token_id) & (ids < self.token_id + self.entries)

    def of(self, count: int) -> CompressionTokens:
        """Return the same with another number behind each image.

        Raises:
            ValueError: if there are not so many.
        """
        if self.entries > 1 and count > self.entries:
            raise ValueError(f"{count} compression tokens are asked for, but only {self.entries} differ: take no more")
        return replace(self, tokens=count)


def add_compression_tokens(
    model: nn.Module, processor: Any, tokens: int = 4, hide_prefix: str = "all", *, distinct: bool = False
) -> CompressionTokens:
    """Give a model and its processor the token ``<voco>``, in place.

    Both write it down with ``save_pretrained`` and know it again after ``from_pretrained``. The new row of the
    vocabulary is the mean of the others, and has to be trained. Where the token is there already, only the numbers
    change.

    Args:
        model: a vision-language model, without a plan at work on it.
        processor: its processor; :func:`mmfast.adapters.prepare` will write the tokens behind each image.
        tokens: how many behind each image.
        hide_prefix: ``"all"`` or ``"visual"``, see the method ``voco``.
        distinct: give each of the tokens a row of its own, ``<voco>``, ``<voco_2>``, ..., instead of copies of one that
            only their positions tell apart (ours). The rows begin a little apart, and learn to divide the image sooner.

    Returns:
        What was added.

    Raises:
        ValueError: if a number is out of range, the tokens are there already and other than asked for, or ``<voco>``
            means something else to the tokenizer.

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
        known = CompressionTokens(_TOKEN, -1, tokens, hide_prefix, tokens if distinct else 1)
        names = [AddedToken(name, special=True, normalized=False) for name in known.names()]
        tokenizer.add_tokens(names, special_tokens=True)
        known = replace(known, token_id=int(tokenizer.convert_tokens_to_ids(_TOKEN)))
        _add_rows(model, known, len(tokenizer))
    elif distinct and known.entries == 1 < tokens:
        raise ValueError("distinct=True, but the model has compression tokens that are copies of one; load one without")
    added = replace(known.of(tokens), hide_prefix=hide_prefix)
    setattr(config, _KEY, asdict(added))
    tokenizer.init_kwargs[_KEY] = asdict(added)
    return added


def _add_rows(model: Any, known: CompressionTokens, size: int) -> None:
    """Make room for tokens, and let them begin as the mean of all others; where they are several, a little apart."""
    if model.get_input_embeddings().weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    first, count = known.token_id, known.entries
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in {id(table.weight): table.weight for table in tables if table is not None}.values():
            others = weight[:first].float()
            apart = torch.randn(count, weight.shape[1], generator=chance).to(others.device) * others.std(dim=0)
            weight[first : first + count] = (others.mean(dim=0) + apart * (count > 1)).to(weight.dtype)


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
    places = [] if known is None else known.find(ids).any(dim=0).nonzero().flatten().tolist()
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
    inner.tables["marked"] = marked = _marked(adapter, inner, embeds).cpu()
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
        return known.find(inner.input_ids)
    table = adapter.base.get_input_embeddings()
    ids = torch.arange(known.token_id, known.token_id + known.entries, device=table.weight.device)
    # One entry at a time: all at once would take as much memory as the embeddings for each of them.
    marked = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for row in table(ids).to(embeds):
        marked |= (embeds == row).all(dim=-1)
    return marked


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
    inner.tables.pop("marked", None)
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
