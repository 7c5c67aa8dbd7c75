"""Heads that foretell several tokens from one hidden state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.speculative.base import Prefill
from mmfast.speculative.heads.base import Attention, DecoderLayer, HeadConfig, Shapes, SlotCache, rotation
from mmfast.speculative.heads.stream import SlotHead, Slots, runs


class ResBlock(nn.Module):
    """``x + SiLU(Wx + b)``, or, where blocks of width D are joined, a linear map in place of ``x``.

    Args:
        width: D.
        joined: number of blocks that enter side by side.
    """

    def __init__(self, width: int, joined: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(joined * width, width)
        nn.init.zeros_(self.linear.weight)
        self.res_connection = nn.Linear(joined * width, width) if joined > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., joined * D]`` to ``[..., D]``."""
        y: Tensor = self.res_connection(x) + functional.silu(self.linear(x))
        return y


class MedusaHeads(nn.ModuleList):
    """Heads that each foretell one token further (arXiv 2401.10774).

    Args:
        width: D.
        heads: how many.
        blocks: residual blocks of each.
        vocabulary: V of the output layer of each head; None where they share the model's.
    """

    def __init__(self, width: int, heads: int, blocks: int = 1, vocabulary: int | None = None) -> None:
        output = [] if vocabulary is None else [(width, vocabulary)]
        super().__init__(
            nn.Sequential(*(ResBlock(width) for _ in range(blocks)), *(nn.Linear(*o, bias=False) for o in output))
            for _ in range(heads)
        )
        self.blocks, self.own_output = blocks, vocabulary is not None

    @classmethod
    def fitting(cls, shapes: Shapes, width: int, vocabulary: int) -> MedusaHeads:
        """Make the module for a file, whose names tell the numbers of heads and blocks.

        Raises:
            ValueError: if there are no heads in it.
        """
        inner = [found for found in (re.fullmatch(r"(\d+)\.(\d+)\.linear\.weight", name) for name in shapes) if found]
        if not inner:
            raise ValueError("it holds no tensors such as 0.0.linear.weight")
        heads, blocks = (1 + max(int(found[part]) for found in inner) for part in (1, 2))
        own = any(re.fullmatch(r"\d+\.\d+\.weight", name) for name in shapes)
        return cls(width, heads, blocks, vocabulary if own else None)

    def features(self, feature: Tensor) -> Tensor:
        """Return what enters the output layers: ``[..., D]`` to ``[heads, ..., D]``."""
        return torch.stack([head[: self.blocks](feature) for head in self._heads()])

    def outputs(self) -> list[nn.Module | None]:
        """Return the output layer of each head; None for the model's."""
        return [head[-1] if self.own_output else None for head in self._heads()]

    def _heads(self) -> list[nn.Sequential]:
        return [cast(nn.Sequential, head) for head in self]


class PrefixLayer(nn.Module):
    """A decoder layer over hidden states, and a norm.

    Args:
        config: the sizes.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, config: HeadConfig, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(config, bias)])
        self.norm = nn.RMSNorm(config.width, eps=config.eps)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache: SlotCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map ``[n, D]`` to ``[n, D]``; the arguments are those of the attention."""
        y: Tensor = self.norm(self.layers[0](x, turn, cache, mask))
        return y


class HydraHeads(SlotHead):
    """Heads that each read the tokens drafted before (arXiv 2402.05109).

    With ``prefix`` (Hydra++) a decoder layer over the hidden states comes first.

    Args:
        config: sizes; ``layers`` is not read.
        heads: how many.
        blocks: residual blocks of each.
        vocabulary: V of the output layer of each head; None where they share the model's.
        prefix: whether there is the layer.
        bias: whether its queries, keys and values have one.
    """

    def __init__(
        self,
        config: HeadConfig,
        heads: int,
        blocks: int = 4,
        vocabulary: int | None = None,
        prefix: bool = True,
        bias: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.blocks = config, blocks
        # The numbers of the blocks leave room for the dropout between them, as in official files.
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(*_spaced(ResBlock(config.width, 1 if block else head + 2) for block in range(blocks)))
            for head in range(heads)
        )
        if vocabulary is not None:
            self.hydra_lm_head = nn.ModuleList(
                nn.Sequential(nn.Identity(), nn.Linear(config.width, vocabulary)) for _ in range(heads)
            )
        self.own_output = vocabulary is not None
        if prefix:
            self.prefix_embeding_layer = PrefixLayer(config, bias)
        self.prefix = prefix

    @classmethod
    def fitting(cls, config: Mapping[str, object], shapes: Shapes, width: int, vocabulary: int) -> HydraHeads:
        """Make the module for a file.

        Raises:
            ValueError: if there are no heads in it, or the config does not tell the sizes of the layer.
        """
        blocks = [name for name in shapes if name.startswith("hydra_mlp.") and name.endswith(".linear.weight")]
        places = [name.split(".") for name in blocks]
        if not places:
            raise ValueError("it holds no tensors such as hydra_mlp.0.1.linear.weight")
        prefix = any(name.startswith("prefix_embeding_layer.") for name in shapes)
        # Without the layer there is no attention whose sizes matter.
        sizes = HeadConfig.read(config, width) if prefix else HeadConfig(width, 1, 1, 1, 2)
        return cls(
            sizes,
            heads=1 + max(int(parts[1]) for parts in places),
            blocks=max(int(parts[2]) for parts in places) // 2 + 1,
            vocabulary=vocabulary if any(name.startswith("hydra_lm_head.") for name in shapes) else None,
            prefix=prefix,
            bias="prefix_embeding_layer.layers.0.self_attn.q_proj.bias" in shapes,
        )

    def fuse(self, embeds: Tensor, features: Tensor, memo: Tensor | None) -> Tensor:
        """Return the hidden states: the layer reads them alone."""
        return features

    def caches(self) -> list[SlotCache]:
        """Make an empty cache for the layer."""
        return [SlotCache()] if self.prefix else []

    def run(
        self, inputs: Tensor, positions: Tensor, caches: list[SlotCache] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the layer and its norm; without it the hidden states stay as they are."""
        if not self.prefix:
            return inputs
        turn = rotation(self.config, positions)
        y: Tensor = self.prefix_embeding_layer(inputs, turn, caches[0] if caches else None, mask)
        return y

    def features(self, head: int, joined: Tensor) -> Tensor:
        """Return what enters the output layer of a head: ``[..., (head + 2) * D]`` to ``[..., D]``."""
        y: Tensor = self.hydra_mlp[head](joined)
        return y

    def output(self, head: int) -> nn.Module | None:
        """Return the output layer of a head; None for the model's."""
        return self.hydra_lm_head[head] if self.own_output else None


def _spaced(blocks: Iterator[nn.Module]) -> Iterator[nn.Module]:
    for block in blocks:
        yield nn.Identity()
        yield block


class LatentHead(SlotHead):
    """One attention block over compressed images, then several hidden states at once (arXiv 2505.12728).

    The hidden states of an image are read by C learned queries, ``softmax(A F) F``; its tokens stand spread evenly over
    the positions of the image. A slot of text reads ``fc([embedding; hidden state])``. Output ``i`` of a slot foretells
    the hidden state ``i`` tokens further.

    Args:
        config: sizes of the attention; ``inner`` is the width inside the last block.
        queries: C, tokens that stand for an image.
        steps: k, hidden states per slot.
        bias: whether queries, keys and values of the attention have one.
    """

    def __init__(self, config: HeadConfig, queries: int = 64, steps: int = 5, bias: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.steps = config, steps
        self.A = nn.Parameter(torch.randn(queries, config.width) * config.width**-0.5)
        self.fc = nn.Linear(2 * config.width, config.width)
        self.self_attn = Attention(config, bias)
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.inner), nn.SiLU(), nn.Linear(config.inner, steps * config.width)
        )

    @classmethod
    def fitting(cls, config: HeadConfig, shapes: Shapes) -> LatentHead:
        """Make the module for a file."""
        steps = max(1, shapes.get("mlp.2.weight", (0,))[0] // config.width)
        return cls(config, shapes.get("A", (64,))[0], steps, "self_attn.q_proj.bias" in shapes)

    def fuse(self, embeds: Tensor, features: Tensor, memo: Tensor | None) -> Tensor:
        """Return ``fc([embeds; features])``."""
        fused: Tensor = self.fc(torch.cat([embeds, features.to(embeds.dtype)], dim=-1))
        return fused

    def compress(self, latents: Tensor) -> Tensor:
        """Read the ``[N, D]`` hidden states of an image: ``[C, D]``."""
        scores = (self.A @ latents.T).float().softmax(dim=-1).to(latents.dtype)
        return scores @ latents

    def prompt(self, prefill: Prefill) -> Slots:
        """Compress images and frames, fuse the rest."""
        numbers = torch.arange(len(prefill.ids), device=prefill.embeds.device)
        inputs, stand, places = [prefill.embeds[:0]], [numbers[:0]], [numbers[:0]]
        for run in runs(prefill):
            if run.media < 0:
                inputs.append(self.fuse(prefill.embeds[run.tokens], prefill.hidden[run.slots], None))
                stand.append(numbers[run.slots])
                places.append(numbers[run.slots])
                continue
            inputs.append(self.compress(prefill.hidden[run.tokens]))
            count, tokens = len(self.A), run.end - run.start
            steps = ((torch.arange(count, device=numbers.device) + 1) * tokens).div(count, rounding_mode="floor") - 1
            stand.append(numbers[run.slots][steps.clamp_min(0)])
            places.append(numbers.new_full((count,), -1))
        return Slots(torch.cat(inputs), prefill.positions[..., torch.cat(stand)], torch.cat(places))

    def caches(self) -> list[SlotCache]:
        """Make an empty cache."""
        return [SlotCache()]

    def run(
        self, inputs: Tensor, positions: Tensor, caches: list[SlotCache] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the attention, with the input added to what it gives."""
        turn = rotation(self.config, positions)
        y: Tensor = inputs + self.self_attn(inputs, turn, caches[0] if caches else None, mask)
        return y

    def foretell(self, outputs: Tensor) -> Tensor:
        """Return the hidden states foretold: ``[n, D]`` to ``[n, k, D]``."""
        y: Tensor = self.mlp(self.norm(outputs))
        return rearrange(y, "n (k d) -> n k d", k=self.steps)
