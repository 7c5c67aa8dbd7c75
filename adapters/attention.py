"""The attention tap: read what a module attends with, beside the model's own attention function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmfast.adapters.ledger import Ledger
from mmfast.token_pruning.attention import AttentionView

_PREFIX = "mmfast_"
_users: dict[str, int] = {}
_listeners: WeakKeyDictionary[nn.Module, list[Listener]] = WeakKeyDictionary()


class CaptureDone(Exception):
    """Ends an attention module early once its queries and keys have been read."""


Operands = tuple[Tensor, Tensor, Any]
"""Keys, values and mask of an attention function."""


@dataclass(frozen=True, eq=False)
class Attended:
    """What a module attends to, worked out by a listener: its own attention function is not called.

    Attributes:
        output: ``[B, H, Q, d]``.
    """

    output: Tensor


class Listener(Protocol):
    """Whoever wants to know what a module attends with, to change it, or to attend itself."""

    def take(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Operands | Attended | None:
        """Take what the attention function is about to be called with; its keywords are in ``options``.

        Returns:
            Keys, values and mask to attend with instead, the result of attending, or None to leave them. Listeners
            that come later are told all the same, and see keys, values and mask as they were left.
        """


@dataclass
class Capture:
    """One reading of one attention module: references to what it attends with, no copies.

    Attributes:
        slots: ``[B, Q]`` int64 places in the prompt of the tokens that attend.
        stop: end the attention module right after reading.
        query: ``[B, H, Q, d]``, once read.
        key, value: ``[B, G, past + Q, d]``.
        mask: as the attention function got it: None, ``[B, KV]`` or ``[B or 1, 1 or H, Q, KV]``.
        scaling: factor of the logits.
        softcap: cap of the logits.
        causal: whether tokens see only what comes before them, where no 4-D mask says so.
        real: ``[B, Q]`` bool, which of the tokens are real; None = all.
        attached: keep the gradients of queries, keys and values.
    """

    slots: Tensor
    stop: bool = False
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    causal: bool = True
    real: Tensor | None = None
    attached: bool = False

    def take(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
        """Keep references.

        Raises:
            CaptureDone: if nothing else of the module is wanted.
        """
        # Without a gradient the references cost nothing; with one they keep the graph alive.
        read = (query, key, value) if self.attached else (query.detach(), key.detach(), value.detach())
        self.query, self.key, self.value = read
        self.mask = mask
        self.scaling, self.softcap = options.get("scaling"), options.get("softcap")
        self.causal = bool(options.get("is_causal", True))
        if self.stop:
            raise CaptureDone

    def view(self, row: int, places: Tensor | None, past: Tensor | None = None) -> AttentionView:
        """Return the attention of one prompt.

        Args:
            row: row of the batch.
            places: ``[n]`` int64, which of the Q tokens belong to the prompt; None = all.
            past: ``[m]`` int64, which columns stand for the past; None = all before the Q tokens.
        """
        if self.query is None or self.key is None or self.value is None:
            raise RuntimeError("an attention module was not run between the request for its attention and its use")
        query, key, value = self.query[row], self.key[row], self.value[row]
        before = key.shape[1] - query.shape[1]
        mask = self._mask(row, query.shape[1], before)
        # Read without the past, the columns of the past stand in the mask all the same.
        mask = None if mask is None else mask[..., -key.shape[1] :]
        if places is not None:
            places = places.to(query.device)
            past = torch.arange(before, device=query.device) if past is None else past.to(query.device)
            columns = torch.cat([past, places + before])
            query, key, value = query[:, places], key[:, columns], value[:, columns]
            mask = None if mask is None else mask[..., places, :][..., columns]
        return AttentionView(query, key, value, self.scaling, self.softcap, mask)

    def _mask(self, row: int, queries: int, past: int) -> Tensor | None:
        """Return ``[Q, past + Q]`` or ``[H, Q, past + Q]``, or None where causality says it all."""
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            own = mask[row if mask.shape[0] > 1 else 0]
            return own[0] if own.shape[0] == 1 else own
        if mask is not None and (mask.numel() == 0 or bool(mask[row, -(past + queries) :].all())):
            mask = None
        if mask is None and self.causal:
            return None
        visible = torch.ones(1, past + queries, dtype=torch.bool, device=self.slots.device)
        if mask is not None:
            visible = mask[row, None, -(past + queries) :].bool()
        if not self.causal:
            return visible.expand(queries, -1)
        places = torch.arange(past + queries, device=visible.device)
        return (places <= places[past:, None]) & visible


def tap_name(implementation: str) -> str:
    """Name the tapped form of an attention implementation.

    The original name stays inside, because transformers looks for "flash" and "sdpa" in it.
    """
    return _PREFIX + implementation


def register_tap(implementation: str, ledger: Ledger) -> None:
    """Register the tapped form of ``implementation``; the last user's ledger takes it out again.

    Raises:
        ValueError: if no mask function stands beside the attention function; nothing is registered then.
    """
    # Without a mask function of the same name transformers silently passes no mask at all.
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    if mask is None:
        raise ValueError(
            f"attention implementation {implementation!r} has no mask function; register one under that name with "
            "transformers.AttentionMaskInterface.register, or load the model with attn_implementation='sdpa'"
        )
    _register(tap_name(implementation), _make_tap(implementation), mask, ledger)


def register_answered(ledger: Ledger) -> str:
    """Register a tap for modules whose every call a listener answers: no mask is made for them.

    Returns:
        Its name.
    """
    name = tap_name("answered")
    _register(name, _make_tap("answered"), _no_mask, ledger)
    return name


def _register(name: str, attend: Callable[..., Any], mask: Callable[..., Any], ledger: Ledger) -> None:
    if _users.get(name, 0) == 0:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    _users[name] = _users.get(name, 0) + 1

    def release() -> None:
        _users[name] -= 1
        if _users[name] == 0:
            del _users[name]
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)

    ledger.enter(release)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: who answers knows by itself who sees what."""


def watch(module: nn.Module, listener: Listener) -> Callable[[], None]:
    """Let ``listener`` know whenever ``module`` attends, until the function returned is called."""
    _listeners.setdefault(module, []).append(listener)

    def end() -> None:
        left = [other for other in _listeners.get(module, []) if other is not listener]
        if left:
            _listeners[module] = left
        else:
            _listeners.pop(module, None)

    return end


def watchers(module: nn.Module) -> int:
    """Say how many listeners a module has."""
    return len(_listeners.get(module, ()))


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
        answer: Attended | None = None
        for listener in _listeners.get(module, ()):
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            options = {**kwargs, "is_causal": causal}
            changed = listener.take(query, key, value, attention_mask, options)
            if isinstance(changed, Attended):
                answer = changed
            elif changed is not None:
                key, value, attention_mask = changed
        if answer is not None:
            return answer.output.transpose(1, 2).contiguous(), None
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
