"""The outer wall towards models: the only room that knows transformers and model families."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.adapters.base import Adapter, families, family, for_model
    from mmfast.adapters.clip import load_clip
    from mmfast.adapters.compression import CompressionTokens, add_compression_tokens, split_compressed
    from mmfast.adapters.environment import attention_backends, importable
    from mmfast.adapters.loading import load_pretrained
    from mmfast.adapters.prompting import prepare
    from mmfast.adapters.random_models import random_model, random_model_budgets

_HOME = {
    "Adapter": "base",
    "CompressionTokens": "compression",
    "add_compression_tokens": "compression",
    "attention_backends": "environment",
    "families": "base",
    "family": "base",
    "for_model": "base",
    "importable": "environment",
    "load_clip": "clip",
    "load_pretrained": "loading",
    "prepare": "prompting",
    "random_model": "random_models",
    "random_model_budgets": "random_models",
    "split_compressed": "compression",
}

__all__ = [
    "Adapter",
    "CompressionTokens",
    "add_compression_tokens",
    "attention_backends",
    "families",
    "family",
    "for_model",
    "importable",
    "load_clip",
    "load_pretrained",
    "prepare",
    "random_model",
    "random_model_budgets",
    "split_compressed",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used; transformers is slow to load."""
    if name not in _HOME:
        raise AttributeError(f"module 'mmfast.adapters' has no attribute {name!r}")
    return getattr(import_module(f"mmfast.adapters.{_HOME[name]}"), name)
