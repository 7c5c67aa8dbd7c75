"""Decode in compiled steps: the prompt is read as ever, what it leaves is moved into buffers that stay in place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import reference_layer, refuse_unsupported
from mmfast.adapters.compiled_states import States, columns_of
from mmfast.adapters.compiled_step import Stepper, steadily
from mmfast.adapters.own_loop import Generation, OwnLoop, Written
from mmfast.adapters.packed import PackedLayer
from mmfast.adapters.twin import hindrance
from mmfast.decoding import Compilation
from mmfast.kv.base import Evictor, Forgetter, Packer, Retriever
from mmfast.kv.static import rounded
from mmfast.plan import Plan
from mmfast.token_pruning.layers import LayerBypass

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding

logger = logging.getLogger(__name__)

_AT_ONCE = 8
"""Steps a GPU is given before the host looks whether all answers have ended."""
_ROOM = 256
"""Tokens there is room for at first, where that many may come; it doubles when it is used up."""


def refuse_uncompilable(adapter: Adapter, plan: Plan) -> None:
    """Refuse methods whose decode steps decide something, which compiled ones cannot.

    Raises:
        ValueError: naming the method and what to do.
    """
    implementation = adapter.text_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"compile=True needs attention with a mask, which {implementation!r} does not take; load the model with "
            "attn_implementation='sdpa' or 'eager', or leave compile out"
        )
    for method in plan.methods:
        if isinstance(method, Packer):
            reason = "packs entries while tokens are generated"
        elif isinstance(method, Retriever):
            reason = "chooses what to read for every generated token"
        elif isinstance(method, Evictor | Forgetter) and method.decodes:
            reason = "evicts entries while tokens are generated"
        elif isinstance(method, LayerBypass) and method.routes_decode:
            reason = "lets generated tokens go around layers one by one"
        else:
            continue
        raise ValueError(
            f"method {method.name!r} {reason}, which a compiled step cannot; use a method that ends with the prompt, "
            "or leave compile=True out"
        )


class CompiledLoop(OwnLoop):
    """Decode greedily or sample, with the model's decode step compiled.

    Args:
        binding: the plan at work on the model.
    """

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self.stepper = Stepper(binding.adapter, calibrated=binding.calibrates)
        self._said: set[str] = set()

    def go_on_from(self, before: Any) -> None:
        """Use what has been compiled for the same plan before."""
        self.stepper, self._said = before.stepper, before._said

    # ------------------------------------------------------------- what is decoded here

    def takes(self, given: dict[str, Any]) -> bool:
        """Say whether a call is decoded here; the reason why not is logged once."""
        reason = self._reason(given)
        if reason and reason not in self._said:
            self._said.add(reason)
            logger.warning("generate() decodes uncompiled: %s", reason)
        self.binding.recorder.note_uncompiled(reason, asked=bool(reason))
        return not reason

    def _reason(self, given: dict[str, Any]) -> str:
        configs = (given.get("generation_config"), self.adapter.model.generation_config)

        def asked(name: str) -> Any:
            if name in given:
                return given[name]
            return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)

        for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"):
            if asked(name) is not None:
                return f"{name} decodes in another way"
        if (asked("num_beams") or 1) > 1:
            return "beams are not followed by compiled steps"
        if asked("use_cache") is False:
            return "use_cache=False leaves nothing to go on from"
        for name in ("output_attentions", "output_hidden_states"):
            if asked(name):
                return f"compiled steps do not keep what {name} asks for"
        if asked("cache_implementation") not in (None, "dynamic", "static"):
            return f"cache_implementation={asked('cache_implementation')!r} has layers of its own"
        cache = given.get("past_key_values")
        if cache is not None:
            try:
                refuse_unsupported(cache)
            except ValueError as error:
                return str(error)
            if any(isinstance(layer, PackedLayer) for layer in cache.layers):
                return "the cache has been packed by another plan"
        implementation = self.adapter.text_config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return f"{implementation!r} attention takes no mask"
        return hindrance(self.adapter.model, (self.binding, self.binding.outer))

    # --------------------------------------------------------------------- decoding

    def refuse(self, call: Generation) -> None:
        """Refuse what is neither greedy nor drawn token by token.

        Raises:
            ValueError: naming it, and what to do.
        """
        if call.other_mode:
            raise ValueError(
                f"compiled steps decode greedily or sample, and do not do {call.other_mode}; leave that option of "
                "generate() out, or remove() the plan"
            )

    def answer(self, call: Generation) -> _Answer:
        """Read the prompt, and choose tokens in compiled steps."""
        record = self.binding.recorder.compilation = Compilation()
        before = self.stepper.seconds
        answer = _Answer(call.ids, call.processors, call.criteria, call.config, call.streamer)
        output = call.prefill()
        answer.choose(output.logits[:, -1])
        if not answer.over:
            model, options = call.model, call.model._update_model_kwargs_for_generation(output, call.options)
            del output
            # Positions go on by one with each token: what transformers says of the first tells all.
            following = model.prepare_inputs_for_generation(answer.ids, next_sequence_length=1, **options)
            decoding = _Decoding(self, call.cache, answer, following["position_ids"])
            try:
                decoding.run()
            finally:
                decoding.finish()
                record.steps = decoding.count
        record.seconds = self.stepper.seconds - before
        record.failure = self.stepper.failure
        self.binding.recorder.note_steps(record.steps)
        return answer


class _Answer:
    """The tokens of one call of ``generate``, chosen for all rows at once as transformers does.

    Args:
        ids: ``[B, S]`` the prompt.
        processors: of logits.
        criteria: when to stop.
        config: the generation config.
        streamer: takes tokens as they come, or None.

    Attributes:
        ids: ``[B, S + T]`` int64.
        unfinished: ``[B]`` int64, 1 for rows that go on.
        over: all have ended.
        scores: ``[B, V]`` per token where asked for, else None.
        logits: the same before processors.
    """

    def __init__(self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.ids, self.over = ids, False
        self.unfinished = torch.ones(ids.shape[0], dtype=torch.int64, device=ids.device)
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self._sampling = bool(config.do_sample)
        padding = config._pad_token_tensor
        self._padding = None if padding is None else padding.to(ids.device)
        self._ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        keeps = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keeps and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keeps and config.output_logits else None
        self.limit = int(criteria.max_length or config.max_length)

    @property
    def left(self) -> int:
        """Tokens that may still come; criteria may end an answer before."""
        return self.limit - self.ids.shape[1]

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest one, and nobody looks at them one by one."""
        kinds = {type(criterion) for criterion in self._criteria}
        alone = not self._sampling and not len(self._processors) and self._streamer is None
        alone = alone and self.scores is None and self.logits is None
        return alone and kinds <= {MaxLengthCriteria, EosTokenCriteria} and MaxLengthCriteria in kinds

    @property
    def ends(self) -> Tensor | None:
        """Tokens ``[E]`` that end an answer, for :attr:`plain` ones."""
        found = [criterion.eos_token_id.flatten() for criterion in self._criteria if hasattr(criterion, "eos_token_id")]
        return torch.cat(found).to(self.ids.device) if found else None

    @property
    def padding(self) -> int:
        """The token that follows an answer."""
        return 0 if self._padding is None else int(self._padding)

    def written(self) -> Written:
        """Return all tokens."""
        return Written(self.ids, self.scores, self.logits)

    def choose(self, logits: Tensor) -> None:
        """Choose the next token of each row from ``[B, V]`` logits."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self._processors(self.ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self._sampling:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self._ends and self._padding is not None:
            tokens = tokens * self.unfinished + self._padding * (1 - self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self._criteria(self.ids, self.scores)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        self.over = not bool(self.unfinished.any())

    def add(self, tokens: Tensor) -> None:
        """Append tokens ``[B, n]`` that steps have chosen, up to the one with which the last row ended."""
        count = tokens.shape[1]
        if self.ends is not None:
            ended = torch.isin(tokens, self.ends).cumsum(dim=1) > 0
            ended = (ended | (self.unfinished == 0)[:, None]).all(dim=0)
            if bool(ended.any()):
                count, self.over = int(ended.long().argmax()) + 1, True
            self.unfinished = self.unfinished & ~torch.isin(tokens[:, :count], self.ends).any(dim=1)
        self.ids = torch.cat([self.ids, tokens[:, :count]], dim=-1)
        self.over = self.over or self.left <= 0


class _Decoding:
    """The steps after one prompt: moves it into states, runs them, and gives the cache what was read.

    Args:
        loop: what has the steps.
        cache: holds the prompt.
        answer: has its first token.
        positions: ``[..., B or 1, 1]`` position ids of that token.

    Attributes:
        count: tokens read, without those after the end.
    """

    def __init__(self, loop: CompiledLoop, cache: Any, answer: _Answer, positions: Tensor) -> None:
        self.loop, self.cache, self.answer = loop, cache, answer
        self.count = 0
        self._read = self._said = 0
        self._room = _ROOM
        self._positions = positions.expand(*positions.shape[:-2], answer.ids.shape[0], 1).clone()
        shift = reference_layer(cache).shift
        if shift is not None:
            self._positions -= shift.to(positions.device)[:, None]
        loop.stepper.renew()
        self._open()

    def run(self) -> None:
        """Decode to the end."""
        run_more = self._chosen_inside if self.answer.plain else self._chosen_outside
        while not self.answer.over:
            if self._read == self.states.room:
                self.finish()
                self._room *= 2
                self._positions = self.states.positions
                self._open()
            run_more()

    def finish(self) -> None:
        """Give the cache what has been read, as if token by token."""
        # What a step reads after the end has not been said.
        said = self.answer.ids.shape[1] - self._said
        count = min(self._read, said) if self.answer.plain else self._read
        self.states.store(self.cache, count)
        self.count += count
        self._read, self._said = 0, self.answer.ids.shape[1]

    def _open(self) -> None:
        """Move what the cache stores into states with room for what may come."""
        loop, layers = self.loop, self.cache.layers
        dtype = layers[0].keys.dtype
        columns, columns_of_layers = columns_of(
            self.cache, dtype, loop.adapter.shape.heads, calibrated=loop.binding.calibrates
        )
        room = rounded(max(1, min(self._room, self.answer.left)))
        ends = self.answer.ends if self.answer.plain else None
        vocabulary = int(loop.adapter.model.get_output_embeddings().weight.shape[0])

        def make() -> States:
            return States(columns, columns_of_layers, layers, room, self._positions, vocabulary, ends)

        shapes = tuple((*layer.keys.shape[:2], layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers)
        lengths = tuple(rounded(layer.stored) for layer in layers)
        signatures = tuple(own.signature() for own in columns)
        # What is captured runs with the precision it was captured with.
        device = self.answer.ids.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = (autocast, dtype, tuple(self._positions.shape), vocabulary, None if ends is None else len(ends))
        key = (signatures, columns_of_layers, shapes, lengths, room, kind)
        self.states, self._step = loop.stepper.ready(key, make, choose=self.answer.plain)
        self.states.load(self.cache, columns, self._positions, int(self.cache.get_seq_length()))
        self.states.begin(self.answer.ids[:, -1:], self.answer.unfinished, self.answer.padding, ends)
        self._read, self._said = 0, self.answer.ids.shape[1]

    def _run(self, steps: int) -> None:
        with steadily():
            for _ in range(steps):
                self._step()
                self._read += 1

    def _chosen_inside(self) -> None:
        """Let steps choose until all answers have ended or there is no more room."""
        states, answer = self.states, self.answer
        at_once = _AT_ONCE if states.token.is_cuda else 1
        limit = min(states.room, answer.left)
        while self._read < limit and (states.ends is None or bool(states.unfinished.any())):
            self._run(min(at_once, limit - self._read))
        answer.add(states.answer[:, : self._read].to(answer.ids.device))

    def _chosen_outside(self) -> None:
        """Run one step, and choose by what ``generate`` was told."""
        self._run(1)
        self.answer.choose(self.states.logits)
        self.states.token.copy_(self.answer.ids[:, -1:])
