"""FlowCut inside the language model: what the official vectors do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmfast.token_pruning.attention import AttentionView
from mmfast.token_pruning.in_llm.flowcut_llm import FlowCutLLM, combined, relations
from mmfast.token_pruning.layers import LayerEvent, LayerTokens
from support.inside import layer_tokens

EVENT = LayerEvent(1, 0, 4)


def prompt(groups: int = 2) -> LayerTokens:
    generator = torch.Generator().manual_seed(groups)
    query, key, value = (torch.randn(heads, 12, 6, generator=generator) for heads in (4, groups, groups))
    return layer_tokens(12, range(2, 9), attention=AttentionView(query, key, value))


def naive(tokens: LayerTokens) -> Tensor:
    view = tokens.view()
    assert view.value is not None
    key, value = (part.repeat_interleave(4 // part.shape[0], dim=0) for part in (view.key, view.value))
    relation, semantic = torch.zeros(7), torch.zeros(7)
    for head in range(4):
        relation += (key[head, 2:9] @ view.query[head, -1] / 6**0.5).softmax(dim=0) / 4
        semantic += (value[head, 2:9] @ value[head, -1] / 6**0.5).softmax(dim=0) / 4
    size = value[:, 2:9].mean(dim=0).abs().sum(dim=-1)
    return (relation / relation.sum() + semantic / semantic.sum()) * size


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_count_as_often_as_they_are_used(groups: int) -> None:
    tokens = prompt(groups)
    torch.testing.assert_close(FlowCutLLM().score(tokens, EVENT), naive(tokens))


def test_cached_tokens_take_no_part() -> None:
    tokens = prompt()
    view = tokens.view()
    assert view.value is not None
    past = torch.full((2, 3, 6), 9.0)
    longer = replace(view, key=torch.cat([past, view.key], dim=1), value=torch.cat([past, view.value], dim=1))
    found = FlowCutLLM().score(replace(tokens, attention=longer), EVENT)
    torch.testing.assert_close(found, FlowCutLLM().score(tokens, EVENT))


def test_values_without_size_weigh_nothing() -> None:
    tokens = prompt()
    view = tokens.view()
    assert view.value is not None
    value = view.value.clone()
    value[:, 2:9] = 0.0
    score = FlowCutLLM().score(replace(tokens, attention=replace(view, value=value)), EVENT)
    assert score.tolist() == [0.0] * 7
    assert combined(torch.zeros(2), torch.zeros(2), torch.ones(2)).tolist() == [0.0, 0.0]


def test_the_layer_itself_works_on_what_is_left() -> None:
    method = FlowCutLLM(keep=4)
    (event,) = method.events(32)
    request = method.request(event)
    assert (event.layer, request.layer, request.ahead, request.values) == (1, 1, True, True)
    decision = method(prompt(), event)
    assert decision is not None
    assert decision.indices.tolist() == naive(prompt()).topk(4).indices.sort().values.tolist()


def test_values_are_needed() -> None:
    tokens = prompt()
    with pytest.raises(ValueError, match="values are missing"):
        relations(replace(tokens.view(), value=None), 11, tokens.candidates)
