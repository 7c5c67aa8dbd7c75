"""A plan at work on one model: what it hooks, and how a call enters and leaves the decoder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from torch import Tensor, nn

from mmfast.adapters.attention import register_tap
from mmfast.adapters.base import Adapter
from mmfast.adapters.cache import is_logical, reference_layer, refuse_unsupported
from mmfast.adapters.call import Block, Inner, Level, Onlooker, Outer, compact_positions, stretched
from mmfast.adapters.clip import ClipTower, check_clip, clip_reader
from mmfast.adapters.companion import VisionCompanion, companion_of
from mmfast.adapters.compiled import CompiledLoop, refuse_uncompilable
from mmfast.adapters.compression import settled_tokens
from mmfast.adapters.drafting import DraftingRunner
from mmfast.adapters.encoder import settled
from mmfast.adapters.features import FeatureWatch
from mmfast.adapters.frames import FrameRunner
from mmfast.adapters.kv import CacheRunner
from mmfast.adapters.layers import LayerRunner
from mmfast.adapters.ledger import Ledger
from mmfast.adapters.mask_rules import with_rules
from mmfast.adapters.masks import decoder_mask, gather_positions, gather_prepared, gather_rows, pack, tree_mask
from mmfast.adapters.media import segments
from mmfast.adapters.outer import OuterBoundary
from mmfast.adapters.own_loop import OwnLoop
from mmfast.adapters.recorder import Recorder
from mmfast.adapters.reduction import number_candidates, reduce_media
from mmfast.adapters.refusals import (
    calibrates,
    can_compact,
    only,
    refuse_checkpointing,
    refuse_impossible,
    wished_positions,
)
from mmfast.adapters.static import fit_masks, refuse_packing, settle, take_over, watch_generate
from mmfast.adapters.turns import Turns
from mmfast.kv.base import CacheMethod
from mmfast.plan import Plan
from mmfast.report import Report
from mmfast.speculative.base import Drafter
from mmfast.token_pruning.base import BeforeLLM
from mmfast.token_pruning.compression_base import Compressor
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerMask

# Weak on both sides: a model that is dropped without remove() must not be kept alive from here.
_ACTIVE: WeakKeyDictionary[nn.Module, ref[Binding]] = WeakKeyDictionary()


class Binding:
    """Attach a plan to a model; everything done to the model stands in the ledger.

    Args:
        adapter: the adapter of the model.
        plan: the plan.
        replace: detach a plan that is at work on the model.
        clip: a CLIP model, for methods that want one.
        reselect: let a new question choose anew where the plan reads questions.
        draft_model: a smaller model, for drafters that want one.
        compile: run decode steps compiled.

    Raises:
        ValueError: if the model or its state cannot do what the plan needs, or has a plan already.
            Nothing has been changed then.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        *,
        replace: bool = False,
        clip: ClipTower | None = None,
        reselect: bool = False,
        draft_model: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        plan = settled_tokens(adapter, settled(adapter, plan))
        check_clip(adapter, plan, clip)
        self.clip = clip
        self.adapter = adapter
        self.plan = plan
        self.before: BeforeLLM | None = only(plan, "before_llm", BeforeLLM)
        self.dropper: LayerDropper | None = only(plan, "in_llm", LayerDropper)
        self.bypass: LayerBypass | None = only(plan, "in_llm", LayerBypass)
        self.mask: LayerMask | None = only(plan, "in_llm", LayerMask)
        self.events = {} if self.dropper is None else {e.layer: e for e in self.dropper.events(adapter.shape.layers)}
        self.ledger = Ledger()
        self.inner: Inner | None = None
        self.block: Block | None = None
        self.onlooker: Onlooker | None = None
        self.recorder = Recorder(adapter, plan)
        self.outer = OuterBoundary(adapter, self.recorder, self._abandon)
        self.turns = Turns(adapter, self.recorder) if reselect and plan.reads_question else None
        refuse_impossible(adapter, plan)
        if compile:
            refuse_uncompilable(adapter, plan)
        drafter: Drafter | None = only(plan, "decode", Drafter)
        running = active_on(adapter.model)
        if running is not None and not replace:
            raise ValueError(
                f"this model already runs the plan {running.plan.to_text()!r}; call remove() on it first, "
                "or pass replace=True"
            )
        companion = companion_of(adapter, drafter, draft_model, goes=None if running is None else running.assistant)
        self.calibrates = calibrates(adapter, plan)
        self.frames = FrameRunner(adapter, plan, clip, self.outer)
        self.features = FeatureWatch(adapter, plan, self.recorder, self.turns, self.frames)
        for inside in (self.dropper, self.bypass, drafter):
            notice = "" if inside is None else inside.notice(adapter.shape.layers)
            if inside is not None and notice:
                warnings.warn(f"method {inside.name!r}: {notice}", stacklevel=5)
        self.layers = LayerRunner(adapter, self.dropper, self.bypass, self.recorder)
        cuts = self.dropper is not None and bool(self.dropper.truncations(adapter.shape.layers))
        cuts = cuts or isinstance(self.mask, Compressor)
        kept = tuple(method for method in plan.at("cache") if isinstance(method, CacheMethod))
        self.kv = CacheRunner(adapter, kept, self.recorder, late=cuts)
        self.loop: OwnLoop | None = CompiledLoop(self) if compile else None
        if drafter is not None:
            self.loop = DraftingRunner(self, drafter, companion)
            self.recorder.note_uncompiled(f"the rounds of {drafter.name!r} are not compiled", asked=compile)
        if running is not None:
            running.detach()
        try:
            self._attach()
        except BaseException:
            self.ledger.undo()
            if running is not None:
                running._attach()
            raise

    @property
    def active(self) -> bool:
        """Whether the model still has the plan."""
        return len(self.ledger) > 0

    @property
    def assistant(self) -> Binding | None:
        """The plan at work on a second model for the sake of this one, if any."""
        companion = self.loop.companion if isinstance(self.loop, DraftingRunner) else None
        return companion.binding if isinstance(companion, VisionCompanion) else None

    def detach(self) -> None:
        """Undo every change to the model."""
        self._abandon()
        self.ledger.undo()

    def go_on_from(self, before: Binding) -> None:
        """Take over what the loop of the same plan has learnt or compiled before."""
        if self.loop is not None and before.loop is not None:
            self.loop.go_on_from(before.loop)

    def _abandon(self) -> None:
        """End a call that was broken off in a way that runs no hooks, such as Ctrl-C."""
        if self.inner is not None:
            self.layers.disarm(self.inner)
            self.inner = None

    def report(self) -> Report:
        """Describe the last prompt."""
        return self.recorder.report()

    def _attach(self) -> None:
        model, base, decoder = self.adapter.model, self.adapter.base, self.adapter.decoder
        _ACTIVE[model] = ref(self)
        self.ledger.enter(lambda: _forget(model))
        for modality in ("image", "video"):
            name = f"get_{modality}_features"
            original = getattr(base, name, None)
            if original is not None:
                self.ledger.set_attribute(base, name, self.features.watched(modality, original))
        self.outer.attach(self.ledger)
        self.ledger.hook(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self.ledger.hook(decoder.register_forward_hook(self._after_decoder, always_call=True))
        if self._reads_attention:
            implementation = self.adapter.text_config._attn_implementation
            register_tap(implementation, self.ledger)
        if self.loop is not None:
            self.loop.attach(self.ledger)
        self.frames.attach(self.ledger)
        if self.turns is not None:
            self.turns.attach(self.ledger)
        watch_generate(model, self.ledger)
        self._forget_compiled()
        self.ledger.enter(self._forget_compiled)

    @property
    def _reads_attention(self) -> bool:
        """Whether the decoder has to attend through the tap in some call."""
        drafter: Drafter | None = only(self.plan, "decode", Drafter)
        if self.kv.reads_attention or (drafter is not None and drafter.reads_attention):
            return True
        if self.dropper is not None and any(self.dropper.request(event) for event in self.events.values()):
            return True
        if self.bypass is None:
            return False
        layers = self.bypass.layers_of(self.adapter.shape.layers)
        return self.bypass.bypass == "freeze" or any(self.bypass.request(layer) for layer in layers)

    def _forget_compiled(self) -> None:
        """Compiled graphs do not look at hooks again: drop those that exist."""
        if "_compiled_call" in vars(self.adapter.model):
            del self.adapter.model._compiled_call
            if "torch._dynamo" in sys.modules:
                sys.modules["torch._dynamo"].reset()

    # ---------------------------------------------------------- decoder boundary

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds, outer = kwargs.get("inputs_embeds"), self.outer.call
        cache = kwargs.get("past_key_values")
        if embeds is None or outer is None:
            return None
        if not outer.visual and not is_logical(cache):
            return None
        inner = self._plan_call(outer, embeds, cache)
        if inner is None:
            return None
        new = dict(kwargs)
        self._enter(inner, new, outer)
        self.inner = inner
        self.layers.arm(inner, new)
        self.kv.arm(inner)
        if self.onlooker is not None:
            self.onlooker.entered(inner, new)
        if inner.undo:
            refuse_checkpointing(self.adapter)
        return args, new

    def _plan_call(self, outer: Outer, embeds: Tensor, cache: Any) -> Inner | None:
        """Decide what enters the decoder; None when the call may run untouched."""
        batch, length = embeds.shape[:2]
        begin = self.recorder.watch.mark()
        valid = outer.valid(batch, length, embeds.device)
        visual = {name: places & valid for name, places in outer.visual.items()}
        inner = Inner(length, {}, cache=cache, seen=int(cache.get_seq_length()) if cache is not None else 0)
        keep, embeddings = valid, embeds
        changed = False
        if visual:
            if outer.untagged and (self.before or self.events or self.frames.selector):
                raise ValueError(
                    f"precomputed {outer.untagged} features were not made while this plan was active, or the prompt is "
                    "prefilled in chunks (prefill_chunk_size): encode the media after accelerate() and prefill at once"
                )
            inner.segments, inner.input_ids = segments(visual, outer.layouts), outer.input_ids
            clip = clip_reader(self.clip, self.before, outer.input_ids, valid)
            keep, embeddings, changed = reduce_media(self.before, inner, embeds, valid, clip)
            number_candidates(inner, keep)
            inner.first_slots = valid.long().argmax(dim=1).tolist()
            if self.dropper is not None and length > 1:
                inner.events = {
                    layer: event
                    for layer, event in self.events.items()
                    if any(self.dropper.drops(event, totals) for totals in inner.media_totals)
                }
        reroutes = self.mask is not None or (self.bypass is not None and bool(self.layers.bypassed))
        reroutes = reroutes or self.kv.any
        acts = inner.events or (visual and length > 1 and reroutes and self._sees_media(inner))
        if not changed and not acts and not is_logical(cache):
            self.recorder.note_full(inner, valid)
            return None
        if changed:
            slots, real = pack(keep)
            inner.levels[0] = Level(slots, real)
        else:
            everything = torch.arange(length, device=embeds.device).expand(batch, length)
            if self.block is not None:
                inner.block, everything = self.block, self.block.slots(inner.seen)
            inner.levels[0] = Level(everything, None if bool(valid.all()) else valid, whole=True)
        inner.tables["embeds"] = embeddings
        if any("embeds" in method.needs for method in (self.dropper, self.bypass) if method is not None):
            inner.embeds = embeddings.detach()
        inner.selection_marks.append((begin, self.recorder.watch.mark()))
        return inner

    @staticmethod
    def _sees_media(inner: Inner) -> bool:
        return any(sum(totals) for totals in inner.media_totals)

    def _enter(self, inner: Inner, kwargs: dict[str, Any], outer: Outer) -> None:
        """Hand the decoder the shortened call."""
        level = inner.levels[0]
        embeds = inner.tables.pop("embeds")
        batch, device = embeds.shape[0], embeds.device
        if kwargs.get("output_attentions") or (
            kwargs.get("output_attentions") is None and self.adapter.text_config.output_attentions
        ):
            raise ValueError(
                "output_attentions=True is not possible while tokens are dropped; remove() the plan to get them"
            )
        fit_masks(kwargs, inner.cache, inner.length, keep=self.adapter.masks_before_decoder)
        self._take_cache(inner, kwargs, outer)
        inner.prompt_end = self.outer.prompt_end(inner)
        reference = reference_layer(inner.cache) if inner.cache is not None else None
        inner.base_shift = reference.shift if reference is not None else None
        positions = self._positions(inner, kwargs, embeds)
        mask = kwargs.get("attention_mask")
        # Without padding, and for flash attention, families that make masks may still pass none or a 2-D one.
        prepared = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4)
        if kwargs.get("visual_pos_masks") is not None:
            # The decoder would add them by their places in the full prompt; the layer hooks do it instead.
            inner.deepstack = list(kwargs["deepstack_visual_embeds"])
            inner.deepstack_visual = kwargs["visual_pos_masks"]
            kwargs["visual_pos_masks"] = kwargs["deepstack_visual_embeds"] = None
        kwargs["inputs_embeds"] = embeds if level.whole else gather_rows(embeds, level.slots)
        if prepared and not level.whole:
            kwargs["attention_mask"] = gather_prepared(mask, level.slots, level.real)
        if not prepared:
            plain = level.real is None and reference is not None and reference.valid is None
            kwargs["attention_mask"] = (
                None if plain else decoder_mask(reference, batch, level.length, level.real, device)
            )
        kwargs["position_ids"] = inner.tables["positions"] = positions
        pairs = self.mask if inner.length > 1 and self._sees_media(inner) else None
        # What else acts inside the language model works on masks.
        alone = self.dropper is None and self.bypass is None
        if self.calibrates or pairs is not None:
            kwargs["attention_mask"] = with_rules(
                self.adapter,
                inner,
                kwargs.get("attention_mask"),
                embeds,
                pairs,
                calibrates=self.calibrates,
                alone=alone,
            )
        if inner.block is not None and inner.block.sees is not None:
            stored = 0 if reference is None else reference.stored
            kwargs["attention_mask"] = tree_mask(kwargs.get("attention_mask"), inner.block.sees, stored, embeds.dtype)
        self.layers.announce(inner)

    def _take_cache(self, inner: Inner, kwargs: dict[str, Any], outer: Outer) -> None:
        """Give the cache logical layers, making the cache first where the decoder would have."""
        cache = inner.cache
        if cache is None:
            use_cache = kwargs.get("use_cache")
            use_cache = self.adapter.text_config.use_cache if use_cache is None else use_cache
            checkpointing = self.adapter.decoder.training and getattr(
                self.adapter.decoder, "gradient_checkpointing", False
            )
            if not use_cache or checkpointing:
                return
            cache = transformers.DynamicCache(config=self.adapter.text_config)
            kwargs["past_key_values"] = inner.cache = cache
        refuse_packing(cache, self.kv.packer)
        if not is_logical(cache):
            self.adopt(cache, outer.attention_mask)

    def adopt(self, cache: Any, mask: Tensor | None) -> None:
        """Give a cache logical layers.

        Args:
            cache: a plain dynamic or static cache.
            mask: ``[B, S]``, which tokens are real, those in the cache first; None = all.

        Raises:
            ValueError: if its layers cannot be replaced.
        """
        refuse_unsupported(cache)
        seen = int(cache.get_seq_length())
        take_over(cache, self.adapter.shape.layers, mask[:, :seen].bool() if mask is not None and seen else None)
        if self.turns is not None:
            self.turns.adopted(cache)

    def _positions(self, inner: Inner, kwargs: dict[str, Any], embeds: Tensor) -> Tensor:
        """Gather or renumber the position ids."""
        level = inner.levels[0]
        positions = kwargs.get("position_ids")
        if positions is None:
            # The decoder would count the shortened prompt; the model's own default counts the full one.
            positions = torch.arange(inner.length, device=embeds.device)[None] + inner.seen
        positions = positions.expand(*positions.shape[:-2], embeds.shape[0], -1)
        inner.tables["asked positions"] = positions
        if inner.base_shift is not None:
            positions = positions - inner.base_shift.to(positions.device)[:, None]
        if level.whole:
            return positions
        gathered = gather_positions(positions, level.slots)
        wanted = wished_positions(self.plan)
        compact = wanted == "compact" or (wanted is None and can_compact(self.adapter))
        if not compact or gathered.ndim != 2:
            return gathered
        valid = (self.outer.call or Outer()).valid(embeds.shape[0], embeds.shape[1], embeds.device)
        first = positions.gather(1, valid.long().argmax(dim=1, keepdim=True))[:, 0]
        renumbered = compact_positions(gathered, level.real, first)
        self.layers.add_shift(inner, gathered[:, -1] - renumbered[:, -1])
        if inner.cache is not None:
            inner.base_shift = reference_layer(inner.cache).shift
        return renumbered

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        inner, self.inner = self.inner, None
        if inner is None:
            return None
        self.layers.disarm(inner)
        if output is None:
            return None
        self.layers.truncate(inner)
        self.kv.finish(inner)
        settle(inner.cache)
        self.recorder.note_pruned(inner)
        if self.onlooker is not None:
            self.onlooker.left(inner, output)
        last = inner.level_at(self.adapter.shape.layers - 1)
        if last.whole:
            return None
        return stretched(output, inner, self.adapter.shape.layers)


def active_on(model: nn.Module) -> Binding | None:
    """Return the binding at work on ``model``, if there is one."""
    found = _ACTIVE.get(model)
    return None if found is None else found()


def _forget(model: nn.Module) -> None:
    _ACTIVE.pop(model, None)
