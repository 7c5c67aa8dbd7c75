"""Drafters with trained weights: what they read and what they remember."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mmfast.registry import build
from mmfast.speculative.base import Drafter
from mmfast.speculative.heads.base import DecoderLayer, HeadConfig, _turned, rotation
from mmfast.speculative.heads.feature import CompressedHead, FeatureHead
from mmfast.speculative.heads.static import HydraHeads, LatentHead
from mmfast.speculative.heads.stream import Stream, runs
from mmfast.speculative.heads.tree import best_shape, filled
from support.drafting import Play, Toy, check_draft
from support.heads import (
    CONFIG,
    PROMPTS,
    SIZES,
    TURNED,
    WIDTH,
    each_prompt,
    each_rows,
    everything,
    random_head,
    streams,
    write,
)


@everything
@each_prompt
@each_rows
def test_drafts_are_legal(drafter: Drafter, parts: list[Any], rows: int) -> None:
    toy = Toy()
    # Many tokens that end an answer or are banned, so that trees meet them.
    changes = {"excluded": frozenset(range(0, 24, 5)), "stop": frozenset({1, 7, 8, 9})}
    play = Play.start(toy, drafter, [toy.prompt(parts, rows=rows)], **changes)
    longest = 0
    for budget, accept in ((100, 2), (1, 1), (3, 0), (7, 9), (2, 1)):
        root = play.answers[0][-1]
        draft = play.round(budget, accept)[0]
        check_draft(draft, play.request, min(budget, drafter.most))
        assert draft.tokens or root in play.request.stop
        longest = max(longest, len(draft.tokens))
    assert longest > 7


@everything
def test_rows_do_not_touch_each_other(drafter: Drafter) -> None:
    toy = Toy()
    prompts = [toy.prompt(parts, seed=i) for i, parts in enumerate(PROMPTS.values())]
    together = Play.start(toy, drafter, prompts)
    alone = [Play.start(toy, drafter, [prompt]) for prompt in prompts]
    for accept in (1, 0, 3):
        drafts = together.round(accept=accept)
        assert [drafts[row] for row in range(len(prompts))] == [play.round(accept=accept)[0] for play in alone]


def entries(stream: Stream) -> list[Tensor]:
    """All keys and values: what adding nothing returns."""
    found = []
    for cached in stream.caches:
        nothing = torch.zeros(CONFIG.groups, 0, CONFIG.head_dim, dtype=stream.feature.dtype)
        found += [part.clone() for part in cached.append(nothing, nothing)]
    return found


@streams
@each_prompt
@each_rows
def test_state_is_that_of_a_session_fed_with_the_truth(drafter: Drafter, parts: list[Any], rows: int) -> None:
    """After guesses, rejections and rounds without a draft, keys and values come from true states alone."""
    toy = Toy(dtype=torch.float64)
    prompt = toy.prompt(parts, rows=rows)
    play = Play.start(toy, drafter, [prompt])
    for accept, silent in ((2, ()), (0, ()), (0, (0,)), (100, ()), (0, (0,)), (0, (0,)), (1, ())):
        play.round(accept=accept, silent=silent)
    answer = play.answers[0]
    assert len(answer) > 8
    fresh = Play.start(toy, drafter, [toy.longer(prompt, answer[:-1])])
    seen, true = play.session.rows[0], fresh.session.rows[0]
    assert isinstance(seen, Stream)
    torch.testing.assert_close(seen.advance(answer[-1]), true.advance(answer[-1]), atol=1e-9, rtol=0)
    for left, right in zip(entries(seen), entries(true), strict=True):
        assert left.shape == right.shape
        torch.testing.assert_close(left, right, atol=1e-9, rtol=0)
    torch.testing.assert_close(seen.next, true.next)


@streams
def test_proposing_leaves_no_trace(drafter: Drafter) -> None:
    toy = Toy()
    prompt = toy.prompt([3, (0, 6), 4])
    seen, plain = (Play.start(toy, drafter, [prompt]).session.rows[0] for _ in range(2))
    root = toy.next(prompt.embeds)
    seen.propose(root, drafter.most)
    plain.advance(root)
    for left, right in zip(entries(seen), entries(plain), strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)


@everything
def test_images_matter(drafter: Drafter) -> None:
    """All but plain heads on one state must see a change in the first of two images, whatever the model says."""
    toy = Toy()
    prompt = toy.prompt([2, (0, 5), 2, (1, 5), 3])
    embeds, hidden = prompt.embeds.clone(), prompt.hidden.clone()
    embeds[2:7] += 1.0
    hidden[2:7] += 1.0
    changed = replace(prompt, embeds=embeds, hidden=hidden)
    laws = []
    for given in (prompt, changed):
        session = drafter.start(toy.request([given])).rows[0]
        laws.append(session.advance(5) if isinstance(session, Stream) else session._feature)
    blind = drafter.name == "medusa" or (drafter.name == "hydra" and _plain(drafter))
    assert torch.equal(*laws) == blind


def _plain(drafter: Any) -> bool:
    names = load_file(Path(drafter.path) / "model.safetensors")
    return not any(name.startswith("prefix") for name in names)


# ---------------------------------------------------------------------------------------- what enters a head


def test_msd_slots() -> None:
    toy, head = Toy(), FeatureHead(CONFIG)
    prompt = toy.prompt([2, (0, 3), 2, (1, 2), 2])
    slots = head.prompt(prompt)
    assert slots.positions.tolist() == list(range(10))
    for slot in range(10):
        embed, feature = prompt.embeds[slot + 1], prompt.hidden[slot]
        wanted = embed if prompt.visual[slot + 1] else head.fc(torch.cat([embed, feature]))
        torch.testing.assert_close(slots.inputs[slot], wanted)


def test_vispec_slots() -> None:
    toy, head = Toy(), CompressedHead(CONFIG, queries=3)
    with torch.no_grad():
        head.img_fc.weight.normal_()
    prompt = toy.prompt([2, (0, 5), 3, (1, 4), 2])
    slots = head.prompt(prompt)
    # Slots of text keep their positions; two tokens per image stand at the last two of its slots.
    assert slots.positions.tolist() == [0, 4, 5, 6, 7, 8, 11, 12, 13, 14]
    assert slots.places.tolist() == [0, -1, -1, 6, 7, 8, -1, -1, 13, 14]
    first, second = head.imadpt(prompt.embeds[2:7]), head.imadpt(prompt.embeds[10:14])
    torch.testing.assert_close(slots.inputs[1:3], first[:2])
    torch.testing.assert_close(slots.inputs[6:8], second[:2])
    for place, memo in ((0, torch.zeros(WIDTH)), (3, first[2]), (5, first[2]), (8, second[2])):
        slot = int(slots.places[place])
        seen = head.img_fc(torch.cat([prompt.hidden[slot], memo]))
        wanted = head.fc(torch.cat([prompt.embeds[slot + 1], seen]))
        torch.testing.assert_close(slots.inputs[place], wanted)
    assert slots.memo is not None
    torch.testing.assert_close(slots.memo, second[2:])


def test_vispec_begins_blind_to_the_global_vector() -> None:
    head = CompressedHead(CONFIG)
    embeds, features, memo = torch.randn(3, 2, WIDTH)
    assert torch.equal(head.fuse(embeds, features, memo[:1]), head.fuse(embeds, features, None))


def test_vispec_means_the_frames_of_a_video() -> None:
    toy, head = Toy(), CompressedHead(CONFIG)
    prompt = toy.prompt([2, (0, 4), 1, (0, 4), 1])
    slots = head.prompt(prompt)
    frames = [head.imadpt(prompt.embeds[2:6])[1:], head.imadpt(prompt.embeds[7:11])[1:]]
    assert slots.memo is not None
    torch.testing.assert_close(slots.memo, (frames[0] + frames[1]) / 2)


def test_adaptor_is_softmax_attention() -> None:
    adaptor, embeds = CompressedHead(CONFIG).imadpt, torch.randn(7, WIDTH)
    keys, values = adaptor.k_proj(embeds).view(7, 4, 8), adaptor.v_proj(embeds).view(7, 4, 8)
    weights = (torch.einsum("qhd,nhd->hqn", adaptor.q, keys) / 8**0.5).softmax(dim=-1)
    wanted = adaptor.o_proj(torch.einsum("hqn,nhd->qhd", weights, values).flatten(1))
    torch.testing.assert_close(adaptor(embeds), wanted)


def test_flash_slots() -> None:
    toy, head = Toy(), LatentHead(CONFIG, queries=3, steps=2)
    prompt = toy.prompt([2, (0, 6), 2])
    slots = head.prompt(prompt)
    assert slots.places.tolist() == [0, -1, -1, -1, 7, 8]
    # Every second of the slots 1 to 6, the last included.
    assert slots.positions.tolist() == [0, 2, 4, 6, 7, 8]
    latents = prompt.hidden[2:8]
    torch.testing.assert_close(slots.inputs[1:4], (head.A @ latents.T).softmax(dim=-1) @ latents)
    wanted = head.fc(torch.cat([prompt.embeds[8], prompt.hidden[7]]))
    torch.testing.assert_close(slots.inputs[4], wanted)
    states = torch.randn(2, WIDTH)
    assert torch.equal(head.foretell(states)[1, 1], head.mlp(head.norm(states))[1, WIDTH:])


def test_hydra_reads_the_path(tmp_path: Path) -> None:
    """Every node's children are the likeliest tokens of the head of its depth, given all tokens before."""
    head = random_head("hydra-plain")
    assert isinstance(head, HydraHeads)
    path = write(tmp_path, head, SIZES)
    toy = Toy()
    prompt = toy.prompt([3, (0, 6), 4])
    play = Play.start(toy, build("hydra", {"path": str(path), "total_tokens": 12, "top_k": 3}), [prompt])
    root = play.answers[0][-1]
    draft = play.round()[0]
    parents, tokens = draft.tree(), (root, *draft.tokens)
    for node in range(len(tokens)):
        below = [tokens[i] for i in range(len(tokens)) if parents[i] == node]
        line, at = [tokens[node]], node
        while at:
            at = parents[at]
            line.insert(0, tokens[at])
        if not below:
            continue
        joined = torch.cat([prompt.hidden[-1], toy.embed(torch.tensor(line)).flatten()])
        logits = toy.head(head.hydra_mlp[len(line) - 1](joined))
        logits[0] = -torch.inf
        assert below == logits.topk(len(below)).indices.tolist()
    assert draft.depth == 3


def test_medusa_reads_the_last_true_state(tmp_path: Path) -> None:
    head = random_head("medusa")
    toy = Toy()
    prompt = toy.prompt([3, (0, 6), 4])
    play = Play.start(toy, build("medusa", {"path": str(write(tmp_path, head, SIZES))}), [prompt])
    play.round(accept=2)
    play.round(accept=0)
    answer = list(play.answers[0])
    draft = play.round()[0]
    state = toy.hidden(torch.cat([prompt.embeds, toy.embed(torch.tensor(answer[:-1]))]))[len(prompt.ids) + 1 + 2]
    wanted = []
    for level in range(4):
        blocks = head[level]
        x = state
        for block in (blocks[0], blocks[1]):
            x = x + nn.functional.silu(block.linear(x))
        logits = blocks[2](x)
        logits[0] = -torch.inf
        wanted.append(logits.argmax().item())
    best, node = [], 0
    while any(parent == node for parent in draft.tree()):
        node = draft.tree().index(node)
        best.append(draft.tokens[node - 1])
        if best[-1] in play.request.stop:
            break
    assert best == wanted[: len(best)]
    assert len(answer) == 5


def test_runs_tell_frames_by_their_time() -> None:
    toy = Toy()
    prompt = toy.prompt([2, (0, 8), 2], rows=3)
    positions = prompt.positions.clone()
    assert [(run.start, run.end, run.media) for run in runs(prompt)] == [(1, 2, -1), (2, 10, 0), (10, 12, -1)]
    positions[0, 6:10] += 1
    split = runs(replace(prompt, positions=positions))
    assert [(run.start, run.end, run.media) for run in split] == [(1, 2, -1), (2, 6, 0), (6, 10, 0), (10, 12, -1)]
    assert runs(toy.prompt([1])) == []


# -------------------------------------------------------------------------------------------- layers and trees


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_that_of_llama(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=bias,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(theirs, 0).eval().requires_grad_(False)
    if bias:
        layer.self_attn.o_proj.bias.zero_()
    own = DecoderLayer(CONFIG, bias)
    known = {name: value for name, value in layer.state_dict().items() if name != "self_attn.o_proj.bias"}
    own.load_state_dict(known)
    x, positions = torch.randn(9, WIDTH), torch.arange(9) + 3
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    embeddings = LlamaRotaryEmbedding(theirs)(x[None], positions[None])
    wanted = layer(x[None], attention_mask=mask, position_embeddings=embeddings)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(own(x, rotation(CONFIG, positions)), wanted.reshape(9, WIDTH))


def test_three_rows_of_positions_turn_their_own_pairs() -> None:
    """Pairs 0 and 1 turn with time, 2 with height, 3 with width: each as in a head whose rows are all alike."""
    config = HeadConfig.read(TURNED, WIDTH)
    positions, q = torch.randint(0, 50, (3, 6)), torch.randn(4, 6, 8)
    got = _turned(q, rotation(config, positions))
    for row, pairs in ((0, [0, 1]), (1, [2]), (2, [3])):
        alike = _turned(q, rotation(replace(config, sections=()), positions[row]))
        places = [*pairs, *(pair + 4 for pair in pairs)]
        torch.testing.assert_close(got[..., places], alike[..., places])


def test_interleaved_rows_take_turns() -> None:
    config = replace(CONFIG, head_dim=12, sections=(2, 2, 2), interleaved=True, theta=1.0)
    cosine, _ = rotation(config, torch.tensor([[1], [2], [3]]))
    torch.testing.assert_close(cosine[0, :6], torch.tensor([1.0, 2, 3, 1, 2, 3]).cos())


def test_equal_rows_are_one_row() -> None:
    config = HeadConfig.read(TURNED, WIDTH)
    positions = torch.arange(5)
    torch.testing.assert_close(rotation(config, positions.expand(3, 5)), rotation(config, positions))


@pytest.mark.parametrize("total", [1, 5, 25, 63])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("top_k", [2, 10])
def test_shapes(total: int, depth: int, top_k: int) -> None:
    shape = best_shape(total, depth, top_k)
    most = sum(top_k**level for level in range(1, depth + 1))
    assert len(shape.parents) - 1 == min(total, most)
    assert max(shape.ranks) < top_k
    smaller = best_shape(max(1, total - 1), depth, top_k)
    assert len(smaller.parents) <= len(shape.parents)


def test_a_tree_has_no_room_for_tokens_that_cannot_be() -> None:
    levels = torch.full((2, 6), -torch.inf)
    levels[0, 4], levels[1, 2] = -0.1, -0.2
    assert filled(best_shape(20, 2, 5), levels, set()).tokens == (4, 2)
