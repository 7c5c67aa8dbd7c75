"""Properties that hold for every method, whatever the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmfast
from mmfast.budget import count
from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.base import Method, VisionSignal
from mmfast.token_pruning.before_llm.divprune import MATRIX_LIMIT, max_min_order
from mmfast.token_pruning.before_llm.pool2d import pooled_grid
from mmfast.token_pruning.layers import LayerTokens
from mmfast.tokens import Keep, Layout, VisualTokens

BEFORE = mmfast.methods("before_llm")
INSIDE = mmfast.methods("in_llm")
DROPPERS = [info for info in INSIDE if info.method.role == "reduce"]
BYPASSES = [info for info in INSIDE if info.method.role == "bypass"]
MASKS = [info for info in INSIDE if info.method.role == "mask"]
WIDTH, DEPTH = 16, 8
sides = st.tuples(st.integers(1, 5), st.integers(1, 5))
keeps = st.one_of(st.integers(1, 90), st.floats(0.01, 1.0))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def vision_signals(method: Method, total: int, tiles: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what a method asks of the vision tower."""

    def draw(request: VisionSignal) -> Tensor:
        if request.kind in ("cls_attention", "received_attention"):
            return drawn(generator, total).softmax(dim=0)
        if request.kind == "groups":
            return torch.randint(0, max(1, total // 2), (total,), generator=generator)
        if request.kind == "cls_logits":
            return drawn(generator, total)
        rows = tiles if request.kind == "cls_features" else total
        return drawn(generator, rows, 2 * WIDTH if request.heads == "join" else WIDTH)

    return {name: draw(request) for name, request in method.vision_signals().items()}


# ------------------------------------------------------------------------ before the language model


def visual_tokens(method: Method, side: tuple[int, int], frames: int, seed: int, dtype: torch.dtype) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.grid(*side, frames=frames)
    signals = vision_signals(method, len(layout), frames, generator)
    if "text_embeds" in method.needs:
        signals["text_embeds"] = drawn(generator, 3, WIDTH).to(dtype)
    return VisualTokens(drawn(generator, len(layout), WIDTH).to(dtype), layout, 0, signals)


@pytest.mark.parametrize("info", BEFORE, ids=lambda info: info.name)
@given(
    side=sides,
    frames=st.integers(1, 3),
    keep=keeps,
    seed=st.integers(0, 5),
    scope=st.sampled_from(["global", "per_tile"]),
    duplicates=st.booleans(),
    dtype=dtypes,
)
@example(side=(1, 2), frames=3, keep=1, seed=0, scope="global", duplicates=False, dtype=torch.float32)
@example(side=(1, 2), frames=3, keep=1, seed=0, scope="per_tile", duplicates=True, dtype=torch.float32)
@settings(max_examples=40, deadline=None)
def test_before_llm_decisions_are_sound(
    info: mmfast.MethodInfo,
    side: tuple[int, int],
    frames: int,
    keep: float,
    seed: int,
    scope: str,
    duplicates: bool,
    dtype: torch.dtype,
) -> None:
    method = info.method(keep=keep, scope=scope)
    tokens = visual_tokens(method, side, frames, seed, dtype)
    if duplicates:
        same = {name: value[:1].expand_as(value) for name, value in tokens.signals.items()}
        tokens = replace(tokens, features=tokens.features[:1].expand_as(tokens.features), signals=same)
    decision = method(tokens)
    total = len(tokens)
    promised = count(keep, total)
    if decision is None:
        assert promised == total
        return
    check_indices(decision.indices, total)
    assert len(decision) == promised or (method.fits_grid and 1 <= len(decision) < promised)
    if decision.features is not None:
        assert info.merges
        assert decision.features.shape == (len(decision), WIDTH)
        assert bool(decision.features.isfinite().any(dim=1).logical_or(decision.features.isnan().all(dim=1)).all())
    if decision.source is not None:
        assert decision.source.shape == (total,)
        assert int(decision.source.max()) == len(decision) - 1
        assert int(decision.source.min()) >= -1
    if decision.sizes is not None:
        assert decision.sizes.shape == (len(decision),)
        assert bool((decision.sizes > 0).all())
    again = method(tokens)
    assert again is not None
    assert again.indices.equal(decision.indices)


def check_indices(indices: Tensor, total: int) -> None:
    assert indices.dtype == torch.int64
    assert indices.unique().equal(indices)
    assert not len(indices) or 0 <= int(indices[0]) <= int(indices[-1]) < total


@pytest.mark.parametrize("info", BEFORE, ids=lambda info: info.name)
@pytest.mark.parametrize("policy", ["keep_nonempty", "keep", "drop"])
def test_newline_tokens_follow_the_policy(info: mmfast.MethodInfo, policy: str) -> None:
    """A 4 x 3 grid with a newline after each row and one at the end that belongs to no row."""
    rows = torch.arange(4).repeat_interleave(4)
    cols = torch.tensor([0, 1, 2, -1]).repeat(4)
    layout = Layout(
        "image",
        torch.cat([torch.zeros(16, dtype=torch.int64), torch.tensor([-1])]),
        torch.cat([torch.zeros(16, dtype=torch.int64), torch.tensor([-1])]),
        torch.cat([rows, torch.tensor([-1])]),
        torch.cat([cols, torch.tensor([-1])]),
        torch.cat([cols == -1, torch.tensor([True])]),
    )
    method = info.method(keep=3, newline=policy)
    generator = torch.Generator().manual_seed(0)
    signals = vision_signals(method, 17, 1, generator)
    if "text_embeds" in method.needs:
        signals["text_embeds"] = drawn(generator, 3, WIDTH)
    tokens = VisualTokens(drawn(generator, 17, WIDTH), layout, 0, signals)
    decision: Keep = method(tokens)
    newline = layout.is_newline[decision.indices]
    patches = decision.indices[~newline]
    assert patches.numel() == 3 or (method.fits_grid and 1 <= patches.numel() < 3)
    if policy == "drop":
        assert not newline.any()
    elif policy == "keep":
        assert int(newline.sum()) == 5
    else:
        alive = set(layout.row[patches].tolist()) | {-1}
        assert set(layout.row[decision.indices[newline]].tolist()) == alive
    if decision.features is not None:
        assert bool(decision.features[newline].isnan().all())


@given(
    total=st.integers(1, 60),
    width=st.integers(1, 5),
    seed=st.integers(0, 9),
    scale=st.sampled_from([0.0, 1e-20, 1.0]),
)
@settings(deadline=None)
def test_max_min_order_never_repeats(total: int, width: int, seed: int, scale: float) -> None:
    features = scale * torch.randn(total, width, generator=torch.Generator().manual_seed(seed))
    order = max_min_order(features, total)
    assert sorted(order.tolist()) == list(range(total))


def test_max_min_order_is_the_same_with_and_without_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    with_matrix = max_min_order(features, 40)
    monkeypatch.setattr("mmfast.token_pruning.before_llm.divprune.MATRIX_LIMIT", 0)
    assert max_min_order(features, 40).equal(with_matrix)
    assert MATRIX_LIMIT == 4096


def test_max_min_order_matches_a_naive_greedy_search() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(torch.inf)
    picks = [int(distance.min(dim=0).values.argmax())]
    while len(picks) < 12:
        rest = [i for i in range(40) if i not in picks]
        picks.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in picks)))
    assert max_min_order(features, 12).tolist() == picks


@given(height=st.integers(1, 40), width=st.integers(1, 40), limit=st.integers(1, 500))
def test_pooled_grids_fit(height: int, width: int, limit: int) -> None:
    new_height, new_width = pooled_grid(height, width, limit)
    assert 1 <= new_height <= height
    assert 1 <= new_width <= width
    assert new_height * new_width <= limit


# ------------------------------------------------------------------------ inside the language model


@dataclass
class Prompt:
    """Text, images and text, on their way through the layers."""

    method: Any
    grids: list[tuple[int, int]]
    before: int
    after: int
    seed: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.sizes = [height * width for height, width in self.grids]
        self.total = sum(self.sizes)
        media = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        text = torch.full((1,), -1)
        self.media = torch.cat([text.repeat(self.before), media, text.repeat(self.after)])
        self.alive = torch.ones(len(self.media), dtype=torch.bool)
        self.memory: dict[str, Any] = {}
        self.signals = vision_signals(self.method, self.total, len(self.grids), self.generator)
        self.embeds = drawn(self.generator, len(self.media), WIDTH).to(self.dtype)

    def tokens(self, *, text_too: bool = False) -> LayerTokens:
        """Draw what a method is given at a layer."""
        own = self.alive.nonzero().squeeze(-1)
        candidates = torch.arange(len(own)) if text_too else (self.media[own] >= 0).nonzero().squeeze(-1)
        number = torch.where(self.media >= 0, torch.arange(len(self.media)) - self.before, -1)
        origin = number[own[candidates]]
        states = [drawn(self.generator, len(own), WIDTH).to(self.dtype) for _ in range(2)]
        heads = [drawn(self.generator, number, len(own), 4).to(self.dtype) for number in (4, 2, 2)]
        needs = self.method.needs
        return LayerTokens(
            hidden=states[0],
            candidates=candidates,
            origin=origin,
            media=self.media[own[candidates]],
            total=self.total,
            media_totals=tuple(self.sizes),
            places=own,
            layouts=tuple(Layout.grid(*grid) for grid in self.grids),
            attention=AttentionView(*heads) if "attention" in needs else None,
            embeds=self.embeds[own] if "embeds" in needs else None,
            normed=states[1] if {"final_norm", "layer_norm"} & needs else None,
            activations=drawn(self.generator, len(own), 12).to(self.dtype) if "activations" in needs else None,
            signals={name: value[origin] for name, value in self.signals.items()},
            memory=self.memory,
        )


prompts = {
    "grids": st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    "before": st.integers(0, 3),
    "after": st.integers(1, 7),
    "seed": st.integers(0, 5),
    "dtype": dtypes,
}


@pytest.mark.parametrize("info", DROPPERS, ids=lambda info: info.name)
@given(
    keep=st.one_of(st.integers(1, 14), st.floats(0.05, 1.0)), scope=st.sampled_from(["global", "per_image"]), **prompts
)
@settings(max_examples=40, deadline=None)
def test_droppers_decide_soundly(info: mmfast.MethodInfo, keep: float, scope: str, **drawn_prompt: Any) -> None:
    method = info.method(keep=keep, scope=scope)
    prompt = Prompt(method, **drawn_prompt)
    events = method.events(DEPTH)
    assert [event.step for event in events] == list(range(len(events)))
    assert sorted(event.layer for event in events) == [event.layer for event in events]
    for event in events:
        tokens = prompt.tokens()
        if not len(tokens.candidates):
            break
        decision = method(tokens, event)
        own = prompt.alive.nonzero().squeeze(-1)[tokens.candidates]
        kept = own if decision is None else own[decision.indices]
        if decision is not None:
            check_indices(decision.indices, len(own))
            if decision.features is not None:
                assert info.merges
                assert decision.features.shape == (len(decision), WIDTH)
        prompt.alive[own] = False
        prompt.alive[kept] = True
        check_counts(method, prompt, event)


def check_counts(method: Any, prompt: Prompt, event: Any) -> None:
    """Compare what is left with the promise, over all images or for each."""
    left = [int((prompt.alive & (prompt.media == index)).sum()) for index in range(len(prompt.sizes))]
    if method.scope == "per_image":
        for size, own in zip(prompt.sizes, left, strict=True):
            promised = method.counts(size, DEPTH, 1)
            assert promised is None or own == promised[event.step]
    else:
        promised = method.counts(prompt.total, DEPTH, len(prompt.sizes))
        assert promised is None or sum(left) == promised[event.step]
    assert all(own <= size for own, size in zip(left, prompt.sizes, strict=True))


@pytest.mark.parametrize("info", DROPPERS, ids=lambda info: info.name)
def test_droppers_decide_alike_twice(info: mmfast.MethodInfo) -> None:
    method = info.method(keep=0.4)
    for event in method.events(DEPTH):
        first, second = (
            method(Prompt(method, [(4, 4), (3, 5)], 2, 5, 0, torch.float32).tokens(), event) for _ in range(2)
        )
        assert (first is None) == (second is None)
        assert first is None or first.indices.equal(second.indices)


@pytest.mark.parametrize("info", DROPPERS, ids=lambda info: info.name)
@given(total=st.integers(1, 700), images=st.integers(1, 3), keep=st.one_of(st.integers(1, 90), st.floats(0.05, 1.0)))
@settings(max_examples=40, deadline=None)
def test_counts_fall_and_keep_their_promise(info: mmfast.MethodInfo, total: int, images: int, keep: float) -> None:
    method = info.method(keep=keep)
    events = method.events(DEPTH)
    counts = method.counts(total, DEPTH, images)
    if counts is None:
        return
    assert len(counts) == len(events)
    assert sorted(counts, reverse=True) == counts
    assert all(0 <= number <= total for number in counts)
    layers = method.keep_counts(total, 7, DEPTH, images)
    assert layers[0] == total + 7
    assert sorted(layers, reverse=True) == layers


@pytest.mark.parametrize("info", BYPASSES, ids=lambda info: info.name)
@given(keep=st.one_of(st.none(), st.integers(1, 14), st.floats(0.05, 1.0)), **prompts)
@settings(max_examples=40, deadline=None)
def test_bypasses_route_soundly(info: mmfast.MethodInfo, keep: float | None, **drawn_prompt: Any) -> None:
    assume(keep is not None or info.options.get("keep", 0) is None)
    method = info.method() if "keep" not in info.options else info.method(keep=keep)
    prompt = Prompt(method, **drawn_prompt)
    layers = method.layers_of(DEPTH)
    assert sorted(set(layers)) == layers
    predicted = method.keep_counts(prompt.total, prompt.before + prompt.after, DEPTH, len(prompt.sizes))
    for layer in layers:
        tokens = prompt.tokens(text_too=method.routes_text)
        route = method.route(tokens, layer, DEPTH)
        candidates = len(tokens.candidates)
        check_indices(route.selected, candidates)
        for weights in (route.gate, route.skipped):
            assert weights is None or (weights.shape == (candidates,) and bool(weights.isfinite().all()))
        assert route.states is None or route.states.shape == (candidates, WIDTH)
        if predicted is not None:
            assert predicted[layer] == len(prompt.media) - candidates + len(route.selected)


@pytest.mark.parametrize("info", MASKS, ids=lambda info: info.name)
@given(sizes=st.lists(st.integers(1, 6), max_size=3), gaps=st.lists(st.integers(0, 4), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_masks_name_places_of_the_prompt(info: mmfast.MethodInfo, sizes: list[int], gaps: list[int]) -> None:
    parts, start, text = [], 0, []
    for gap, size in zip(gaps, [*sizes, 0], strict=False):
        text += range(start, start + gap)
        parts.append(torch.arange(start + gap, start + gap + size))
        start += gap + size
    media, words = [part for part in parts if len(part)], torch.tensor(text, dtype=torch.int64)
    for rows, columns in info.method().visible(media, words):
        for places in (rows, columns):
            check_indices(places, start)
