"""Modules around the language model: what may see what, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mmfast.training.modules.crosslmm import DualCrossAttention, GatedCrossAttention, crossed, pool_frames
from mmfast.training.modules.deepstack import dilated_sets, mosaic, stacked, take_sets
from mmfast.training.modules.llava_mini import PreFusion, fuse_frames, raw_rows, splice

WIDTH = 16
IMAGE, PAD = -200, 0


# ------------------------------------------------------------------------------ LLaVA-Mini


def llama_fusion(layers: int = 2) -> PreFusion:
    """Layers of the language model's own class, as the paper has them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, num_hidden_layers=layers
    )
    config._attn_implementation = "sdpa"
    rotary = LlamaRotaryEmbedding(config)

    def call(layer: nn.Module, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        turned = rotary(states, positions)
        found: Any = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=turned)
        return found[0] if isinstance(found, tuple) else found

    return PreFusion([LlamaDecoderLayer(config, index) for index in range(layers)], call)


def prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Two turns: padding, image, question, answer, question, answer."""
    ids = torch.tensor([[PAD, IMAGE, 11, 12, 21, 22, 13, 14, 23]])
    labels = torch.tensor([[-100, -100, -100, -100, 21, 22, -100, -100, 23]])
    table = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    return ids, labels, table


def fused(fusion: PreFusion, ids: Tensor, labels: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    full, compressed = (torch.randn(1, count, WIDTH, generator=generator) for count in (9, 4))
    with torch.no_grad():
        return fusion(full, compressed, table[ids.clamp_min(0)], raw_rows(ids, labels))


def test_answers_do_not_leak_into_what_is_fused() -> None:
    fusion, (ids, labels, table) = llama_fusion(), prompt()
    answers = labels != -100
    other = torch.where(answers, ids + 10, ids)
    visual, text = fused(fusion, ids, labels, table)
    again, changed = fused(fusion, other, labels, table)
    torch.testing.assert_close(again, visual, rtol=0, atol=0)
    torch.testing.assert_close(changed[~answers], text[~answers], rtol=0, atol=0)
    assert not torch.equal(changed[answers], text[answers])
    # Were they seen, the second question would know the first answer.
    _, leaky = fused(fusion, ids, None, table)
    _, leaked = fused(fusion, other, None, table)
    assert not torch.allclose(leaky[0, 6:8], leaked[0, 6:8], atol=1e-4)


def test_rows_that_take_no_part_keep_their_embeddings() -> None:
    fusion, (ids, labels, table) = llama_fusion(), prompt()
    raw = raw_rows(ids, labels)
    assert raw[0].tolist() == [True, True, False, False, True, True, False, False, True]
    _, text = fused(fusion, ids, labels, table)
    embedded = table[ids.clamp_min(0)]
    assert torch.equal(text[raw], embedded[raw])
    assert not torch.isclose(text[~raw], embedded[~raw]).all(dim=-1).any()
    assert raw_rows(torch.tensor([[7, 5]]), placeholder=7).tolist() == [[True, False]]


def test_positions_count_what_is_seen() -> None:
    noted: list[Tensor] = []

    def call(layer: nn.Module, states: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        noted.extend([mask, positions])
        return states

    ids, labels, table = prompt()
    fused(PreFusion([nn.Identity()], call), ids, labels, table)
    mask, positions = noted
    assert positions[0, :13].tolist() == list(range(13))
    assert positions[0, 13:].tolist() == [12, 12, 13, 14, 14, 14, 15, 16, 16]
    # The second question sees the image and both questions, no answer and no padding.
    assert mask[0, 0, 20].tolist() == [*[True] * 13, *[False] * 2, True, True, False, False, True, True, False]


def test_text_is_not_trained_through_the_fusion() -> None:
    fusion = llama_fusion(1)
    text, full = torch.randn(1, 3, WIDTH, requires_grad=True), torch.randn(1, 4, WIDTH, requires_grad=True)
    fusion(full, torch.randn(1, 1, WIDTH), text)[1].sum().backward()
    assert text.grad is None
    assert full.grad is not None


def test_frames_are_fused_one_by_one_and_the_text_averaged() -> None:
    fusion = llama_fusion(1)
    full, compressed = torch.randn(3, 4, WIDTH), torch.randn(3, 2, WIDTH)
    text, raw = torch.randn(5, WIDTH), torch.tensor([True, False, False, False, False])
    frames, mean = fuse_frames(fusion, full, compressed, text, raw)
    alone = [fusion(full[t][None], compressed[t][None], text[None], raw[None]) for t in range(3)]
    torch.testing.assert_close(frames, torch.cat([visual[0] for visual, _ in alone]))
    torch.testing.assert_close(mean, torch.stack([own[0] for _, own in alone]).mean(dim=0))


def test_the_image_stands_where_its_placeholder_was() -> None:
    text, visual = torch.zeros(3, 1), torch.ones(2, 1)
    assert splice(visual, text, 0).flatten().tolist() == [1, 1, 0, 0]
    assert splice(visual, text, 2).flatten().tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"place=3 must be a row of the text, 0 to 2"):
        splice(visual, text, 3)


# ------------------------------------------------------------------------------ DeepStack


def test_sets_line_up_with_the_small_picture() -> None:
    large = torch.arange(24.0).reshape(4, 6, 1)
    sets = dilated_sets(large, 2)
    assert sets.shape == (4, 6, 1)
    for number, own in enumerate(sets):
        a, b = divmod(number, 2)
        assert own.flatten().tolist() == large[a::2, b::2].flatten().tolist()
    with pytest.raises(ValueError, match="step=4 must divide the sides of the map, 4 x 6"):
        dilated_sets(large, 4)
    batch = torch.stack([large, large + 100])
    assert torch.equal(dilated_sets(batch, 2)[:, 1], sets + 100)


def test_tiles_are_put_together_row_by_row() -> None:
    whole = torch.randn(4, 6, 3)
    tiles = torch.stack([whole[row : row + 2, col : col + 3] for row in (0, 2) for col in (0, 3)])
    assert torch.equal(mosaic(tiles, (2, 2)), whole)


class Plus(nn.Module):
    """A layer that adds a number and takes the states by either name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 1


def test_each_set_is_added_before_its_layer() -> None:
    layers = [Plus() for _ in range(5)]
    places = torch.tensor([[False, True, True], [True, False, False]])
    stacks = [torch.full((3, 2), 10.0), torch.full((3, 2), 100.0)]
    seen = []
    with stacked(layers, stacks, places, start=1, interval=2):
        states = torch.zeros(2, 3, 2)
        for layer in layers:
            states = layer(hidden_states=states)
            seen.append(states[..., 0])
        # A step of decoding brings one new token, which is no part of the picture.
        assert layers[1](torch.zeros(2, 1, 2)).unique().tolist() == [1.0]
    visual = places.float()
    for number, added in enumerate((0, 10, 10, 110, 110)):
        assert torch.equal(seen[number], number + 1 + added * visual)
    assert layers[1](torch.zeros(2, 3, 2)).unique().tolist() == [1.0]


def test_whoever_drops_tokens_drops_them_of_every_set() -> None:
    stacks = [torch.eye(4), 2 * torch.eye(4)]
    left = take_sets(stacks, torch.tensor([1, 3]))
    assert [own.shape for own in left] == [(2, 4), (2, 4)]
    assert torch.equal(left[1], stacks[1][[1, 3]])
    places = torch.tensor([[True, True, False]])
    with (
        pytest.raises(ValueError, match="set 0 has 4 rows for 2 visual tokens; see take_sets"),
        stacked([Plus(), Plus()], stacks, places),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"the last of 2 sets belongs to layer 2, which must lie in 0\.\.1"),
        stacked([Plus(), Plus()], left, places, start=1),
    ):
        pass


def test_no_hook_is_left_after_an_error() -> None:
    layers = [Plus()]
    places = torch.tensor([[True]])
    with pytest.raises(RuntimeError, match="broken"), stacked(layers, [torch.ones(1, 2)], places):
        raise RuntimeError("broken")
    assert not layers[0]._forward_pre_hooks


# ------------------------------------------------------------------------------ CrossLMM


def test_frames_are_pooled_to_squares() -> None:
    features = torch.arange(32.0).reshape(2, 16, 1)
    assert pool_frames(features, (4, 4), 2)[1].flatten().tolist() == [18.5, 20.5, 26.5, 28.5]
    assert torch.equal(pool_frames(features, (4, 4), 4), features)
    with pytest.raises(ValueError, match=r"side=5 must lie in 1\.\.4"):
        pool_frames(features, (4, 4), 5)


def opened(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, GatedCrossAttention):
            nn.init.ones_(module.gamma)
    return block


def test_a_gate_opens_from_zero() -> None:
    torch.manual_seed(0)
    module, tokens, context = GatedCrossAttention(8, 6, heads=2), torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    assert torch.equal(module(tokens, context), tokens)
    module(tokens, context).square().sum().backward()
    # Closed, it is the gate alone that learns.
    assert module.gamma.grad.abs() > 0
    assert not module.ln_kv.weight.grad.any()
    added = opened(module)(tokens, context) - tokens
    keys = module.ln_kv(context)
    torch.testing.assert_close(added, module.attn(module.ln_q(tokens), keys, keys)[0])


def test_padding_of_the_context_is_not_seen() -> None:
    torch.manual_seed(0)
    module, tokens, context = opened(GatedCrossAttention(8, 6, heads=2)), torch.randn(1, 3, 8), torch.randn(1, 5, 6)
    hidden = torch.tensor([[False, False, False, True, True]])
    torch.testing.assert_close(module(tokens, context, hidden), module(tokens, context[:, :3]))


def test_visual_tokens_and_text_look_through_modules_of_their_own() -> None:
    torch.manual_seed(0)
    block = DualCrossAttention(8, 6, heads=2)
    states, context, places = torch.randn(1, 4, 8), torch.randn(1, 5, 6), torch.tensor([[False, True, True, False]])
    nn.init.ones_(block.text_to_visual.gamma)
    changed = (block(states, context, places) != states).any(dim=-1)
    assert changed.tolist() == (~places).tolist()
    nn.init.ones_(block.visual_to_visual.gamma)
    assert bool((block(states, context, places) != states).any(dim=-1).all())
    only_text = opened(DualCrossAttention(8, 6, heads=2, visual=False))
    assert torch.equal(only_text(states, context, places)[places], states[places])


def test_blocks_stand_before_every_other_layer() -> None:
    torch.manual_seed(0)
    layers = [Plus() for _ in range(4)]
    blocks = [opened(DualCrossAttention(8, 6, heads=2)) for _ in range(2)]
    states, context, places = torch.zeros(1, 3, 8), torch.randn(1, 5, 6), torch.tensor([[True, False, False]])
    expected = states
    for number in range(4):
        if number % 2 == 0:
            expected = blocks[number // 2](expected, context, places)
        expected = expected + 1
    found = states
    with crossed(layers, blocks, 2, context, places):
        for layer in layers:
            found = layer(hidden_states=found)
        # A generated token looks as text.
        step = layers[0](states[:, :1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(step, blocks[0].text_to_visual(states[:, :1], context) + 1)
    assert not any(layer._forward_pre_hooks for layer in layers)
    with (
        pytest.raises(ValueError, match="every=3: 4 layers need 2 blocks, got 1"),
        crossed(layers, blocks[:1], 3, context, places),
    ):
        pass
