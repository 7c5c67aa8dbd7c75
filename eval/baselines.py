"""Baselines with as many visual tokens as a plan leaves: without them an accuracy says nothing about a method."""

from __future__ import annotations

from collections.abc import Sequence

import mmfast

SEEDS = 3
"""How often the random baseline is run."""

DOWNSAMPLING = ("downsample", "pool2d")
"""Baselines that shrink the picture or its features, the first that runs being the measure of hard samples."""

NAMES = ("random", "uniform", *DOWNSAMPLING)
"""Every baseline that keeps a given number of tokens."""


def baseline_name(plan: str) -> str:
    """Return which baseline a plan is: ``"full"``, one of :data:`NAMES`, or "" for any other plan.

    Example:
        >>> baseline_name("random(keep=64, seed=2)"), baseline_name("uniform(keep=64) + snapkv()")
        ('random', '')
    """
    methods = mmfast.Plan.of(plan).methods
    if not methods:
        return "full"
    return methods[0].name if len(methods) == 1 and methods[0].name in NAMES else ""


def budget(plan: Sequence[mmfast.Report | None], full: Sequence[mmfast.Report | None]) -> int | float | None:
    """Return the ``keep`` that leaves a baseline as many visual tokens per layer as a plan.

    What counts is the average over the layers, which for a plan that acts before the language model is what enters it.

    Args:
        plan: reports of the plan on a few prompts; None for one that failed.
        full: reports of the full model on the same prompts.

    Returns:
        A count per picture or clip where it is the same for all prompts, else a fraction; None where the plan
        leaves the visual tokens alone, or no prompt with visual tokens went through.
    """
    pairs = [(own, other) for own, other in zip(plan, full, strict=True) if own and other and own.media and other.media]
    if all(own.layer_average > other.visual_tokens - 0.5 for own, other in pairs):
        return None
    per_item = [own.layer_average / len(own.media) for own, _ in pairs]
    if max(per_item) - min(per_item) < 0.5:
        return max(1, round(sum(per_item) / len(per_item)))
    left = sum(own.layer_average for own, _ in pairs)
    return max(1e-4, round(left / sum(other.visual_tokens for _, other in pairs), 4))


def baselines(keep: int | float) -> list[str]:
    """Write the baselines of a budget, in the text form of plans.

    Example:
        >>> baselines(64)[:2], len(baselines(64))
        (['random(keep=64)', 'random(keep=64, seed=1)'], 6)
    """
    texts = [f"random(keep={keep}, seed={seed})" for seed in range(SEEDS)]
    texts += [f"{name}(keep={keep})" for name in NAMES if name != "random"]
    return [mmfast.Plan.of(text).to_text() for text in texts]
