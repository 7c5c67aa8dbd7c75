"""Hooks around the outer model: they note what it is called with, before the decoder gets embeddings alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

from torch import Tensor, nn

from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import is_logical, reference_layer
from mmfast.adapters.call import Inner, Outer
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.masks import decoder_mask
from mmfast.adapters.media import feature_source, modalities, placeholder_masks, tagged
from mmfast.adapters.recorder import Recorder
from mmfast.adapters.static import readable_mask


@dataclass(frozen=True)
class Prompt:
    """The last prompt run without a cache, to recognise it when generated tokens follow it.

    Without a cache every step reads the whole sequence again. What the last *prompt* token looks at
    must decide in each of them, or every generated token would change what was dropped.

    Attributes:
        input_ids: ``[B, S]`` of the prompt.
        length: tokens of the latest call.
        features: what brought its features; weak, so that they are not kept alive.
    """

    input_ids: Tensor
    length: int
    features: ref[Any]

    def continued_by(self, outer: Outer) -> bool:
        """Say whether a call is this prompt with one more generated token."""
        ids, own = outer.input_ids, self.input_ids
        return (
            ids is not None
            and outer.features is self.features()
            and ids.shape == (own.shape[0], self.length + 1)
            and bool((ids[:, : own.shape[1]] == own).all())
        )


class OuterBoundary:
    """Note what the outer model is called with, for the length of the call.

    Args:
        adapter: the adapter of the model.
        recorder: books the calls.
        abandon: ends a call of the decoder that was broken off.

    Attributes:
        call: what the outer model was called with; None between calls. One that was broken off in a way that runs
            no hooks stays until :meth:`forget` or the next.
    """

    def __init__(self, adapter: Adapter, recorder: Recorder, abandon: Callable[[], None]) -> None:
        self.adapter, self.recorder, self._abandon = adapter, recorder, abandon
        self.call: Outer | None = None
        self._prompt: Prompt | None = None
        self._drafted = 0
        self._arguments = tuple(inspect.signature(adapter.base.forward).parameters)

    def attach(self, ledger: Ledger) -> None:
        """Hook the outer model."""
        base = self.adapter.base
        ledger.hook(self.adapter.model.register_forward_pre_hook(self._before_call, with_kwargs=True))
        ledger.hook(base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        ledger.hook(base.register_forward_hook(self._after_model, always_call=True))

    def forget(self) -> None:
        """End a call that was broken off, such as by Ctrl-C."""
        self._abandon()
        self.call = None

    def prompt_end(self, inner: Inner) -> int | None:
        """Find the last prompt token where generated or drafted tokens follow it in this call; None = none do."""
        if inner.cache is None and inner.events:
            return None if self.call is None else self._continued(self.call)
        return inner.length - 1 - self._drafted if self._drafted else None

    def _continued(self, call: Outer) -> int | None:
        """Remember the prompt, and find its end when this call only adds a generated token to it."""
        if self._prompt is not None and self._prompt.continued_by(call):
            self._prompt = replace(self._prompt, length=self._prompt.length + 1)
            return int(self._prompt.input_ids.shape[1]) - 1
        ids = call.input_ids
        self._prompt = None if ids is None else Prompt(ids.clone(), int(ids.shape[1]), ref(call.features))
        return None

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out where the prompt ends: assisted decoding appends drafted tokens and asks for the logits of each."""
        asked = kwargs.get("logits_to_keep")
        cached = kwargs.get("past_key_values") is not None
        self._drafted = asked - 1 if cached and isinstance(asked, int) and asked > 1 else 0

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._abandon()
        named = {**dict(zip(self._arguments, args, strict=False)), **kwargs} if args else kwargs
        mask = named.get("attention_mask")
        call = self.call = Outer(attention_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
        cache = named.get("past_key_values")
        brought = modalities(named)
        if brought:
            call.input_ids, call.features = named.get("input_ids"), feature_source(named)
            call.attention_mask = readable_mask(named)
            ids = {name: token for name, token in self.adapter.placeholders.items() if name in brought}
            call.visual = placeholder_masks(named, ids, self.adapter.base.get_input_embeddings())
            for modality, output in (named.get("mm_encoder_outputs") or {}).items():
                known = tagged(output)
                if known is not None:
                    call.layouts[modality] = known
                elif output is not None:
                    call.untagged = modality
            self.recorder.begin_prefill()
        elif cache is not None and cache.get_seq_length() > 0:
            self.recorder.begin_step()
        if self.adapter.masks_before_decoder and is_logical(cache):
            return args, {**kwargs, "attention_mask": _aligned(cache, named, call)}
        return None

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.call is not None:
            cache = getattr(output, "past_key_values", None)
            self.recorder.end_call(prefill=bool(self.call.visual), cache=cache)
        self.call = None
        self._drafted = 0


def _aligned(cache: Any, named: dict[str, Any], call: Outer) -> Tensor:
    """Right-align the 2-D mask for families that build 4-D masks from it themselves."""
    tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    batch, query = tokens.shape[:2]
    new = None if call.attention_mask is None else call.attention_mask[:, -query:].bool()
    return decoder_mask(reference_layer(cache), batch, query, new, tokens.device).long()
