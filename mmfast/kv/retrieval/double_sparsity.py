"""Double Sparsity: a few channels of the keys say which entries are worth reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from mmfast.kv.base import top_mask
from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.quest import PromptReader, check_count
from mmfast.registry import register
from mmfast.token_pruning.base import check_choice


@register("double_sparsity", stage="cache", paper="arXiv 2408.07092", source="andy-yang-1/DoubleSparse", vectors=True)
@dataclass(frozen=True)
class DoubleSparsity(PromptReader):
    """Read the entries whose keys agree most with the query in a few strong channels.

    Every query head has its own channels, and so its own choice. The channels are those of the largest mean sizes
    of queries and keys, measured on the prompt itself or read from a file.

    Paper: "Post-Training Sparse Attention with Double Sparsity".

    Attributes:
        keep: entries of the prompt that each query head reads.
        group_factor: one channel of this many is looked at.
        label_bits: bits to which the chosen channels of keys and queries are rounded, with one scale per vector;
            None for none.
        criterion: what makes a channel strong: ``"qk"`` queries and keys, ``"q"`` or ``"k"`` alone.
        file: safetensors file with one int64 tensor ``[H, d]`` per layer, named by its index: the channels of each
            query head, strongest first; empty for measuring them on the prompt.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    group_factor: int = 16
    label_bits: int | None = None
    criterion: Literal["qk", "q", "k"] = "qk"
    file: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("group_factor", self.group_factor)
        if self.label_bits is not None:
            check_count("label_bits", self.label_bits)
        check_choice("criterion", self.criterion, ["qk", "q", "k"])

    def study(self, entries: Entries, kept: int) -> None:
        """Remember the channels ``[H, r]`` and the keys in them ``[H, n, r]``."""
        query = entries.view.query
        order = self._stored(entries, query) if self.file else channel_order(query, entries.keys, self.criterion)
        channels = order[:, : max(1, query.shape[-1] // self.group_factor)].clone()
        entries.memory.update(channels=channels, labels=label_keys(entries.keys, channels, self.label_bits))

    def _stored(self, entries: Entries, query: Tensor) -> Tensor:
        with safe_open(self.file, framework="pt") as stored:
            names, layer = stored.keys(), str(entries.layer)
            order: Tensor | None = stored.get_tensor(layer) if layer in names else None
        shape = (query.shape[0], query.shape[-1])
        if order is None or tuple(order.shape) != shape:
            found = "missing" if order is None else f"of shape {tuple(order.shape)}"
            raise ValueError(
                f"file={self.file!r}: the tensor {layer!r} is {found}; the model needs one of shape {shape} per layer"
            )
        return order.to(query.device)

    def read(self, step: Step, total: int, kept: int) -> Tensor | None:
        """Return the entries of the highest approximate logits, ``[H, total]``."""
        labels = step.memory["labels"]
        if labels.shape[1] != total:
            return None
        logits = label_logits(step.query[:, 0], step.memory["channels"], labels, self.label_bits)
        if step.real is not None:
            real = step.real[:, :total].repeat_interleave(logits.shape[0] // step.heads, dim=0)
            logits = logits.masked_fill(~real, -torch.inf)
        return top_mask(torch.nan_to_num(logits, nan=-torch.inf), kept)


def channel_order(query: Tensor, keys: Tensor, criterion: Literal["qk", "q", "k"] = "qk") -> Tensor:
    """Rank the channels of each query head by how large queries and keys are in them.

    Args:
        query: ``[H, n, d]``.
        keys: ``[G, n, d]``.
        criterion: which of them count.

    Returns:
        int64 ``[H, d]``, strongest first; ties go to the lower channel.

    Example:
        >>> channel_order(torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[3.0, 1.0]]])).tolist()
        [[0, 1]]
    """
    sizes = torch.ones(query.shape[0], query.shape[-1], device=query.device)
    if "q" in criterion:
        sizes = sizes * query.float().abs().mean(dim=1)
    if "k" in criterion:
        sizes = sizes * keys.float().abs().mean(dim=1).repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    return torch.nan_to_num(sizes).sort(dim=-1, descending=True, stable=True).indices


def label_keys(keys: Tensor, channels: Tensor, bits: int | None = None) -> Tensor:
    """Take a few channels of the keys.

    Args:
        keys: ``[G, n, d]``.
        channels: int64 ``[H, r]``, the channels of each query head.
        bits: bits to round to; None for none.

    Returns:
        ``[H, n, r]`` in the dtype of the keys; float32 where rounded.

    Example:
        >>> label_keys(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[2], [0]])).tolist()
        [[[3.0]], [[1.0]]]
    """
    grouped = rearrange(channels, "(g r) c -> g r c", g=keys.shape[0])
    picked = keys[:, None].expand(-1, grouped.shape[1], -1, -1)
    labels: Tensor = picked.gather(-1, grouped[:, :, None].expand(-1, -1, keys.shape[1], -1)).flatten(0, 1)
    return rounded(labels, bits) if bits else labels


def label_logits(query: Tensor, channels: Tensor, labels: Tensor, bits: int | None = None) -> Tensor:
    """Approximate the logits of a query from a few channels.

    Args:
        query: ``[H, d]``.
        channels: int64 ``[H, r]``.
        labels: ``[H, n, r]``.
        bits: bits to which the query is rounded; None for none.

    Returns:
        float32 ``[H, n]``.

    Example:
        >>> label_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1]]), torch.tensor([[[3.0]]])).tolist()
        [[6.0]]
    """
    picked = query.float().gather(-1, channels)
    picked = picked if bits is None else rounded(picked, bits)
    logits: Tensor = torch.einsum("hr,hnr->hn", picked, labels.float()) / float(channels.shape[-1]) ** 0.5
    return logits


def rounded(states: Tensor, bits: int) -> Tensor:
    """Round each vector ``[..., r]`` to ``2 ** bits`` evenly spaced values from its smallest to its largest; float32.

    Example:
        >>> rounded(torch.tensor([0.0, 0.4, 1.0]), 1).tolist()
        [0.0, 0.0, 1.0]
    """
    states = states.float()
    lowest = states.amin(dim=-1, keepdim=True)
    span = states.amax(dim=-1, keepdim=True) - lowest
    scale = float(2**bits - 1) / torch.where(span == 0, 1.0, span)
    return torch.round((states - lowest) * scale) / scale + lowest
