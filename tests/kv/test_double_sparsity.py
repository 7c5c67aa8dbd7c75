"""Double Sparsity: where its channels come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.double_sparsity import channel_order
from mmfast.registry import get


def test_channels_are_ranked_by_mean_sizes_of_queries_and_keys() -> None:
    query = torch.tensor([[[1.0, -4.0, 2.0]], [[3.0, 0.0, 1.0]]])
    keys = torch.tensor([[[1.0, 1.0, -9.0], [1.0, -1.0, 9.0]]])
    # Products of the means: (1, 4, 18) and (3, 0, 9).
    assert channel_order(query, keys).tolist() == [[2, 1, 0], [2, 0, 1]]
    assert channel_order(query, keys, "q").tolist() == [[1, 2, 0], [0, 2, 1]]
    assert channel_order(query, keys, "k").tolist() == [[2, 0, 1], [2, 0, 1]]


def prompt() -> Entries:
    """The first channel of the keys is strong, the second weak."""
    keys = torch.tensor([[[5.0, 0.0], [-5.0, 1.0], [5.5, -1.0], [-5.0, 0.0]]])
    return Entries.of(keys, keys, torch.ones(1, 4, 2))


def test_the_prompt_itself_says_which_channels_count() -> None:
    entries = prompt()
    method = get("double_sparsity").method(keep=1, group_factor=2, dense_layers=0)
    method.prepare(entries)
    assert entries.memory["labels"].flatten().tolist() == [5.0, -5.0, 5.5, -5.0]
    keys = torch.cat([entries.keys, torch.zeros(1, 1, 2)], dim=1)
    # In full, entry 1 has the largest logit; the strong channel alone says entry 2.
    query = torch.tensor([[[0.1, 9.0]]])
    chosen = method.choose(Step(keys, keys, query, seen=5, memory=entries.memory))
    assert chosen.tolist() == [[False, False, True, False, True]]


def test_channels_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "channels.safetensors"
    save_file({"0": torch.tensor([[1, 0]])}, path)
    entries = prompt()
    method = get("double_sparsity").method(keep=1, group_factor=2, file=str(path), dense_layers=0)
    method.prepare(entries)
    assert entries.memory["channels"].tolist() == [[1]]
    assert entries.memory["labels"].flatten().tolist() == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize("stored", [{"1": torch.tensor([[1, 0]])}, {"0": torch.tensor([[1, 0, 2]])}])
def test_a_file_of_another_model_is_refused(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "channels.safetensors"
    save_file(stored, path)
    method = get("double_sparsity").method(keep=1, file=str(path), dense_layers=0)
    with pytest.raises(ValueError, match=r"tensor '0' is .*shape \(1, 2\)"):
        method.prepare(prompt())


@pytest.mark.parametrize("options", [{"group_factor": 0}, {"label_bits": 0}, {"criterion": "v"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        get("double_sparsity").method(**options)
