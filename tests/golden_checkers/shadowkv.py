"""ShadowKV: how the prompt is cut, landmarks and outliers, what is read, and the thin matrices."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.kv.entries import Entries, Step
from mmfast.kv.retrieval.shadowkv import Sizes, best_chunks, landmarks, low_rank
from mmfast.registry import get
from support.entries import Case, indices, tensor


def check(case: Case) -> None:
    """Compare each prompt; the official budget counts neither the end nor the outliers, ours does."""
    chunk, tail = int(case["chunk_size"]), int(case["prefill_local"])
    outlier_chunks, count = int(case["outlier_chunks"]), int(case["sparse_budget"]) // chunk
    method = get("shadowkv").method(
        keep=count * chunk + outlier_chunks * chunk + tail,
        chunk_size=chunk,
        outlier_chunks=outlier_chunks,
        local_chunks=int(case["local_chunks"]),
        dense_layers=0,
        compat="official",
    )
    for row, (keys, query) in enumerate(zip(tensor(case, "key"), tensor(case, "query_decode"), strict=True)):
        total = keys.shape[1]
        chunks = total // chunk - method.local_chunks
        assert (chunks, total - chunks * chunk) == (int(case["num_chunks"]), tail)
        marks, outliers = landmarks(keys, chunk, chunks, outlier_chunks)
        np.testing.assert_array_equal(indices(outliers), case["outlier_idx"][row])
        np.testing.assert_array_equal(indices(~outliers), case["landmark_idx"][row])
        own = marks[~outliers].unflatten(0, (len(keys), -1))
        np.testing.assert_allclose(own.numpy(), case["landmarks"][row], rtol=1e-5, atol=1e-5)
        chosen = best_chunks(query[:, 0], marks, outliers, count, 128**-0.5).repeat_interleave(chunk, dim=-1)
        np.testing.assert_array_equal(indices(chosen), case["retrieved_positions"][row])
        left, right = low_rank(tensor(case, "key_pre_rope")[row], int(case["rank"]))
        np.testing.assert_allclose((left @ right).numpy(), case["key_lowrank"][row], rtol=1e-4, atol=1e-4)
        # Smaller budgets are cut into smaller chunks.
        if 4 * chunk <= method.keep < total:
            assert method.sizes(total, method.keep) == Sizes(chunk, chunks, outlier_chunks, count)
            entries = Entries.of(keys, torch.zeros_like(keys))
            method.prepare(entries)
            read = method.choose(Step(keys, keys, query, seen=total, added=0, memory=entries.memory))
            expected = torch.ones_like(read)
            expected[:, : chunks * chunk] = chosen | outliers.repeat_interleave(chunk, dim=-1)
            np.testing.assert_array_equal(read.numpy(), expected.numpy())
