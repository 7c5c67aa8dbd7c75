"""Plans with one method of the cache each, small enough to change something in prompts of forty tokens."""

from __future__ import annotations

import mmfast

OPTIONS = {
    "snapkv": "keep=0.4, window=4",
    "actqkv": "keep=0.4, dense_layers=0, block_size=2, representatives=1, first=2, local=4, window=4",
    "double_sparsity": "keep=0.4, dense_layers=0, group_factor=2",
    "fp8": "residual=2",
    "gear": "residual=8, group=8, rank=1",
    "int8": "residual=2",
    "kivi": "bits=2, group=8, residual=8",
    "kvquant": "bits=2, residual=2",
    "lserve": "keep=0.4, dense_layers=0, sinks=2, local=4, page_size=4, parts=2, window=4",
    "mustafar": "residual=2",
    "quest": "keep=0.4, dense_layers=0, page_size=2",
    "recycled_attention": "keep=0.4, dense_layers=0, stride=2, recent=2",
    "rekv": "keep=0.4, dense_layers=0",
    "sentence_kv": "keep=0.4, dense_layers=0, first=2, local=2, sentence=4, window=4",
    "shadowkv": "keep=0.4, dense_layers=0, chunk_size=3, outlier_chunks=2, local_chunks=1",
    "spec_kv": "keep=0.4, lookahead=2, window=4",
    "squeezed_attention": "keep=0.4, dense_layers=0, clusters=0.3, observation=8",
    "token_select": "keep=0.4, dense_layers=0, first=2, local=4",
    "vasparse": "keep=0.4, dense_layers=0",
}
"""Options where the defaults are made for longer prompts."""


def plan_of(info: mmfast.MethodInfo, keep: float | None = None) -> str:
    """Write a plan with one method; what adjusts an eviction gets one."""
    options = OPTIONS.get(info.name, "keep=0.4" if "keep" in info.options else "")
    if keep is not None and "keep" in info.options:
        options = f"keep={keep}"
    before = "snapkv(keep=0.4, window=4) + " if info.kind == "Adjuster" else ""
    return f"{before}{info.name}({options})"


METHODS = mmfast.methods("cache")
