"""Elastic Cache: what stays, what it absorbs, and what decode steps evict."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Retained, Step
from mmfast.kv.eviction import elastic_cache
from mmfast.kv.eviction.elastic_cache import ElasticCache
from support.entries import Case, tensor

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def check(case: Case) -> None:
    """Compare layer by layer, or step by step."""
    if "prefill_len" in case:
        check_steps(case)
        return
    keys, values, scores = (tensor(case, name) for name in ("key", "value", "scores"))
    length = scores.shape[-1]
    for layer in range(len(scores)):
        method = given(case, scores[layer])
        entries = Entries.of(keys[layer, 0], values[layer, 0])
        retained = method(entries) or Retained(torch.ones(length, dtype=torch.bool))
        places = retained.kept.nonzero().squeeze(-1)
        np.testing.assert_array_equal(places.numpy(), case["keep_idx"][layer])
        assert length - method.keep_count(length) == int(case["forget"])
        gone = (~retained.kept).nonzero().squeeze(-1)
        start = min(method.start, len(places) - 1)
        if len(places[start:-1]):
            target = elastic_cache.nearest_place(gone, places[start:-1])
            np.testing.assert_array_equal(target.numpy(), case["merge_target"][layer])
        compare(retained, entries, case["out_key"][layer, 0], case["out_value"][layer, 0])

        official = given(case, scores[layer], compat="official")
        entries = Entries.of(keys[layer, 0], values[layer, 0])
        retained = official(entries) or Retained(torch.ones(length, dtype=torch.bool))
        assert int(retained.kept.sum()) == int(case["official_kept_per_layer"][layer])
        if layer == 0:
            compare(retained, entries, case["official_out_key_layer0"][0], case["official_out_value_layer0"][0])
        # The official code sets no point where nothing is dropped.
        if int(case["forget"]):
            assert int(entries.memory["place"]) == int(case["eviction_point"])


def given(case: Case, scores: torch.Tensor, **options: str) -> ElasticCache:
    """Return the method with the attention that was given."""

    class Given(ElasticCache):
        def scores(self, entries: Entries) -> torch.Tensor:
            return scores

    return Given(keep=1 - float(case["drop_ratio"]), start=int(case["start_size"]), **options)


def compare(retained: Retained, entries: Entries, keys: np.ndarray, values: np.ndarray) -> None:
    """Compare what is stored after the prompt."""
    for found, before, expected in (
        (retained.keys, entries.keys, keys),
        (retained.values, entries.values, values),
    ):
        states = before if found is None else found
        np.testing.assert_allclose(states[:, retained.kept].numpy(), expected, **TOLERANCE)


def check_steps(case: Case) -> None:
    """Let tokens follow a prompt and compare what goes."""
    prompt = int(case["prefill_len"])
    method = ElasticCache(keep=1 - float(case["drop_ratio"]), distance=int(case["distance"]))
    query = torch.zeros(1, prompt, 1)
    entries = Entries.of(query, query, query)
    retained = method(entries)
    stored = prompt if retained is None else int(retained.kept.sum())
    lengths, evicted = [stored], []
    for seen in range(prompt + 1, prompt + 1 + int(case["steps"])):
        states = torch.zeros(1, stored + 1, 1)
        mask = method.step(Step(states, states, states[:, :1], seen, seen - prompt, memory=entries.memory))
        evicted.append(-1 if mask is None else int((~mask).nonzero()))
        stored += mask is None
        lengths.append(stored)
    np.testing.assert_array_equal(lengths, case["lengths"])
    np.testing.assert_array_equal(evicted, case["evicted_index"])
