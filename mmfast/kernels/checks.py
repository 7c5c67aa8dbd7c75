"""What operations require of their arguments, said in the same words everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Refuse a tensor of another shape.

    Args:
        name: of the argument.
        tensor: it.
        axes: letters of its axes, separated by spaces.
        sizes: letter -> size, of the axes whose size is fixed by other arguments.

    Raises:
        ValueError: naming argument, shape and legal shape.

    Example:
        >>> check_shape("key", torch.zeros(2, 3), "B d", B=2)
    """
    letters = axes.split()
    right = tensor.ndim == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if not right:
        where = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
        wanted = f"[{', '.join(letters)}]" + (f" with {where}" if where else "")
        raise ValueError(f"{name} has shape {list(tensor.shape)}, must be {wanted}")


def check_heads(name: str, count: int, multiple: int, heads: int) -> None:
    """Refuse a number of heads that does not share the query heads out evenly.

    Args:
        name: of the argument.
        count: how many heads it has.
        multiple: of what that has to be a multiple.
        heads: query heads.

    Raises:
        ValueError: naming argument, value and legal values.

    Example:
        >>> check_heads("key", 2, 1, 8)
    """
    if count < 1 or count % multiple or heads % count:
        raise ValueError(f"{name} has {count} heads, must be a multiple of {multiple} that divides {heads} query heads")


def check_bool(name: str, tensor: Tensor, means: str = "visible") -> None:
    """Refuse a mask that is not bool.

    Args:
        name: of the argument.
        tensor: it.
        means: what True says.

    Raises:
        TypeError: naming argument and dtype.

    Example:
        >>> check_bool("sees", torch.ones(1, dtype=torch.bool))
    """
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} is {tensor.dtype}, must be torch.bool (True = {means})")


def check_whole(name: str, tensor: Tensor) -> None:
    """Refuse places and counts that are no whole numbers.

    Raises:
        TypeError: naming argument and dtype.

    Example:
        >>> check_whole("counts", torch.ones(1, dtype=torch.int64))
    """
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {tensor.dtype}, must be torch.int32 or torch.int64")


def gradient_refusal(*tensors: Tensor | None) -> str:
    """Say why a kernel that has no backward form cannot run; empty where no gradients are wanted.

    Example:
        >>> gradient_refusal(torch.ones(1)), gradient_refusal(torch.ones(1, requires_grad=True)) != ""
        ('', True)
    """
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return "gradients are wanted, and it has no backward form" if wanted else ""


def attention_refusal(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Say why Triton cannot attend with these; empty where it can.

    Example:
        >>> attention_refusal(torch.ones(1, 600), torch.ones(1, 600), torch.ones(1, 600))
        'heads are wider than 256'
    """
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return "query, key and value have different dtypes"
    return "heads are wider than 256" if max(query.shape[-1], value.shape[-1]) > 256 else ""
