"""Heads that foretell hidden states, and the trees that grow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.speculative.base import Draft, Prefill, Request, check_count
from mmfast.speculative.heads.base import HeadConfig, Shapes
from mmfast.speculative.heads.stream import HeadDrafter, SlotHead, Slots, Stream, runs
from mmfast.speculative.tree import Frontier, grow


class FeatureHead(SlotHead):
    """One EAGLE layer, with images as they entered the model (arXiv 2401.15077, 2505.14260).

    A slot of text reads ``fc([embedding; hidden state])``, a slot whose token is visual the projected visual
    embedding alone. What the layer gives is a hidden state, from which the model's output layer tells the law.

    Args:
        config: sizes of the layers; the first has no norm before its attention.
        bias: whether queries, keys and values have one.
        fc_bias: whether ``fc`` has one.
    """

    def __init__(self, config: HeadConfig, bias: bool = False, fc_bias: bool = True) -> None:
        super().__init__(config, bias)
        self.fc = nn.Linear(2 * config.width, config.width, bias=fc_bias)

    @classmethod
    def fitting(cls, config: HeadConfig, shapes: Shapes) -> FeatureHead:
        """Make the module for a file, whose names tell which parts have a bias."""
        return cls(config, "layers.0.self_attn.q_proj.bias" in shapes, "fc.bias" in shapes)

    def fuse(self, embeds: Tensor, features: Tensor, memo: Tensor | None) -> Tensor:
        """Return ``fc([embeds; features])``."""
        fused: Tensor = self.fc(torch.cat([embeds, features.to(embeds.dtype)], dim=-1))
        return fused

    def prompt(self, prefill: Prefill) -> Slots:
        """Fuse the slots of text; those of images get what entered the model."""
        inputs, text = prefill.embeds[1:].clone(), ~prefill.visual[1:]
        # Under autocast the fused slots are of its type, the others of the model's.
        inputs[text] = self.fuse(inputs[text], prefill.hidden[:-1][text], None).to(inputs.dtype)
        return Slots(inputs, prefill.positions[..., :-1], torch.arange(len(inputs), device=inputs.device))


class ImageAdaptor(nn.Module):
    """Learned queries that read an image.

    Args:
        config: the sizes.
        queries: number of queries.
        bias: whether keys and values have one.
    """

    def __init__(self, config: HeadConfig, queries: int, bias: bool = False) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.q = nn.Parameter(torch.randn(queries, config.heads, config.head_dim) * config.head_dim**-0.5)
        self.k_proj = nn.Linear(config.width, inner, bias=bias)
        self.v_proj = nn.Linear(config.width, inner, bias=bias)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def forward(self, embeds: Tensor) -> Tensor:
        """Map the ``[N, D]`` embeddings of an image to ``[queries, D]``."""
        heads = self.q.shape[1]
        keys, values = (rearrange(layer(embeds), "n (h d) -> h n d", h=heads) for layer in (self.k_proj, self.v_proj))
        read = functional.scaled_dot_product_attention(self.q.transpose(0, 1)[None], keys[None], values[None])
        found: Tensor = self.o_proj(rearrange(read[0], "h q d -> q (h d)"))
        return found


class CompressedHead(FeatureHead):
    """An EAGLE layer that sees each image as a few tokens and one vector (arXiv 2509.15235).

    Args:
        config: sizes of the layers.
        queries: ``num_q``; all but the last become tokens of the image, the last is its global vector, which
            all later slots of text read.
        bias: whether queries, keys and values have one.
        fc_bias: whether ``fc`` and ``img_fc`` have one.
    """

    def __init__(self, config: HeadConfig, queries: int = 2, bias: bool = False, fc_bias: bool = True) -> None:
        super().__init__(config, bias, fc_bias)
        self.imadpt = ImageAdaptor(config, queries, bias)
        self.img_fc = nn.Linear(2 * config.width, config.width, bias=fc_bias)
        with torch.no_grad():
            self.img_fc.weight.copy_(torch.eye(config.width, 2 * config.width))
            if fc_bias:
                self.img_fc.bias.zero_()

    @classmethod
    def fitting(cls, config: HeadConfig, shapes: Shapes) -> CompressedHead:
        """Make the module for a file."""
        queries = shapes.get("imadpt.q", (2,))[0]
        return cls(config, queries, "layers.0.self_attn.q_proj.bias" in shapes, "fc.bias" in shapes)

    def fuse(self, embeds: Tensor, features: Tensor, memo: Tensor | None) -> Tensor:
        """Return ``fc([embeds; img_fc([features; memo])])``; no memo counts as zeros."""
        features = features.to(embeds.dtype)
        seen = torch.zeros_like(features) if memo is None else memo.expand_as(features)
        return super().fuse(embeds, self.img_fc(torch.cat([features, seen], dim=-1)), None)

    def prompt(self, prefill: Prefill) -> Slots:
        """Compress images and frames; their tokens stand at the last positions of what they stand for.

        The frames of a video have a global vector each; later text reads their mean.
        """
        inputs, places, globes = [prefill.embeds[:0]], [], dict[int, list[Tensor]]()
        memo: Tensor | None = None
        numbers = torch.arange(len(prefill.ids), device=prefill.embeds.device)
        stand = [numbers[:0]]
        for run in runs(prefill):
            embeds = prefill.embeds[run.tokens]
            if run.media < 0:
                inputs.append(self.fuse(embeds, prefill.hidden[run.slots], memo))
                stand.append(numbers[run.slots])
                places.append(numbers[run.slots])
                continue
            adapted = self.imadpt(embeds)
            globes.setdefault(run.media, []).append(adapted[-1:])
            memo = torch.stack(globes[run.media]).mean(dim=0)
            extra = len(adapted) - 1
            inputs.append(adapted[:-1])
            last = numbers[max(run.start, run.end - extra) - 1 : run.end - 1]
            # An image of fewer tokens than queries: the first stand where it begins.
            stand.append(torch.cat([last[:1].expand(extra - len(last)), last]))
            places.append(numbers.new_full((extra,), -1))
        at = torch.cat(stand)
        return Slots(torch.cat(inputs), prefill.positions[..., at], torch.cat([numbers[:0], *places]), memo)


class Growing(Stream):
    """A row whose drafts grow level by level.

    Args:
        head: the head.
        request: the call of ``generate``.
        row: which row.
        drafter: options of the tree.
    """

    def __init__(self, head: FeatureHead, request: Request, row: int, drafter: TreeDrafter) -> None:
        super().__init__(head, request, row)
        self._tree, self._stop = drafter, request.stop

    @torch.no_grad()
    def propose(self, root: int, budget: int) -> Draft:
        """Grow a tree; what it added to the caches is forgotten again."""
        outputs = self.advance(root)
        stable = self.caches[0].length

        def expand(frontier: Frontier) -> Tensor:
            nonlocal outputs
            inputs = self.head.fuse(self.words.embed(frontier.tokens), outputs[frontier.parents], self.memo)
            before = frontier.visible.new_ones(len(inputs), stable)
            spots = (self.next + frontier.level).expand(*self.next.shape[:-1], len(inputs))
            outputs = self.head.run(inputs, spots, self.caches, torch.cat([before, frontier.visible], dim=-1))
            return self.words.logs(outputs)

        draft = grow(
            self.words.logs(outputs)[0],
            expand,
            total_tokens=min(budget, self._tree.total_tokens),
            depth=min(self._tree.depth, budget - 1),
            top_k=self._tree.top_k,
            stop=self._stop,
        )
        for cache in self.caches:
            cache.crop(stable)
        return draft


@dataclass(frozen=True)
class TreeDrafter(HeadDrafter[FeatureHead]):
    """Base of drafters whose trees grow where the head is sure (EAGLE-2, arXiv 2406.16858).

    Attributes:
        path: where the weights lie; empty for those of the embedded model.
        total_tokens: tokens drafted at most, the root not counted.
        depth: runs of the layer beyond the root's; the tree is at most one level deeper.
        top_k: children of a node, and nodes looked beyond on a level, at most.
    """

    trees: ClassVar[bool] = True
    module: ClassVar[type[FeatureHead]] = FeatureHead

    total_tokens: int = 59
    depth: int = 5
    top_k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("total_tokens", self.total_tokens)
        check_count("depth", self.depth, least=0)
        check_count("top_k", self.top_k)

    @property
    def most(self) -> int:
        """Tokens of the tree."""
        return self.total_tokens

    def build(self, config: Mapping[str, Any], shapes: Shapes, width: int, vocabulary: int) -> FeatureHead:
        """Make the module of a file."""
        return self.module.fitting(HeadConfig.read(config, width), shapes)

    def row(self, head: FeatureHead, request: Request, row: int) -> Growing:
        """Begin one row."""
        return Growing(head, request, row, self)
