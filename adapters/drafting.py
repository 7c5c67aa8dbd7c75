"""Let ``generate`` decode with drafts, in a loop of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from mmfast.adapters.companion import TextCompanion, VisionCompanion
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.own_loop import Generation, OwnLoop
from mmfast.adapters.rounds import ModelRounds
from mmfast.adapters.sampler import AnswerSampler
from mmfast.adapters.self_draft import VisualScores
from mmfast.decoding import Drafting
from mmfast.speculative.adaptive import Adaptive
from mmfast.speculative.base import Drafter, Request, Session
from mmfast.speculative.decode import Rounds

if TYPE_CHECKING:
    from mmfast.adapters.binding import Binding

_MARKS = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "fake", "global_img", "row_img")
"""Beginnings of the names of config entries whose tokens stand for or enclose images."""


class DraftingRunner(OwnLoop):
    """Decode with the drafter of a plan.

    Args:
        binding: the plan at work on the model.
        drafter: its drafter.
        companion: the second model that drafts, if any.
    """

    def __init__(
        self, binding: Binding, drafter: Drafter, companion: VisionCompanion | TextCompanion | None = None
    ) -> None:
        super().__init__(binding)
        self.drafter, self.companion = drafter, companion
        self.memory: dict[str, Any] = {}
        self._adaptive: dict[int, Adaptive] = {}

    def attach(self, ledger: Ledger) -> None:
        """Wrap the model's ``generate``, and put the plan of a second model to work."""
        if self.companion is not None:
            self.companion.attach(ledger)
        super().attach(ledger)

    def go_on_from(self, before: Any) -> None:
        """Take over what the same drafter has learnt before."""
        self.memory, self._adaptive = before.memory, before._adaptive

    def takes(self, given: dict[str, Any]) -> bool:
        """Decode every call here.

        Raises:
            ValueError: where the call brings a loop or a drafter of its own.
        """
        for name in ("custom_generate", "assistant_model"):
            if given.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be given to generate() while {self.drafter.name!r} drafts; leave it out, or "
                    "remove() the plan"
                )
        return True

    def refuse(self, call: Generation) -> None:
        """Refuse what cannot be drafted for.

        Raises:
            ValueError: naming it, and what to do.
        """
        name = self.drafter.name
        if call.other_mode:
            raise ValueError(
                f"{name!r} drafts for greedy decoding and sampling, not for {call.other_mode}; leave that option of "
                "generate() out, or remove() the plan"
            )
        for option in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
            if getattr(call.config, option, None):
                raise ValueError(f"{option} is not possible while {name!r} drafts; leave it out, or remove() the plan")
        if not isinstance(call.cache, DynamicCache):
            raise ValueError(
                f"{name!r} drafts with a plain dynamic cache, got {type(call.cache).__name__}; leave use_cache and "
                "cache_implementation at their defaults"
            )
        for processor in call.processors:
            kind, several = type(processor).__name__, len(call.ids) > 1
            if kind == "UnbatchedClassifierFreeGuidanceLogitsProcessor" or (several and kind.startswith("PrefixCon")):
                raise ValueError(
                    f"{kind} looks at whole batches, which grow row by row while {name!r} drafts; leave it out, or "
                    "pass one prompt at a time"
                )

    def answer(self, call: Generation) -> AnswerSampler:
        """Read the prompt, and choose tokens in rounds of drafts."""
        rounds = ModelRounds(self.binding, call.cache)
        if self.drafter.reads_attention:
            rounds.scores = VisualScores(self.adapter)
        record = self.binding.recorder.drafting = Drafting()
        try:
            prompt = rounds.prefill(call.prefill, call.mask)
            sampler = AnswerSampler(
                call.ids, call.config, call.processors, call.criteria, call.streamer, self._excluded(call.config)
            )
            logits = prompt.logits[:, -1]
            if sampler.greedy:
                first = logits.float().argmax(dim=-1).tolist()
            else:
                first = [sampler.choose(row, logits[row]) for row in range(len(logits))]
            roots = {row: token for row, token in enumerate(first) if not sampler.emit(row, token)}
            if roots:
                self._rounds(rounds, sampler, roots, first, call, record)
        finally:
            rounds.finish()
        return sampler

    def _rounds(
        self,
        rounds: ModelRounds,
        sampler: AnswerSampler,
        roots: Mapping[int, int],
        first: list[int],
        call: Generation,
        record: Drafting,
    ) -> None:
        request = self._request(rounds, sampler, first, call)
        device = call.ids.device

        def start() -> Session:
            prefill = rounds.described(call.ids) if self.drafter.needs_hidden else ()
            return self.drafter.start(replace(request, prefill=prefill))

        loop = Rounds(
            rounds,
            sampler,
            # What reads the prompt again is worth beginning only where a draft is wanted.
            start if self.drafter.needs_hidden else start(),
            request,
            most=self.drafter.most,
            trees=self.drafter.trees,
            adaptive=self._controller(len(first)),
            record=record,
            synchronize=(lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None),
        )
        try:
            loop.run(roots)
        finally:
            loop.close()

    def _controller(self, rows: int) -> Adaptive | None:
        """Return what chooses the length of drafts; it is kept over calls and knows what they cost."""
        if not self.drafter.adaptive_length:
            return None
        return self._adaptive.setdefault(rows, Adaptive(start=min(4, self.drafter.most)))

    def _request(self, rounds: ModelRounds, sampler: AnswerSampler, first: list[int], call: Generation) -> Request:
        model, ids, mask, sampling = self.adapter.model, call.ids, call.mask, bool(call.config.do_sample)
        width = ids.shape[1]
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, mask.shape[1] - width :].bool()
        seed = _state_of_chance(ids.device) if self.drafter.stochastic and sampling else 0
        head = model.get_output_embeddings()
        return Request(
            prompts=tuple(tuple(row[own].tolist()) for row, own in zip(ids, real, strict=True)),
            first=tuple(first),
            excluded=sampler.excluded,
            stop=sampler.stops,
            vocabulary=int(head.weight.shape[0]),
            max_new_tokens=max(sampler.left(row) for row in range(len(first))),
            sampling=sampling,
            law=sampler.law_after,
            generator=[torch.Generator(device=ids.device).manual_seed(seed + row) for row in range(len(first))],
            device=ids.device,
            dtype=model.dtype,
            memory=self.memory,
            embed=model.get_input_embeddings(),
            head=head,
            model=rounds if self.drafter.needs_model else None,
            inputs=self._inputs,
            companion=self.companion,
        )

    def _excluded(self, config: Any) -> frozenset[int]:
        """Return the tokens that stand for images, enclose them or fill rows up."""
        found = set(self.adapter.placeholders.values())
        for name, value in vars(self.adapter.model.config).items():
            marks = name.endswith(("_token_id", "_token_index")) and name.startswith(_MARKS)
            if marks and isinstance(value, int):
                found.add(value)
        ends = config._eos_token_tensor
        padding = config._pad_token_tensor
        stops = set() if ends is None else set(ends.flatten().tolist())
        if padding is not None and int(padding) not in stops:
            found.add(int(padding))
        return frozenset(found)


def _state_of_chance(device: torch.device) -> int:
    """Return a seed that follows from the state of the device's source of chance, and take nothing from it."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return int.from_bytes(sha256(state.numpy().tobytes()).digest()[:7])
