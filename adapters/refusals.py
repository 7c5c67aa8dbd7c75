"""What a model cannot do for a plan; most of it is found out before anything is changed."""

from __future__ import annotations

from typing import Any

from mmfast.adapters.base import Adapter
from mmfast.adapters.encoder import CHECKPOINTS_RUN_HOOKS
from mmfast.adapters.frames import check_frames
from mmfast.adapters.resizing import check_resizing
from mmfast.adapters.vision import check_signals
from mmfast.kv.base import Adjuster, CacheMethod, Evictor, Forgetter, Packer, Retriever
from mmfast.plan import Plan
from mmfast.speculative.base import Drafter
from mmfast.token_pruning.base import BeforeLLM, Method
from mmfast.token_pruning.frame_base import FrameSelector
from mmfast.token_pruning.layers import LayerBypass, LayerDropper, LayerMask

_KINDS: dict[str, tuple[type, ...]] = {
    "frames": (FrameSelector,),
    "before_llm": (BeforeLLM,),
    "in_llm": (LayerDropper, LayerBypass, LayerMask),
    "cache": (Evictor, Adjuster, Retriever, Packer, Forgetter),
    "decode": (Drafter,),
}


def only(plan: Plan, stage: str, kind: type) -> Any:
    """Return the method of one kind at a stage, or None."""
    return next((method for method in plan.at(stage) if isinstance(method, kind)), None)


def can_compact(adapter: Adapter) -> bool:
    """Say whether positions may be renumbered."""
    return adapter.can_compact and not adapter.slides


def wished_positions(plan: Plan) -> str | None:
    """Say which position policy a plan asks for by name; the method before the language model has the last word."""
    methods = (*plan.at("before_llm"), *plan.at("frames"))
    return next((policy for policy in (getattr(method, "positions", None) for method in methods) if policy), None)


def calibrates(adapter: Adapter, plan: Plan) -> bool:
    """Say whether attention has to know how many tokens each merged one stands for.

    Raises:
        ValueError: if that was asked for and is not possible.
    """
    before: BeforeLLM | None = only(plan, "before_llm", BeforeLLM)
    wanted = getattr(before, "calibrate", False)
    if before is None or wanted is False:
        return False
    implementation = adapter.text_config._attn_implementation
    # The mask is written for all layers at once, so they have to store the same.
    alone = not plan.at("in_llm") and not plan.at("cache")
    plain = can_compact(adapter) and alone and adapter.rotary_frequencies() is not None
    if wanted and (not plain or "flash" in implementation):
        raise ValueError(
            f"method {before.name!r}: calibrate=True needs a model with one-dimensional rotary positions, no sliding "
            "window, sdpa or eager attention, and no method inside the language model or its cache beside it; use "
            "calibrate=False"
        )
    return plain and "flash" not in implementation


def refuse_impossible(adapter: Adapter, plan: Plan) -> None:
    """Check everything that can be known before anything is changed.

    Raises:
        ValueError: naming the method, what the model lacks, and what to do.
    """
    check_frames(adapter, plan)
    check_resizing(adapter, plan)
    for method in plan.methods:
        _check_kind(method)
        _check_signals(adapter, method)
        if getattr(method, "positions", None) == "compact" and not can_compact(adapter):
            raise ValueError(
                f"method {method.name!r}: positions='compact' is not possible for model type "
                f"{adapter.model.config.model_type!r} (its positions have several dimensions or its windows "
                "count original positions); use positions='keep'"
            )
    _check_cache(adapter, plan)
    _check_drafting(adapter, plan)
    dropper: LayerDropper | None = only(plan, "in_llm", LayerDropper)
    bypass: LayerBypass | None = only(plan, "in_llm", LayerBypass)
    mask: LayerMask | None = only(plan, "in_llm", LayerMask)
    masked: list[Method] = [] if mask is None else [mask]
    if bypass is not None and bypass.bypass == "freeze":
        masked.append(bypass)
    calibrates(adapter, plan)
    implementation = adapter.text_config._attn_implementation
    if "flash" in implementation and masked:
        raise ValueError(
            f"method {masked[-1].name!r} needs a mask that attention implementation {implementation!r} cannot "
            "read; load the model with attn_implementation='sdpa' or 'eager'"
        )
    if dropper is not None and bypass is not None:
        _check_reading(dropper, bypass, adapter.shape.layers)
    inside = dropper or bypass or mask
    if inside is not None and (implementation == "flex_attention" or "|" in implementation):
        raise ValueError(
            f"method {inside.name!r} cannot drop tokens inside the LLM with attention implementation "
            f"{implementation!r}, whose masks cannot be gathered; load the model with "
            "attn_implementation='sdpa', 'eager' or a flash implementation"
        )
    if "flash" in implementation and adapter.slides:
        raise ValueError(
            f"attention implementation {implementation!r} measures sliding windows by what is stored, not by "
            "original positions, so tokens cannot be dropped; load the model with attn_implementation='sdpa' or "
            "'eager'"
        )
    if inside is not None and adapter.no_layer_drops:
        raise ValueError(f"method {inside.name!r} cannot drop tokens inside this model: {adapter.no_layer_drops}")


def _check_cache(adapter: Adapter, plan: Plan) -> None:
    """Refuse methods of the cache that cannot work here or together."""
    methods = [method for method in plan.at("cache") if isinstance(method, CacheMethod)]
    if not methods:
        return
    implementation = adapter.text_config._attn_implementation
    if implementation == "flex_attention" or "|" in implementation:
        raise ValueError(
            f"method {methods[0].name!r} cannot change the cache with attention implementation {implementation!r}, "
            "whose masks cannot follow; load the model with attn_implementation='sdpa', 'eager' or a flash one"
        )
    evictor: Evictor | None = only(plan, "cache", Evictor)
    for method in methods:
        per_head = method.ragged or isinstance(method, Retriever)
        if per_head and "flash" in implementation:
            raise ValueError(
                f"method {method.name!r} lets heads read different entries, which attention implementation "
                f"{implementation!r} has no mask for; load the model with attn_implementation='sdpa' or 'eager'"
            )
        if not isinstance(method, Adjuster):
            continue
        if evictor is None:
            raise ValueError(
                f"method {method.name!r} adjusts what an eviction leaves; put one beside it, for example "
                f"'snapkv(keep=0.2) + {method.name}()'"
            )
        if method.compacts and (evictor.ragged or not can_compact(adapter)):
            raise ValueError(
                f"method {method.name!r} renumbers positions, which needs one-dimensional rotary positions, no sliding "
                "window, and heads that keep equally many entries; leave it out"
            )
    retriever: Retriever | None = only(plan, "cache", Retriever)
    if retriever is not None and evictor is not None and (evictor.ragged or evictor.decodes):
        raise ValueError(
            f"method {retriever.name!r} reads what was stored of the prompt, which {evictor.name!r} leaves differently "
            "in each head or goes on changing; use one of them alone"
        )
    packer: Packer | None = only(plan, "cache", Packer)
    going_on = next((method for method in methods if isinstance(method, Evictor | Forgetter) and method.decodes), None)
    if packer is not None and going_on is not None:
        raise ValueError(
            f"method {going_on.name!r} evicts entries while tokens are generated, which {packer.name!r} has packed by "
            "then; use another of them, or one alone"
        )
    forgetter: Forgetter | None = only(plan, "cache", Forgetter)
    if forgetter is not None:
        forgetter.first_layer(adapter.shape.layers)


def _check_drafting(adapter: Adapter, plan: Plan) -> None:
    """Refuse a drafter whose tokens could not be verified in one forward."""
    drafter: Drafter | None = only(plan, "decode", Drafter)
    if drafter is None:
        return
    implementation = adapter.text_config._attn_implementation
    if implementation == "flex_attention" or (drafter.trees and "flash" in implementation):
        raise ValueError(
            f"method {drafter.name!r} {'drafts trees' if drafter.trees else 'drafts'}, for which attention "
            f"implementation {implementation!r} has no mask; load the model with attn_implementation='sdpa' or 'eager'"
        )
    for method in plan.methods:
        if isinstance(method, Evictor | Forgetter) and method.decodes:
            raise ValueError(
                f"method {method.name!r} evicts after every generated token, so that drafted tokens cannot be read in "
                f"one forward; use an eviction that ends with the prompt, or leave {drafter.name!r} out"
            )
        if isinstance(method, LayerBypass) and method.routes_decode:
            raise ValueError(
                f"method {method.name!r} lets generated tokens go around layers one by one, so that drafted tokens "
                f"cannot be read in one forward; leave one of {method.name!r} and {drafter.name!r} out"
            )


def _check_reading(dropper: LayerDropper, bypass: LayerBypass, depth: int) -> None:
    """Refuse to read a layer in which only some of the tokens take part."""
    around = set(bypass.layers_of(depth))
    for event in dropper.events(depth):
        request = dropper.request(event)
        read = {request.layer} if request is not None and not request.ahead else set()
        if "activations" in dropper.needs:
            read.add(event.layer - 1)
        if read & around:
            raise ValueError(
                f"method {dropper.name!r} reads layer {min(read & around)}, where {bypass.name!r} lets tokens go "
                "around; choose other layers for one of them, or use one of them alone"
            )


def _check_kind(method: Method) -> None:
    kinds = _KINDS.get(method.stage)
    if kinds is None:
        raise ValueError(f"method {method.name!r} acts at stage {method.stage!r}, which models cannot run yet")
    if not isinstance(method, kinds):
        raise ValueError(
            f"method {method.name!r} at stage {method.stage!r} must be a "
            f"{' or '.join(kind.__name__ for kind in kinds)}, got {type(method).__name__}"
        )


def _check_signals(adapter: Adapter, method: Method) -> None:
    missing = sorted(method.needs - adapter.signals)
    if missing:
        raise ValueError(
            f"method {method.name!r} needs {', '.join(missing)}, which models of type "
            f"{adapter.model.config.model_type!r} cannot give"
        )
    check_signals(adapter, method)
    if "activations" in method.needs:
        for layer in adapter.layers:
            adapter.down_projection(layer)


def refuse_checkpointing(adapter: Adapter) -> None:
    """Refuse hooked layers under gradient checkpointing, where that runs their hooks again.

    Raises:
        ValueError: saying what to do.
    """
    decoder = adapter.decoder
    if decoder.training and getattr(decoder, "gradient_checkpointing", False) and CHECKPOINTS_RUN_HOOKS:
        raise ValueError(
            "this plan on this model with gradient checkpointing needs a newer transformers (it hooks layers, "
            "and this one runs their hooks again in the backward pass; 5.23 does not); turn checkpointing off, or "
            "drop before the LLM in a model without deepstack features"
        )
