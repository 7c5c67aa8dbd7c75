"""A second model that drafts: one that reads images, or any language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmfast.adapters.base import Adapter, for_model
from mmfast.adapters.cache import is_logical
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.media import FEATURE_KEYS
from mmfast.adapters.own_loop import without_stop_strings
from mmfast.adapters.turns import BESIDE, PER_TOKEN
from mmfast.plan import Plan
from mmfast.speculative.base import Drafter, Request

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding
    from mmfast.adapters.rounds import ModelRounds

_LEAST_SHARED = 0.9
"""Share of the larger vocabulary that padding at its end leaves at least."""
_READS_BACK = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose caches can forget their last tokens."""


def companion_of(
    adapter: Adapter, drafter: Drafter | None, model: Any, *, goes: Binding | None = None
) -> VisionCompanion | TextCompanion | None:
    """Return the second model of a plan, ready to be attached; nothing is done to it here.

    Args:
        adapter: of the model that verifies.
        drafter: of the plan, if any.
        model: the second model, if any.
        goes: the plan on a second model that will have been taken off by then.

    Raises:
        TypeError: if it is no model, or no adapter serves it and one is needed.
        ValueError: if it is missing, nobody uses it, or the two do not fit.
    """
    kind = "" if drafter is None else drafter.companion
    if model is None:
        if drafter is not None and kind:
            raise ValueError(
                f"method {drafter.name!r} drafts with a second model; pass it to accelerate() as draft_model=..."
            )
        return None
    if drafter is None or not kind:
        user = "the plan has no drafter" if drafter is None else f"method {drafter.name!r} drafts without one"
        raise ValueError(f"draft_model was given, but {user}; leave it out, or plan 'assistant()' or 'text_draft()'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"draft_model must be a Hugging Face model, got {type(model).__name__}")
    if model is adapter.model:
        raise ValueError(
            "draft_model is the model itself, which would cost as much as it saves; pass a smaller one, or use "
            "'swift()', with which a model drafts for itself"
        )
    vision = kind == "vision"
    found = VisionCompanion(adapter, drafter, model, goes) if vision else TextCompanion(adapter, drafter, model)
    sizes = found.vocabulary, _vocabulary(adapter.model)
    if min(sizes) < _LEAST_SHARED * max(sizes):
        raise ValueError(
            f"draft_model has {sizes[0]} tokens and the model {sizes[1]}, which is more than padding at the end of one "
            "vocabulary: their tokenizers differ, and tokens of one mean nothing to the other; pass a draft_model with "
            "the same tokenizer"
        )
    return found


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


class VisionCompanion:
    """A smaller vision-language model with a plan of its own.

    Args:
        target: adapter of the model that verifies.
        drafter: whose model it is.
        model: the smaller model.
        goes: the plan on a second model that will have been taken off by the time this one is attached.

    Raises:
        TypeError: if no adapter serves it.
        ValueError: if it reads other placeholders, or cannot do what its plan asks for.
    """

    def __init__(self, target: Adapter, drafter: Drafter, model: Any, goes: Binding | None = None) -> None:
        from mmfast.adapters.binding import active_on
        from mmfast.adapters.refusals import refuse_impossible

        try:
            self.adapter = for_model(model)
        except TypeError as error:
            raise TypeError(f"draft_model: {error}; a language model without images drafts in 'text_draft()'") from None
        self.target, self.model, self.name = target, self.adapter.model, drafter.name
        own, others = self.adapter.placeholders, target.placeholders
        differ = [kind for kind in others if own.get(kind) != others[kind]]
        if differ:
            raise ValueError(
                f"draft_model marks {differ[0]}s by token {own.get(differ[0])}, the model by {others[differ[0]]}: "
                "it cannot read the same input_ids; pass a draft_model with the same processor"
            )
        if self.model is target.model:
            raise ValueError("draft_model is the model itself inside a wrapper; pass a smaller one")
        implementation = self.adapter.text_config._attn_implementation
        if implementation == "flex_attention" or "|" in implementation:
            raise ValueError(
                f"draft_model attends with {implementation!r}, which has no mask for rows that accept more or fewer "
                "tokens; load it with attn_implementation='sdpa', 'eager' or a flash one"
            )
        self.plan = Plan.parse(str(getattr(drafter, "plan", "")))
        refuse_impossible(self.adapter, self.plan)
        running = active_on(self.model)
        if running is not None and running is not goes:
            raise ValueError(
                f"draft_model already runs the plan {running.plan.to_text()!r}; call remove() on it, and write what "
                f"it is to do into the options of {self.name!r}"
            )
        self.vocabulary = _vocabulary(self.model)
        self.binding: Binding | None = None
        self._media: dict[str, Any] = {}

    def attach(self, ledger: Ledger) -> None:
        """Put the plan of the smaller model to work."""
        from mmfast.adapters.binding import Binding

        self.binding = Binding(self.adapter, self.plan)
        ledger.enter(self.binding.detach)

    def read(self, request: Request) -> VisionReading | None:
        """Read the prompts with their images; None where images of earlier turns are not known any more.

        Raises:
            ValueError: if the smaller model cannot read them.
        """
        from mmfast.adapters.rounds import ModelRounds

        binding = self.binding
        if binding is None:
            raise RuntimeError("the second model has not been attached")
        inputs = self._inputs(request)
        if inputs is None:
            return None
        found: list[ModelRounds] = []

        def begin(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
            config = kwargs.pop("generation_config")
            kwargs = {name: value for name, value in kwargs.items() if name not in ("logits_processor", *_OF_THE_LOOP)}
            cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
            if not is_logical(cache):
                binding.adopt(cache, mask)
            rounds = ModelRounds(binding, cache)
            found.append(rounds)
            rounds.prefill(lambda: model._prefill(input_ids, config, kwargs, is_first_iteration=True), mask)
            return input_ids

        repeats = len(request.prompts) // max(1, len(inputs["input_ids"]))
        try:
            with without_stop_strings(self.model):
                self.model.generate(
                    **inputs,
                    custom_generate=begin,
                    max_new_tokens=request.max_new_tokens + 1,
                    do_sample=repeats > 1,
                    num_return_sequences=repeats,
                    num_beams=1,
                    use_cache=True,
                    cache_implementation="dynamic",
                    return_dict_in_generate=False,
                )
        except BaseException as error:
            binding.onlooker = None
            if not isinstance(error, ValueError):
                raise
            raise ValueError(
                f"draft_model {type(self.model).__name__} cannot read what was made for "
                f"{type(self.target.model).__name__}: {error}; method {self.name!r} needs a smaller model that shares "
                "the processor, with as many tokens for each image"
            ) from error
        return VisionReading(found[0], len(request.prompts), self.model.device)

    def _inputs(self, request: Request) -> dict[str, Any] | None:
        """Return what to call ``generate`` with; None where that is not known."""
        given = dict(request.inputs)
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError(
                f"method {self.name!r} lets draft_model read input_ids, and generate() was called without; pass what "
                "the processor returns"
            )
        brings = any(given.get(name) is not None for name in FEATURE_KEYS)
        marks = torch.tensor(list(self.adapter.placeholders.values()), device=ids.device)
        if brings:
            self._media = {n: v for n, v in given.items() if n in (*FEATURE_KEYS, *BESIDE, *PER_TOKEN, "input_ids")}
        elif bool(torch.isin(ids, marks).any()):
            known = self._media.get("input_ids")
            if known is None or known.shape[0] != ids.shape[0] or known.shape[1] > ids.shape[1]:
                return None
            if not torch.equal(known, ids[:, : known.shape[1]].to(known.device)):
                return None
            # What the model itself has written since brings no image.
            written = torch.isin(ids, marks).index_fill(1, torch.arange(known.shape[1], device=ids.device), False)
            given["input_ids"] = ids.masked_fill(written, 0)
            for name, value in self._media.items():
                if name in PER_TOKEN:
                    given.setdefault(name, torch.nn.functional.pad(value, (0, ids.shape[1] - value.shape[1])))
                elif name != "input_ids":
                    given[name] = value
        device, dtype = self.model.device, self.model.dtype
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in given.items()}


_OF_THE_LOOP = ("stopping_criteria", "streamer", "synced_gpus", "assistant_model")


class VisionReading:
    """The smaller model after the prompts of a call.

    Args:
        rounds: the model with its cache.
        batch: rows.
        device: of the model.
    """

    def __init__(self, rounds: ModelRounds, batch: int, device: torch.device) -> None:
        self.rounds, self.device = rounds, device
        self.unread: Sequence[Sequence[int]] = [()] * batch
        self._columns: list[list[int]] = [[] for _ in range(batch)]
        self._width = 0

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Run the next tokens of the rows named; ``[B, V]`` logits of what follows."""
        batch, longest = len(self._columns), max(map(len, tokens.values()))
        filler = next(iter(tokens.values()))[0]
        ids = torch.full((batch, longest), filler)
        real, depth = torch.zeros(batch, longest, dtype=torch.bool), torch.arange(longest).repeat(batch, 1)
        ends = torch.zeros(batch, dtype=torch.int64)
        for row, own in tokens.items():
            ids[row, : len(own)] = torch.tensor(list(own))
            real[row, : len(own)] = True
            depth[row] += len(self._columns[row])
            ends[row] = len(own) - 1
            self._columns[row] += range(self._width, self._width + len(own))
        self._width += longest
        device = self.device
        logits = self.rounds.forward(
            ids.to(device), None if bool(real.all()) else real.to(device), depth.to(device), None
        ).logits
        found: Tensor = logits[torch.arange(batch, device=device), ends.to(device)]
        return found

    def settle(self, kept: Mapping[int, int]) -> None:
        """Keep so many of the tokens that each row was given since the last time."""
        if self._width:
            paths = {row: columns[: kept.get(row, 0)] for row, columns in enumerate(self._columns)}
            self.rounds.settle(self._width, paths)
            self._columns = [[] for _ in self._columns]
            self._width = 0

    def close(self) -> None:
        """Listen to the model no longer."""
        self.rounds.binding.onlooker = None


class TextCompanion:
    """A language model that reads the text of prompts, each row in a cache of its own.

    Args:
        target: adapter of the model that verifies.
        drafter: whose model it is.
        model: the language model.

    Raises:
        ValueError: if it has no output layer, or layers whose state cannot go back.
    """

    def __init__(self, target: Adapter, drafter: Drafter, model: Any) -> None:
        self.model, self.name = model, drafter.name
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None or not hasattr(model, "config"):
            raise ValueError(
                f"draft_model {type(model).__name__} has no output layer; pass a causal language model, such as "
                "AutoModelForCausalLM loads"
            )
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        stateful = sorted(set(kinds) - set(_READS_BACK))
        if stateful:
            raise ValueError(
                f"draft_model {type(model).__name__} has layers of kind {stateful[0]!r}, whose state cannot go back to "
                "before a token that was refused; pass a model whose layers all attend"
            )
        self.vocabulary = int(head.weight.shape[0])

    def attach(self, ledger: Ledger) -> None:
        """Do nothing: the model runs as it is."""

    def read(self, request: Request) -> TextReading:
        """Take the text of the prompts, which is read together with the first token of the answer."""
        known = [
            [token for token in prompt if token not in request.excluded and token < self.vocabulary]
            for prompt in request.prompts
        ]
        return TextReading(self.model, known, self.vocabulary)


class TextReading:
    """The language model in one call.

    Args:
        model: the model.
        unread: per row, the text of the prompt.
        vocabulary: tokens it has logits for.
    """

    def __init__(self, model: Any, unread: list[list[int]], vocabulary: int) -> None:
        self.model, self.unread, self.vocabulary = model, unread, vocabulary
        # Made without the model's config, a cache keeps what windows have passed, to which it may have to go back.
        self._caches = [DynamicCache() for _ in unread]
        self._given = [0] * len(unread)

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Run the next tokens of the rows named; ``[B, V]`` logits of what follows."""
        device = self.model.device
        found = torch.zeros(len(self._caches), self.vocabulary, device=device)
        for row, own in tokens.items():
            ids = torch.tensor([list(own)], device=device)
            output = self.model(input_ids=ids, past_key_values=self._caches[row], use_cache=True, return_dict=True)
            found[row] = output.logits[0, -1]
            self._given[row] += len(own)
        return found

    def settle(self, kept: Mapping[int, int]) -> None:
        """Keep so many of the tokens that each row was given since the last time."""
        for row, given in enumerate(self._given):
            if given > kept.get(row, 0):
                self._caches[row].crop(kept.get(row, 0) - given)
            self._given[row] = 0

    def close(self) -> None:
        """Forget the prompts."""
        self._caches = []
