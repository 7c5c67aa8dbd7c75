"""Dynamic-LLaVA: learned predictors say which visual tokens, and which generated ones, are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from mmfast.budget import truncated_count
from mmfast.registry import register
from mmfast.token_pruning.layers import DropOnce, LayerEvent, LayerScorer, LayerTokens
from mmfast.token_pruning.weights import Lesson, check_path, prepared, taught

RATE_WEIGHT = 100.0
"""Factor of :func:`rate_loss` beside the loss of the answer, for visual tokens and for text each."""

TEXT_KEEP = 0.5
"""Share of the tokens of an answer that :func:`rate_loss` asks for."""

SHORTEST_ANSWER = 50
"""Answers of fewer tokens keep all of them in training, and add nothing to the loss."""


@register(
    "dynamic_llava",
    stage="in_llm",
    paper="arXiv 2412.00876",
    source="Osilly/dynamic_llava",
    vectors=True,
    training_free=False,
)
@dataclass(frozen=True)
class DynamicLlava(DropOnce, LayerScorer):
    """Drop once, by a small network that reads the hidden states of each image's tokens.

    The number left is cut off instead of rounded. Generated tokens are decided on by a second network
    (:meth:`decode_keep`). Without ``weights`` both are random (mechanics only).

    In training nothing is dropped: decisions are drawn (:func:`gumbel_keep`), and tokens decided against are hidden
    from all others (:func:`policy_softmax`), those of answers of at least :data:`SHORTEST_ANSWER` tokens too.

    Weights: ``vision.*`` and ``text.*`` are the state dicts of :class:`VisionPredictor` and
    :class:`TextPredictor`, whose names are those of the official predictors.

    Paper: "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context
    Sparsification", ICLR 2025.

    Attributes:
        keep: visual tokens left after the drop; int = count per image, float = fraction.
        layer: first layer that reads the shortened prompt, as index (int) or relative depth (float).
        predictor_width: inner width of the predictors, a multiple of 4 and of ``predictor_heads``.
        predictor_heads: attention heads of the vision predictor.
        weights: path of a safetensors file with the trained predictors; empty = untrained.
    """

    reads_question = False

    keep: int | float | None = 0.2
    predictor_width: int = 512
    predictor_heads: int = 8
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("predictor_width", "predictor_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an int of at least 1")
        if self.predictor_width % 4 or self.predictor_width % self.predictor_heads:
            raise ValueError(
                f"predictor_width={self.predictor_width} must be a multiple of 4 and of "
                f"predictor_heads={self.predictor_heads}"
            )
        check_path(self.weights)

    def counts(self, total: int, depth: int, images: int = 1) -> list[int]:
        """Cut off instead of rounding."""
        keep = 1.0 if self.keep is None else self.keep
        return [truncated_count(keep * images if isinstance(keep, int) else keep, total)]

    def score(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Return the logarithm of the probability of being kept, from one call per image or video."""
        states = tokens.hidden[tokens.candidates]
        return keep_score(self._logits(states, tokens))

    def _logits(self, states: Tensor, tokens: LayerTokens) -> Tensor:
        predictor = self.predictors(states).vision
        logits = torch.zeros(states.shape[0], 2, device=states.device)
        for index in range(len(tokens.media_totals)):
            mine = tokens.media == index
            if bool(mine.any()):
                logits[mine] = predictor(states[mine][None])[0]
        return logits

    def training_mask(self, tokens: LayerTokens, event: LayerEvent) -> Tensor:
        """Decide on visual tokens, and on those of long answers; all others stay."""
        lesson = tokens.lesson or Lesson()
        heat = temperature(lesson.done, 1)
        policy = torch.ones(tokens.hidden.shape[0], device=tokens.hidden.device)
        logits = self._logits(tokens.hidden[tokens.candidates], tokens)
        if lesson.noise:
            seen = gumbel_keep(logits, heat)
        else:
            with torch.no_grad():
                kept = self(tokens, event)
            chosen = torch.arange(len(logits), device=logits.device) if kept is None else kept.indices
            seen = straight_through(logits, chosen, heat)
        policy = policy.index_copy(0, tokens.candidates, seen)
        total = tokens.total
        share = self.keep * len(tokens.media_totals) / total if isinstance(self.keep, int) else self.keep
        lesson.note("visual", (seen, 1.0 if share is None else min(1.0, share)))
        if tokens.answers is None or int(tokens.answers.sum()) < SHORTEST_ANSWER:
            return policy
        written = tokens.answers.nonzero().squeeze(-1)
        logits = self.predictors(tokens.hidden).text(tokens.hidden[written])
        likely = (logits[:, 0] > logits[:, 1]).nonzero().squeeze(-1)
        remembered = gumbel_keep(logits, heat) if lesson.noise else straight_through(logits, likely, heat)
        lesson.note("written", (remembered, TEXT_KEEP))
        return policy.index_copy(0, written, remembered)

    def training_loss(self, lesson: Lesson) -> Mapping[str, Tensor]:
        """Ask for the wanted shares of visual tokens, and of those of long answers."""
        losses = {}
        for name in ("visual", "written"):
            found = lesson.noted(name)
            decisions, wanted = [seen for seen, _ in found], [share for _, share in found]
            losses[f"{name}_rate"] = RATE_WEIGHT * rate_loss(decisions, wanted)
            if decisions:
                kept = torch.stack([seen.detach().mean() for seen in decisions])
                lesson.figures[f"{name}_kept"] = float(kept.mean())
        return losses

    def learned(self, width: int, depth: int, device: torch.device) -> DynamicPredictors:
        """Return both predictors."""
        return taught(self, DynamicPredictors, (width, self.predictor_width, self.predictor_heads), device)

    def decode_keep(self, hidden: Tensor) -> Tensor:
        """Say which new tokens stay in the caches from :attr:`layer` on; each still sees itself.

        Args:
            hidden: ``[B, D]`` states of the new tokens at the input of that layer.

        Returns:
            bool ``[B]``.
        """
        logits: Tensor = self.predictors(hidden).text(hidden)
        return logits[:, 0] > logits[:, 1]

    def predictors(self, states: Tensor) -> DynamicPredictors:
        """Return both predictors for a model of the width of ``states``, on their device."""
        sizes = (states.shape[-1], self.predictor_width, self.predictor_heads)
        return prepared(self, DynamicPredictors, sizes, states.device)


class DynamicPredictors(nn.Module):
    """The two predictors, small at the start: weights N(0, 0.02), biases 0, so that both choices are near one half.

    Args:
        width: hidden size D of the language model.
        inner: width d of the predictors.
        heads: attention heads.

    Example:
        >>> both = DynamicPredictors(8, 16, 2)
        >>> both.vision(torch.randn(1, 5, 8)).shape, both.text(torch.randn(1, 8)).shape
        (torch.Size([1, 5, 2]), torch.Size([1, 2]))
    """

    def __init__(self, width: int, inner: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.vision = VisionPredictor(width, inner, heads)
        self.text = TextPredictor(width, inner)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class VisionPredictor(nn.Module):
    """Decide on the tokens of an image together: two transformer blocks, then local and global features.

    Args:
        width: hidden size D.
        inner: width d.
        heads: attention heads.

    Example:
        >>> VisionPredictor(8, 16, 2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 2])
    """

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU())
        self.transformer = nn.Sequential(*(_Block(inner, heads) for _ in range(2)))
        self.output_mlp = _head(inner)

    def forward(self, states: Tensor, policy: Tensor | None = None) -> Tensor:
        """Return logits of "keep" and "drop".

        Args:
            states: ``[B, N, D]`` hidden states of the visual tokens.
            policy: ``[B, N, 1]`` weight of each token in what the others learn of it; None = 1.

        Returns:
            float32 ``[B, N, 2]``.
        """
        inner = self.down_mlp(states.to(next(self.parameters()).dtype))
        policy = torch.ones_like(inner[..., :1]) if policy is None else policy.to(inner.dtype)
        inner = self.transformer(inner * policy)
        local, whole = inner.chunk(2, dim=-1)
        whole = (whole * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True).clamp_min(1e-12)
        logits: Tensor = self.output_mlp(torch.cat([local, whole.expand_as(local)], dim=-1))
        return logits.float()


class TextPredictor(nn.Module):
    """Decide on each text token by itself.

    Args:
        width: hidden size D.
        inner: width d.

    Example:
        >>> TextPredictor(8, 16)(torch.randn(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), *_head(inner))

    def forward(self, states: Tensor) -> Tensor:
        """Return float32 logits ``[..., 2]`` of "keep" and "drop" for hidden states ``[..., D]``."""
        logits: Tensor = self.output_mlp(states.to(next(self.parameters()).dtype))
        return logits.float()


def _head(inner: int) -> nn.Sequential:
    widths = (inner // 2, inner // 4)
    return nn.Sequential(nn.Linear(inner, widths[0]), nn.GELU(), nn.Linear(*widths), nn.GELU(), nn.Linear(widths[1], 2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _FeedForward(width)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attn(self.norm1(states))
        done: Tensor = states + self.mlp(self.norm2(states))
        return done


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(states), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return joined


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        done: Tensor = self.fc2(functional.gelu(self.fc1(states)))
        return done


def keep_score(logits: Tensor) -> Tensor:
    """Return the logarithm of the probability of "keep", float32 ``[...]`` from logits ``[..., 2]``.

    Example:
        >>> [round(value, 4) for value in keep_score(torch.zeros(1, 2)).tolist()]
        [-0.6931]
    """
    return logits.float().log_softmax(dim=-1)[..., 0]


def temperature(step: float, steps: int) -> float:
    """Return the temperature of :func:`gumbel_keep`, which falls from 1 to 0.1 over the training.

    Example:
        >>> temperature(0, 10), round(temperature(5, 10), 4), temperature(10, 10)
        (1.0, 0.3162, 0.1)
    """
    return float(0.1 ** (step / max(steps, 1)))


def gumbel_keep(logits: Tensor, heat: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw hard decisions through which gradients pass as if they were soft; in float32, as noise needs it.

    Args:
        logits: ``[..., 2]`` of "keep" and "drop".
        heat: temperature, above 0.
        generator: source of the noise, on the device of ``logits``.

    Returns:
        float32 ``[...]`` of 0 and 1; the gradient is that of the tempered softmax.

    Example:
        >>> gumbel_keep(torch.tensor([[40.0, 0.0], [0.0, 40.0]])).tolist()
        [1.0, 0.0]
    """
    likely = logits.float().log_softmax(dim=-1)
    # Minus the logarithm of an exponential variate is a Gumbel variate.
    noise = -torch.empty_like(likely).exponential_(generator=generator).clamp_min(1e-30).log()
    soft = ((likely + noise) / heat).softmax(dim=-1)[..., 0]
    hard = (soft >= 0.5).float()
    return hard + (soft - soft.detach())


def straight_through(logits: Tensor, chosen: Tensor, heat: float = 1.0) -> Tensor:
    """Take decisions as they are, with the gradients of the tempered softmax.

    Args:
        logits: ``[N, 2]`` of "keep" and "drop".
        chosen: ``[K]`` int64, who is kept.
        heat: temperature, above 0.

    Returns:
        float32 ``[N]`` of 0 and 1.

    Example:
        >>> straight_through(torch.zeros(3, 2), torch.tensor([1])).tolist()
        [0.0, 1.0, 0.0]
    """
    soft = (logits.float() / heat).softmax(dim=-1)[..., 0]
    hard = torch.zeros_like(soft).index_fill(0, chosen, 1.0)
    return hard + (soft - soft.detach())


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Attend as if dropped tokens were gone, but differentiably in who is dropped; in float32.

    Args:
        logits: ``[..., H, n, n]`` masked with minus infinity.
        policy: ``[..., n, 1]`` of 0 (dropped) and 1; each token still sees itself.
        eps: keeps rows of which nothing is left finite.

    Returns:
        float32 ``[..., H, n, n]``.

    Example:
        >>> policy_softmax(torch.zeros(1, 2, 2), torch.tensor([[0.0], [1.0]])).round(decimals=3).tolist()
        [[[0.5, 0.5], [0.0, 1.0]]]
    """
    logits, total = logits.float(), logits.shape[-1]
    column = policy.float().transpose(-1, -2)[..., None, :, :]
    own = torch.eye(total, device=logits.device)
    present = column * (1 - own) + own
    top = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (logits - top.detach()).exp() * present
    return (weights + eps / total) / (weights.sum(dim=-1, keepdim=True) + eps)


def rate_loss(decisions: list[Tensor], keep: float | list[float]) -> Tensor:
    """Punish keeping another share than wanted, sample by sample; to be weighed by :data:`RATE_WEIGHT`.

    Args:
        decisions: per sample, ``[N]`` decisions of :func:`gumbel_keep`; samples without any are left out.
        keep: wanted share, one for all samples or one each.

    Returns:
        A scalar: the mean over the samples of the squared difference.

    Example:
        >>> rate_loss([torch.ones(4), torch.zeros(4)], 0.5).item()
        0.25
    """
    wanted = keep if isinstance(keep, list) else [keep] * len(decisions)
    gaps = [own.float().mean() - share for own, share in zip(decisions, wanted, strict=True) if own.numel()]
    return torch.stack(gaps).square().mean() if gaps else torch.zeros(())
