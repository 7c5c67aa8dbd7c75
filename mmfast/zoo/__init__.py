"""The embedded model: a small trained vision-language model that needs no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["EMBEDDED", "EMBEDDED_VOCO", "default_path", "embedded_name", "is_embedded", "load_default"]

EMBEDDED = "embedded"
"""What recipes, options and results call this model."""

EMBEDDED_VOCO = "embedded-voco"
"""The same model, taught to read an image through a few compression tokens: for the plan ``voco()``."""

_FOLDERS = {EMBEDDED: "tinyvlm", EMBEDDED_VOCO: "tinyvlm-voco"}


def is_embedded(name: str) -> bool:
    """Say whether a name means a model inside the package instead of a hub id or a folder.

    Example:
        >>> is_embedded("embedded-voco"), is_embedded("llava-hf/llava-1.5-7b-hf")
        (True, False)
    """
    return name in _FOLDERS


def default_path(name: str = EMBEDDED) -> Path:
    """Return the folder of an embedded model.

    Args:
        name: :data:`EMBEDDED` or :data:`EMBEDDED_VOCO`.

    Raises:
        ValueError: for another name.

    Example:
        >>> (default_path() / "MODEL_CARD.md").is_file()
        True
    """
    if name not in _FOLDERS:
        raise ValueError(f"name={name!r} is no embedded model; there are {', '.join(map(repr, _FOLDERS))}")
    return Path(str(files("mmfast"))) / "data" / _FOLDERS[name]


def embedded_name(folder: Path) -> str | None:
    """Return the name of the embedded model in a folder, or None if there is another.

    Example:
        >>> embedded_name(default_path()), embedded_name(Path("llava"))
        ('embedded', None)
    """
    return next((name for name in _FOLDERS if default_path(name) == folder), None)


def load_default(
    name: str = EMBEDDED,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "float32",
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    """Load an embedded model and its processor.

    It is a LLaVA model of 2.9 million parameters that knows coloured shapes and short text, and nothing else:
    see ``MODEL_CARD.md`` in :func:`default_path`.

    Args:
        name: :data:`EMBEDDED`, or :data:`EMBEDDED_VOCO` for the one with compression tokens.
        device: where to put the model; None leaves it on the CPU.
        dtype: floating type; the file holds float16.
        attn_implementation: ``"sdpa"``, ``"eager"``, ...; None lets transformers choose.

    Returns:
        ``(model, processor)``, a ``LlavaForConditionalGeneration`` and its ``LlavaProcessor``.

    Raises:
        ValueError: if an argument names no model, device, type or attention that there is.

    Example:
        >>> model, processor = load_default()
        >>> sum(p.numel() for p in model.parameters()) < 3_000_000
        True
    """
    # Loading transformers takes seconds, and importing mmfast must not.
    from mmfast.adapters import load_pretrained

    return load_pretrained(
        default_path(name),
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        progress=False,
    )
