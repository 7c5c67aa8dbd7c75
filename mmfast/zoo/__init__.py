"""The embedded model: a small trained vision-language model that needs no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["EMBEDDED", "default_path", "load_default"]

EMBEDDED = "embedded"
"""What recipes, options and results call this model."""


def default_path() -> Path:
    """Return the folder of the embedded model.

    Example:
        >>> (default_path() / "MODEL_CARD.md").is_file()
        True
    """
    return Path(str(files("mmfast"))) / "data" / "tinyvlm"


def load_default(
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "float32",
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load the embedded model and its processor.

    It is a LLaVA model of 2.2 million parameters that knows coloured shapes and short text, and nothing else:
    see ``MODEL_CARD.md`` in :func:`default_path`.

    Args:
        device: where to put the model; None leaves it on the CPU.
        dtype: floating type; the file holds float16.
        attn_implementation: ``"sdpa"``, ``"eager"``, ...; None lets transformers choose.

    Returns:
        ``(model, processor)``, a ``LlavaForConditionalGeneration`` and its ``LlavaProcessor``.

    Raises:
        ValueError: if an argument names no device, type or attention that there is.

    Example:
        >>> model, processor = load_default()
        >>> sum(p.numel() for p in model.parameters()) < 3_000_000
        True
    """
    # Loading transformers takes seconds, and importing mmfast must not.
    from mmfast.adapters import load_pretrained

    return load_pretrained(
        default_path(),
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        progress=False,
    )
