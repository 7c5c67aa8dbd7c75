"""ShortV: which layers freeze, and what a frozen layer does to a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import mmfast
from mmfast.token_pruning.in_llm.shortv import PUBLISHED, ShortV
from support.cases import mixed, one
from support.checks import first_logits
from support.families import FAMILIES
from support.inside import layer_tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_setting_freezes_the_published_layers(name: str) -> None:
    order = PUBLISHED[name]
    depth = 40 if name.endswith("13b") else 32
    assert len(set(order)) == len(order) == {32: 19, 40: 24}[depth]
    assert ShortV(keep=1 - len(order) / depth, order=name).frozen(576, depth) == sorted(order)
    assert ShortV(keep=1 - 3 / depth, order=name).frozen(576, depth) == sorted(order[:3])


def test_without_an_order_the_deep_half_freezes_first() -> None:
    assert ShortV(keep=0.75).frozen(16, 8) == [6, 7]
    assert ShortV(keep=0.5).frozen(16, 8) == [4, 5, 6, 7]
    assert ShortV(keep=0.25).frozen(16, 8) == [0, 1, 4, 5, 6, 7]


def test_what_an_order_does_not_name_follows() -> None:
    assert ShortV(keep=0.25, order=(1,)).frozen(16, 4) == [1, 2, 3]


@given(
    keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)),
    total=st.integers(1, 40),
    depth=st.integers(1, 12),
    images=st.integers(1, 3),
)
def test_keep_is_the_average_over_the_layers(keep: float, total: int, depth: int, images: int) -> None:
    assume(images <= total)
    method = ShortV(keep=keep)
    counts = method.keep_counts(total, 3, depth, images)
    share = keep if isinstance(keep, float) else min(1.0, keep * images / total)
    assert abs((sum(counts) - 3 * depth) / (total * depth) - share) <= 0.5 / depth + 1e-9
    layers = method.layers_of(depth)
    assert sorted(layers) == layers
    assert all(layer in layers for layer in method.frozen(total, depth, images))
    for layer in layers:
        tokens = layer_tokens(total + 3, range(total), media_totals=[total - images + 1] + [1] * (images - 1))
        assert method.route(tokens, layer, depth).selected.numel() + 3 == counts[layer]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "llava"}, "order='llava' must be one of 'llava-1.5-7b'"),
        ({"order": (1, 1)}, "must name different layers"),
        ({"order": (-1,)}, "must name different layers"),
        ({"keep": 1.5}, "keep=1.5 must lie in"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortV(**options)


def test_an_order_for_a_deeper_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names layer 31, but the model has 5 layers"):
        ShortV(order="llava-1.5-7b").layers_of(5)


def test_a_list_as_files_hold_it_is_an_order() -> None:
    assert ShortV(order=[3, 1]) == ShortV(order=(3, 1))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_nothing_frozen_is_the_model_itself(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), mixed(family)
    untouched = first_logits(model, batch.inputs)
    with mmfast.accelerate(model, "shortv(keep=1.0)"):
        assert torch.equal(first_logits(model, batch.inputs), untouched)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_frozen_everywhere_visual_tokens_leave_as_they_came(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.model(), one(family)
    decoder = model.get_decoder()
    ends: list[torch.Tensor] = []
    first, last = decoder.layers[0], decoder.layers[-1]
    handles = [
        first.register_forward_pre_hook(lambda _, args, kwargs: ends.append(_states(args, kwargs)), with_kwargs=True)
    ]
    with mmfast.accelerate(model, "shortv(keep=1e-9)") as fast:
        # Behind the hook that puts the tokens back together, so that it sees what the norm sees.
        handles.append(decoder.norm.register_forward_pre_hook(lambda _, args: ends.append(args[0])))
        first_logits(model, batch.inputs)
        work = fast.report().work[0]
    for handle in handles:
        handle.remove()
    assert last is not first
    ids = torch.tensor(batch.ids[0])
    visual = ids == ids.mode().values
    entered, left = ends[0][0], ends[-1][0]
    assert torch.equal(left[visual], entered[visual])
    assert not torch.isclose(left[~visual], entered[~visual]).all(dim=-1).any()
    assert all(layer.attending == int((~visual).sum()) and layer.shown == len(ids) for layer in work)


def _states(args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
