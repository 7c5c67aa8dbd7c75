"""ShadowKV: how small prompts are cut, what is always read, and the thin copy of the keys."""

from __future__ import annotations

import pytest
import torch

from mmfast.kv.entries import Entries, Step, rotate
from mmfast.registry import get
from support.entries import rotary


@pytest.mark.parametrize("total", [2, 8, 31, 100, 577])
def test_every_budget_leaves_chunks_to_choose_from_and_is_used_up_but_for_part_of_one(total: int) -> None:
    for kept in range(1, total):
        sizes = get("shadowkv").method().sizes(total, kept)
        end = total - sizes.chunk * sizes.chunks
        read = end + sizes.chunk * (sizes.outliers + sizes.chosen)
        assert kept - sizes.chunk < read <= kept
        assert 1 <= sizes.chosen <= sizes.chunks - sizes.outliers


def test_a_chunk_without_a_common_direction_is_always_read() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat_interleave(
        2, 0
    )
    keys[3] = torch.tensor([0.0, -1.0])
    entries = Entries.of(torch.cat([keys, torch.zeros(1, 2)])[None], torch.zeros(1, 13, 2))
    method = get("shadowkv").method(keep=8, chunk_size=2, outlier_chunks=1, local_chunks=0, dense_layers=0)
    method.prepare(entries)
    read = []
    for query in ([1.0, 0.0], [0.0, 1.0], [-1.0, -2.0]):
        step = Step(entries.keys, entries.values, torch.tensor([[query]]), seen=13, added=0, memory=entries.memory)
        read.append(method.choose(step)[0].nonzero().squeeze(-1).tolist())
    # The outlier is chunk 1; two chunks more, and what fills no chunk.
    assert read == [[0, 1, 2, 3, 4, 5, 12], [2, 3, 4, 5, 8, 9, 12], [0, 1, 2, 3, 6, 7, 12]]


def test_the_thin_copy_is_of_keys_without_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    bare = torch.randn(1, 40, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    bare = bare.view(40, 2, 8).transpose(0, 1)
    rotation = rotary(40, 8, 1e4)
    entries = Entries.of(rotate(bare, rotation.cos, rotation.sin), bare, rotation=rotation)
    get("shadowkv").method(keep=20, rank=2, dense_layers=0).prepare(entries)
    left, right = entries.memory["left"], entries.memory["right"]
    assert (tuple(left.shape), tuple(right.shape)) == ((40, 2), (2, 2, 8))
    assert torch.allclose(left @ right, bare, atol=1e-4)


def test_logits_are_scaled_as_the_model_scales_them_unless_asked() -> None:
    # Two query heads: by its own scale the second is surer of chunk 2 than the first of chunk 0.
    marks = torch.tensor([[[4.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 2.9]]])
    memory = {"landmarks": marks, "outliers": torch.zeros(1, 4, dtype=torch.bool)}
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]])
    keys = marks
    chosen = {}
    for compat in (None, "official"):
        method = get("shadowkv").method(keep=1, chunk_size=1, dense_layers=0, compat=compat)
        step = Step(keys, keys, query, seen=4, added=0, memory=dict(memory), scaling=1.0)
        chosen[compat] = method.choose(step)[0].tolist()
    assert chosen[None] == [True, False, False, False]
    assert chosen["official"] == [False, False, True, False]


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"outlier_chunks": -1}, {"rank": 0}, {"compat": "yes"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("shadowkv").method(**options)
