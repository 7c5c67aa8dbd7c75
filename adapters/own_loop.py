"""Let ``generate`` decode in a loop of our own: what transformers does not hand on to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import wraps
from inspect import signature
from typing import Any

from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from mmfast.adapters.ledger import Ledger


class OwnLoop(ABC):
    """Base of what decodes in place of transformers, which prepares inputs, processors, criteria and the cache.

    Args:
        model: the model whose ``generate`` is wrapped.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._inputs: dict[str, Any] = {}
        self._streamer: Any = None

    def attach(self, ledger: Ledger) -> None:
        """Wrap the model's ``generate``."""
        ledger.set_attribute(self._model, "generate", self._wrapped(self._model.generate))

    @abstractmethod
    def go_on_from(self, before: Any) -> None:
        """Take over what the loop of the same plan has learnt or compiled before."""

    @abstractmethod
    def takes(self, given: dict[str, Any]) -> bool:
        """Say whether a call with these keywords is decoded here; else transformers does it."""

    @abstractmethod
    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode one call of ``generate``; what it needs has been prepared by transformers."""

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(signature(original).parameters)

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            if not self.takes(kwargs):
                return original(*args, **kwargs)
            # transformers hands neither of these on to a loop that is not its own.
            self._streamer = kwargs.get("streamer")
            _take_stop_strings(kwargs)
            self._inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            ids = args[0] if args else self._inputs.pop("inputs", None)
            if isinstance(ids, Tensor):
                self._inputs["input_ids"] = ids
            try:
                return original(*args, custom_generate=self.decode, **kwargs)
            finally:
                self._inputs, self._streamer = {}, None

        return generate


def _take_stop_strings(kwargs: dict[str, Any]) -> None:
    """Turn ``stop_strings`` and the tokenizer they need into a criterion."""
    tokenizer, config = kwargs.get("tokenizer"), kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None)
    if tokenizer is None or strings is None:
        # Without a tokenizer transformers says what is missing.
        return
    kwargs.pop("stop_strings", None)
    if config is not None:
        kwargs["generation_config"] = copy(config)
        kwargs["generation_config"].stop_strings = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
