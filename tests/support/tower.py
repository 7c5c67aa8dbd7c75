"""Signals of the vision tower, brought to the visual tokens by what reaches them.

Nothing here knows how a family arranges its patches. Every block's output is cut out of the graph, and the
gradient of a visual token tells which patches of which block went into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmfast.token_pruning.base import VisionSignal
from support.attended import Attended, Recording


class Tower:
    """One eager run of the vision side of a model on one prompt.

    Args:
        model: the model.
        embed: runs it up to the decoder and returns the embeddings ``[S, D]`` of the prompt.
        slots: places of visual tokens in the prompt, newline tokens included.

    Attributes:
        patches: per slot, the rows of the tower's output that went into it.
        features: the block whose output the model uses, the last one if it joins several.
        joins: whether it joins several.
    """

    @torch.enable_grad()
    def __init__(self, model: nn.Module, embed: Any, slots: Sequence[int]) -> None:
        self.embed = embed
        self.towers = towers_of(model)
        self.attention = {block: _attention_of(block) for tower in self.towers for block in tower}
        self.has_class = any(name.endswith(("class_embedding", "cls_token")) for name, _ in model.named_parameters())
        self.outputs: dict[nn.Module, list[Tensor]] = {block: [] for block in self.attention}
        self.recording = Recording(*self.attention.values())
        handles = [block.register_forward_hook(self._cut, prepend=True) for block in self.attention]
        try:
            with self.recording:
                embeds = embed()
        finally:
            for handle in handles:
                handle.remove()
        self.depth = len(self.towers[0])
        reached = [layer for layer in range(self.depth) if _reached(embeds[slots], self._leaves(layer))]
        self.features = reached[-1]
        self.joins = len(reached) > 1
        self.patches = {slot: self._origin(embeds[slot]) for slot in slots}
        self.embeds = embeds.detach()

    def _cut(self, block: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        leaf = states.detach().requires_grad_()
        self.outputs[block].append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    def _leaves(self, layer: int) -> list[Tensor]:
        return [leaf for tower in self.towers for leaf in self.outputs[tower[layer]]]

    def _origin(self, embedding: Tensor) -> Tensor:
        """Rows of the feature block's output, all runs together, on which an embedding depends."""
        leaves = self._leaves(self.features)
        weights = torch.linspace(1.0, 2.0, embedding.numel())
        slopes = torch.autograd.grad(
            (embedding * weights).sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([slope.flatten(0, -2) for slope in slopes])
        return (flat != 0).any(dim=-1).nonzero().squeeze(-1)

    # ------------------------------------------------------------------------ signals

    def signal(self, request: VisionSignal) -> dict[int, Tensor]:
        """Return one signal per slot; a token made of several patches has their mean."""
        rows = self._rows(request)
        empty = torch.zeros_like(rows[0])
        return {
            slot: rows[own].float().mean(dim=0).to(rows.dtype) if len(own) else empty
            for slot, own in self.patches.items()
        }

    def class_features(self, request: VisionSignal, slots: Sequence[int]) -> Tensor:
        """Return the class token of every tile that went into some slots."""
        layer = self.layer_of(request)
        rows = torch.cat([leaf.detach().flatten(0, -2) for leaf in self._leaves(layer)])
        size = self._leaves(layer)[0].shape[-2]
        tiles = torch.cat([self.patches[slot] for slot in slots]).div(size, rounding_mode="floor").unique()
        return rows[tiles * size]

    def layer_of(self, request: VisionSignal) -> int:
        """Return the block that a signal names."""
        if request.layer == "features":
            return self.features
        if request.layer == "last":
            return self.depth - 1
        if isinstance(request.layer, int):
            return request.layer
        return min(self.depth - 1, round(request.layer * self.depth))

    def _runs(self, layer: int) -> list[Attended]:
        return [run for tower in self.towers for run in self.recording.runs.get(self.attention[tower[layer]], [])]

    def _rows(self, request: VisionSignal) -> Tensor:
        layer = self.layer_of(request)
        if request.kind == "patch_features":
            return torch.cat([leaf.detach().flatten(0, -2) for leaf in self._leaves(layer)])
        if request.kind not in ("keys", "queries"):
            # A block that attends in windows, in more runs than others, cannot rank patches of several windows.
            number = [len(self._runs(other)) for other in range(self.depth)]
            whole = [other for other in range(self.depth) if number[other] == min(number)]
            layer = max((other for other in whole if other <= layer), default=whole[0])
        return torch.cat([self._one(run, request) for run in self._runs(layer)]).detach()

    def _one(self, run: Attended, request: VisionSignal) -> Tensor:
        if request.kind in ("keys", "queries"):
            states = (run.key if request.kind == "keys" else run.query).float()
            if request.heads == "join":
                return rearrange(states, "h n d -> n (h d)")
            return states.mean(dim=0) if request.heads == "mean" else states.sum(dim=0)
        query, key, scaling = run.query.float(), run.key.float(), run.scaling
        if request.heads == "join":
            query, key = (rearrange(states, "h n d -> 1 n (h d)") for states in (query, key))
            scaling = query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scaling
        weights = (logits if run.mask is None else logits + run.mask).softmax(dim=-1)
        if self.has_class and request.kind != "received_attention":
            per_head = weights[:, 0] if request.kind == "cls_attention" else logits[:, 0]
        else:
            # Several images may lie in one run; each token is looked at by those of its own.
            lookers = (weights > 0).any(dim=0).sum(dim=0)
            per_head = weights.sum(dim=1) / lookers
        found = per_head.sum(dim=0) if request.heads == "sum" else per_head.mean(dim=0)
        if self.has_class:
            # Where the class token is a visual token itself, it gets the mean of its tile.
            found[0] = found[1:].mean()
        return found

    # ------------------------------------------------------------------------ projecting

    def projectable(self, slots: Sequence[int]) -> bool:
        """Say whether the embeddings of some slots follow from the mean of their patches, one by one."""
        if self.joins:
            return False
        rows = self.signal(VisionSignal("patch_features"))
        own = {slot: rows[slot] for slot in slots if len(self.patches[slot])}
        found = self.project(own)
        return all(bool((found[slot] - self.embeds[slot]).abs().max() < 1e-4) for slot in own)

    def project(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Run the rest of the vision side with other features at some slots; return their embeddings."""
        runs = self._leaves(self.features)
        flat = torch.cat([leaf.detach().flatten(0, -2) for leaf in runs])
        for slot, feature in features.items():
            flat[self.patches[slot]] = feature.to(flat.dtype)
        parts = flat.split([leaf[..., 0].numel() for leaf in runs])
        queue = {id(leaf): part.view_as(leaf) for part, leaf in zip(parts, runs, strict=True)}

        def replacing(block: nn.Module) -> Any:
            states = iter([queue[id(leaf)] for leaf in self.outputs[block]])

            def put(block: nn.Module, args: Any, output: Any) -> Any:
                return (next(states), *output[1:]) if isinstance(output, tuple) else next(states)

            return put

        blocks = [tower[self.features] for tower in self.towers]
        handles = [block.register_forward_hook(replacing(block), prepend=True) for block in blocks]
        try:
            embeds = self.embed()
        finally:
            for handle in handles:
                handle.remove()
        return {slot: embeds[slot] for slot in features}


def towers_of(model: Any) -> list[nn.ModuleList]:
    """Find the stacks of blocks with attention that are no part of the decoder."""
    decoder = set(model.get_decoder().modules())
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and module not in decoder]
    return [stack for stack in stacks if any(_attends(part) for part in stack[0].modules())]


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "q_proj") or hasattr(module, "qkv")


def _attention_of(block: nn.Module) -> nn.Module:
    return next(part for part in block.modules() if _attends(part))


def _reached(embeds: Tensor, leaves: list[Tensor]) -> bool:
    slopes = torch.autograd.grad(embeds.square().sum(), leaves, retain_graph=True, allow_unused=True)
    return any(slope is not None and bool((slope != 0).any()) for slope in slopes)
