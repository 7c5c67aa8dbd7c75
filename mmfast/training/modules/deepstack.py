"""DeepStack: a picture of high resolution is added, layer by layer, to the tokens of one of low resolution.

Paper: "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs" (arXiv 2406.04334).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from torch import Tensor, nn


def mosaic(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put the maps of tiles together.

    Args:
        tiles: ``[rows * cols, h, w, D]``, row by row.
        grid: rows and columns of tiles.

    Returns:
        ``[rows * h, cols * w, D]``.

    Example:
        >>> import torch
        >>> mosaic(torch.arange(4.0).reshape(4, 1, 1, 1), (2, 2)).squeeze(-1).tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    return rearrange(tiles, "(a b) h w d -> (a h) (b w) d", a=grid[0], b=grid[1])


def dilated_sets(large: Tensor, step: int = 2) -> Tensor:
    """Split a map into sets that each cover the whole picture: set (a, b) is every ``step``-th point from (a, b) on.

    Each set lines up with the tokens of the picture that is ``step`` times smaller.

    Args:
        large: ``[..., step * h, step * w, D]``, projected features of the large picture.
        step: how many times larger it is on each side.

    Returns:
        ``[step * step, ..., h * w, D]``, set (0, 0) first, then (0, 1).

    Raises:
        ValueError: if the step does not divide the sides.

    Example:
        >>> import torch
        >>> large = torch.arange(4.0).reshape(2, 2, 1)
        >>> [own.flatten().tolist() for own in dilated_sets(large)]
        [[0.0], [1.0], [2.0], [3.0]]
    """
    if step < 1 or large.shape[-3] % step or large.shape[-2] % step:
        raise ValueError(f"step={step} must divide the sides of the map, {large.shape[-3]} x {large.shape[-2]}")
    return rearrange(large, "... (h a) (w b) d -> (a b) ... (h w) d", a=step, b=step)


def take_sets(stacks: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    """Keep of every set what was kept of the visual tokens: whoever drops some has to do this too.

    Args:
        stacks: ``[N, D]`` each.
        indices: int64 ``[K]`` tokens that are left.

    Example:
        >>> import torch
        >>> [own.tolist() for own in take_sets([torch.eye(2)], torch.tensor([1]))]
        [[[0.0, 1.0]]]
    """
    return [own[indices.to(own.device)] for own in stacks]


@contextmanager
def stacked(
    layers: Sequence[nn.Module], stacks: Sequence[Tensor], places: Tensor, *, start: int = 0, interval: int = 1
) -> Iterator[None]:
    """Let layers of a language model read more of the picture for as long as the context lasts.

    Set i is added to the visual tokens at the input of layer ``start + i * interval``, in calls that read the whole
    prompt; steps of one token pass as they are.

    Args:
        layers: the decoder layers, which take the hidden states first.
        stacks: ``[V, D]`` each, in the order of the visual tokens of the batch.
        places: bool ``[B, S]``, V visual tokens in all.
        start: layer of the first set.
        interval: layers from one set to the next.

    Raises:
        ValueError: if there are not as many rows as visual tokens, or not enough layers.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> with stacked([layer], [torch.ones(1, 2)], torch.tensor([[False, True]])):
        ...     layer(torch.zeros(1, 2, 2)).tolist()
        [[[0.0, 0.0], [1.0, 1.0]]]
    """
    total = int(places.sum())
    for number, own in enumerate(stacks):
        if own.shape[0] != total:
            raise ValueError(f"set {number} has {own.shape[0]} rows for {total} visual tokens; see take_sets")
    last = start + (len(stacks) - 1) * interval
    if start < 0 or interval < 1 or last >= len(layers):
        raise ValueError(
            f"start={start}, interval={interval}: the last of {len(stacks)} sets belongs to layer {last}, which must "
            f"lie in 0..{len(layers) - 1}"
        )
    handles = []
    try:
        for number, own in enumerate(stacks):
            hook = _added(own, places)
            handles.append(layers[start + number * interval].register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _added(own: Tensor, places: Tensor) -> Any:
    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs["hidden_states"] if named else args[0]
        if hidden.shape[:2] != places.shape:
            return args, kwargs
        rows, cols = places.to(hidden.device).nonzero(as_tuple=True)
        hidden = hidden.index_put((rows, cols), own.to(hidden.device, hidden.dtype), accumulate=True)
        return (args, {**kwargs, "hidden_states": hidden}) if named else ((hidden, *args[1:]), kwargs)

    return add
