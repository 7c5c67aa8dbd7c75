"""The attention tap: read rows of attention beside the model's own attention function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmfast.adapters.ledger import Ledger

_PREFIX = "mmfast_"
_users: dict[str, int] = {}
_captures: WeakKeyDictionary[nn.Module, Capture] = WeakKeyDictionary()


class CaptureDone(Exception):
    """Ends an attention module early once its queries and keys have been read."""


@dataclass
class Capture:
    """One reading of one attention module.

    Attributes:
        rows: ``[B]`` int64, the query row to read of each prompt.
        stop: end the attention module right after reading.
        result: ``[B, H, KV]`` float32 probabilities, once read.
    """

    rows: Tensor
    stop: bool = False
    result: Tensor | None = None


def tap_name(implementation: str) -> str:
    """Name the tapped twin of an attention implementation.

    The original name stays inside, because transformers looks for "flash" and "sdpa" in it.
    """
    return _PREFIX + implementation


def register_tap(implementation: str, ledger: Ledger) -> None:
    """Register the tapped twin of ``implementation``; the last user's ledger takes it out again.

    Raises:
        ValueError: if no mask function stands beside the attention function; nothing is registered then.
    """
    name = tap_name(implementation)
    if _users.get(name, 0) == 0:
        # Without a mask function of the same name transformers silently passes no mask at all.
        mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
        if mask is None:
            raise ValueError(
                f"attention implementation {implementation!r} has no mask function; register one under that name with "
                "transformers.AttentionMaskInterface.register, or load the model with attn_implementation='sdpa'"
            )
        ALL_ATTENTION_FUNCTIONS.register(name, _make_tap(implementation))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    _users[name] = _users.get(name, 0) + 1

    def release() -> None:
        _users[name] -= 1
        if _users[name] == 0:
            del _users[name]
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)

    ledger.enter(release)


def watch(module: nn.Module, capture: Capture) -> None:
    """Fill ``capture`` when ``module`` next attends."""
    _captures[module] = capture


def unwatch(module: nn.Module) -> None:
    """Stop watching a module."""
    _captures.pop(module, None)


def _make_tap(implementation: str) -> Callable[..., Any]:
    def tap(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        capture = _captures.get(module)
        if capture is not None:
            scaling = kwargs.get("scaling")
            capture.result = attention_rows(
                query, key, attention_mask, capture.rows, scaling=scaling, softcap=kwargs.get("softcap")
            )
            if capture.stop:
                raise CaptureDone
        return _original(implementation, module)(module, query, key, value, attention_mask, *args, **kwargs)

    return tap


def _original(implementation: str, module: nn.Module) -> Callable[..., Any]:
    if implementation == "eager":
        # The eager function belongs to the model family: it may cap logits or add sinks.
        modelling: Any = sys.modules[type(module).__module__]
        found: Callable[..., Any] = modelling.eager_attention_forward
        return found
    chosen: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return chosen


@torch.no_grad()
def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute one row of attention per prompt, in float32 and without the full matrix.

    Args:
        query: ``[B, H, Q, d]`` rotated queries.
        key: ``[B, G, KV, d]`` rotated keys; G divides H.
        mask: None (causal), ``[B, KV]`` (1 = real) or ``[B or 1, 1 or H, Q, KV]`` bool (True = visible) or additive.
        rows: ``[B]`` int64 query rows.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.

    Returns:
        float32 ``[B, H, KV]``, each row summing to one.

    Example:
        >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
        >>> attention_rows(q, k, None, torch.tensor([1]))[0, 0].tolist()
        [0.5, 0.5, 0.0]
    """
    batch, _heads, queries, width = query.shape
    length = key.shape[2]
    every = torch.arange(batch, device=query.device)
    picked = rearrange(query[every, :, rows], "b (g r) d -> b g r d", g=key.shape[1]).float()
    logits = torch.einsum("bgrd,bgkd->bgrk", picked, key.float()) * (width**-0.5 if scaling is None else scaling)
    logits = rearrange(logits, "b g r k -> b (g r) k")
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    visible = torch.arange(length, device=query.device) <= (rows + length - queries)[:, None]
    if mask is None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    elif mask.ndim == 2:
        logits = logits.masked_fill(~(visible & mask[:, -length:].bool())[:, None], -torch.inf)
    else:
        row = mask.expand(batch, -1, -1, -1)[every, :, rows]
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row.float()
    return logits.softmax(dim=-1)
