"""Let ``generate`` decode in a loop of our own: what transformers does not hand on to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from mmfast.adapters.cache import is_logical
from mmfast.adapters.ledger import Ledger

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding


@dataclass(frozen=True, eq=False)
class Generation:
    """One call of ``generate`` as transformers has prepared it.

    Attributes:
        model: whose call it is.
        ids: ``[B, S]`` int64 prompt.
        processors: list of logits processors.
        criteria: list of stopping criteria.
        config: the generation config.
        options: keywords of the model, the cache among them.
        streamer: takes tokens as they come, or None.
    """

    model: Any
    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    options: dict[str, Any]
    streamer: Any

    @property
    def cache(self) -> Any:
        """What the prompt and the answer are stored in; None = nothing."""
        return self.options.get("past_key_values")

    @property
    def mask(self) -> Tensor | None:
        """Which tokens of the cache and the prompt are real, ``[B, P]``; None = all."""
        return self.options.get("attention_mask")

    @property
    def other_mode(self) -> str:
        """How tokens are to be chosen, in words, where neither greedily nor by sampling; else empty."""
        mode = self.config.get_generation_mode()
        usual = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        return "" if usual else str(mode.value).replace("_", " ")

    def prefill(self) -> Any:
        """Read the prompt, and return what the model does."""
        return self.model._prefill(self.ids, self.config, self.options, is_first_iteration=True)


class Written(NamedTuple):
    """What a call of ``generate`` has come to.

    Attributes:
        ids: ``[B, S + T]`` int64, prompts and answers.
        scores: ``[B, V]`` per token where asked for, else None.
        logits: the same before processors.
    """

    ids: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


class Writing(Protocol):
    """The answers of a call, while their tokens are chosen."""

    def written(self) -> Written:
        """Return the tokens, when the last has been chosen."""


class OwnLoop(ABC):
    """Base of what decodes in place of transformers, which prepares inputs, processors, criteria and the cache.

    Args:
        binding: the plan at work on the model whose ``generate`` is wrapped.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding, self.adapter = binding, binding.adapter
        self._inputs: dict[str, Any] = {}
        self._streamer: Any = None

    def attach(self, ledger: Ledger) -> None:
        """Wrap the model's ``generate``."""
        model = self.adapter.model
        ledger.set_attribute(model, "generate", self._wrapped(model.generate))

    @abstractmethod
    def go_on_from(self, before: Any) -> None:
        """Take over what the loop of the same plan has learnt or compiled before."""

    @abstractmethod
    def takes(self, given: dict[str, Any]) -> bool:
        """Say whether a call with these keywords is decoded here; else transformers does it."""

    @abstractmethod
    def refuse(self, call: Generation) -> None:
        """Refuse what cannot be decoded here.

        Raises:
            ValueError: naming it, and what to do.
        """

    @abstractmethod
    def answer(self, call: Generation) -> Writing:
        """Read the prompt and choose all tokens; the layers of the cache are logical."""

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
        call = Generation(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            self._streamer,
        )
        self.refuse(call)
        if not is_logical(call.cache):
            self.binding.adopt(call.cache, call.mask)
        answer = self.answer(call)
        if call.streamer is not None:
            call.streamer.end()
        ids, scores, logits = answer.written()
        if not generation_config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits, past_key_values=call.cache)

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(signature(original).parameters)

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
            if not self.takes(kwargs):
                return original(*args, **kwargs)
            # transformers hands neither of these on to a loop that is not its own.
            self._streamer = kwargs.get("streamer")
            taken = _take_stop_strings(kwargs, self.adapter.model.generation_config)
            self._inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            ids = args[0] if args else self._inputs.pop("inputs", None)
            if isinstance(ids, Tensor):
                self._inputs["input_ids"] = ids
            try:
                with without_stop_strings(self.adapter.model) if taken else nullcontext():
                    return original(*args, custom_generate=self.decode, **kwargs)
            finally:
                self._inputs, self._streamer = {}, None

        return generate


@contextmanager
def without_stop_strings(model: Any) -> Iterator[None]:
    """Hide the ``stop_strings`` of a model's own config: transformers fills up every other config with them."""
    own = model.generation_config
    strings, own.stop_strings = own.stop_strings, None
    try:
        yield
    finally:
        own.stop_strings = strings


def _take_stop_strings(kwargs: dict[str, Any], own: Any) -> bool:
    """Turn ``stop_strings`` and the tokenizer they need into a criterion, and say whether there were any.

    Args:
        kwargs: of ``generate``, which are changed.
        own: the model's own config.
    """
    tokenizer, config = kwargs.get("tokenizer"), kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None) or own.stop_strings
    if tokenizer is None or strings is None:
        # Without a tokenizer transformers says what is missing.
        return False
    kwargs.pop("stop_strings", None)
    if config is not None:
        kwargs["generation_config"] = copy(config)
        kwargs["generation_config"].stop_strings = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
    return True
