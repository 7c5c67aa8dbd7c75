"""Quicksviewer: a video is cut where it changes, and each piece is read into as many tokens.

Paper: "Quicksviewer: An LMM for Efficient Video Understanding via Reinforced Compression of Video Cubes"
(arXiv 2504.15270).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from mmfast.token_pruning.projector_base import Blocks, check_heads, sincos, sincos_grid, small_start

MOMENTUM = 0.2
TEMPERATURE = 0.5
NOISE = 0.1


def momentum_changes(features: Tensor) -> Tensor:
    """Say how each frame differs from the one before, smoothed over time.

    Args:
        features: ``[T, N, D]``, T at least 2.

    Returns:
        ``[T - 1, N, D]``; ``m_1 = F_1 - F_0``, ``m_t = 0.8 (F_t - F_(t-1)) + 0.2 m_(t-1)``.

    Example:
        >>> momentum_changes(torch.tensor([0.0, 1.0, 1.0])[:, None, None]).flatten().tolist()
        [1.0, 0.20000000298023224]
    """
    changes = features.diff(dim=0)
    smooth = [changes[0]]
    for change in changes[1:]:
        smooth.append((1 - MOMENTUM) * change + MOMENTUM * smooth[-1])
    return torch.stack(smooth)


def cut_count(frames: int, frames_per_cube: int = 5) -> int:
    """Return how many cuts a video gets; halves are rounded to the even number.

    Example:
        >>> [cut_count(frames) for frames in (2, 10, 25, 64)]
        [1, 1, 4, 12]
    """
    return min(max(round(frames / frames_per_cube) - 1, 1), frames - 1)


class CubeCutter(nn.Module):
    """Choose the frames at which a new cube begins.

    Args:
        width: of the features, Dv.
        frames_per_cube: frames of a cube on average.

    Example:
        >>> gates = CubeCutter(8)(torch.randn(10, 4, 8))
        >>> gates.shape, int(gates.sum().round())
        (torch.Size([9]), 1)
    """

    def __init__(self, width: int, frames_per_cube: int = 5) -> None:
        super().__init__()
        self.frames_per_cube = frames_per_cube
        self.change = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))

    def forward(self, features: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Decide on frames 1 to T - 1; frame 0 always begins a cube.

        Args:
            features: ``[T, N, Dv]``.
            noise: factor of the Gumbel noise: in training from 0.1 down to 0, in use 0.
            generator: source of the noise.

        Returns:
            float32 ``[T - 1]`` of 0 and 1 (a cut before this frame), through which gradients pass as if they were
            probabilities.

        Raises:
            ValueError: for fewer than 2 frames.
        """
        frames = features.shape[0]
        if frames < 2:
            raise ValueError(f"a video of {frames} frame cannot be cut; give at least 2")
        logits: Tensor = self.mlp(self.norm(self.change(momentum_changes(features)).mean(dim=1))).float()
        if noise > 0:
            # Minus the logarithm of an exponential variate is a Gumbel variate.
            drawn = torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-30)
            logits = logits - noise * drawn.log()
        likely: Tensor = (logits / TEMPERATURE).softmax(dim=-1)[:, 1]
        # Stable, so that of equally likely frames the earlier is cut on every machine.
        order = likely.detach().sort(descending=True, stable=True).indices
        hard = torch.zeros_like(likely)
        hard[order[: cut_count(frames, self.frames_per_cube)]] = 1.0
        gates: Tensor = hard - likely.detach() + likely
        return gates


def cubes_of(gates: Tensor) -> list[slice]:
    """Return the cubes that cuts make of a video, frame 0 first.

    Args:
        gates: ``[T - 1]``, 1 where a cube begins at the next frame.

    Example:
        >>> cubes_of(torch.tensor([0.0, 1.0, 0.0]))
        [slice(0, 2, None), slice(2, 4, None)]
    """
    starts = [0, *((gates.detach().round() > 0).nonzero().flatten() + 1).tolist(), gates.numel() + 1]
    return [slice(begin, end) for begin, end in itertools.pairwise(starts)]


class QuicksviewerCubes(nn.Module):
    """The projector: a thumbnail of the cuts, then each cube through the same learned queries.

    Args:
        width: of the features, Dv.
        out: width of the embeddings, D; a multiple of 8 and of ``heads``.
        queries: tokens per cube.
        heads: attention heads.
        frames_per_cube: frames of a cube on average.

    Example:
        >>> module = QuicksviewerCubes(8, 16, queries=4, heads=2)
        >>> module(torch.randn(10, 36, 8), (6, 6)).shape
        torch.Size([12, 16])
    """

    def __init__(self, width: int, out: int, queries: int = 64, heads: int = 8, frames_per_cube: int = 5) -> None:
        super().__init__()
        check_heads(heads, out)
        if out % 8:
            raise ValueError(f"out={out} must be a multiple of 8: half of it tells the frame, half the place in it")
        self.cutter = CubeCutter(width, frames_per_cube)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, out), std=0.02))
        self.kv_proj = nn.Linear(width, out, bias=False)
        self.attn = nn.MultiheadAttention(out, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(out, eps=1e-6) for _ in range(3))
        self.proj = nn.Linear(out, out)
        self.thumbnail = nn.Linear(width, out)
        small_start(self)

    def forward(
        self, features: Tensor, grid: tuple[int, int], noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Read a video.

        Args:
            features: ``[T, N, Dv]`` in raster order, T at least 2.
            grid: rows and columns of a frame, N in all.
            noise: as in :class:`CubeCutter`.
            generator: source of the noise.

        Returns:
            ``[thumbnail + queries * cubes, D]``; the thumbnail has a token for each block of 3 x 3 and carries the
            gradient to the cutter.
        """
        gates = self.cutter(features, noise, generator)
        rows, cols = torch.meshgrid(*(torch.arange(side, device=features.device) for side in grid), indexing="ij")
        found = [self._thumbnail(features, gates, grid)]
        for cube in cubes_of(gates):
            frames = torch.arange(cube.start, cube.stop, device=features.device)
            value = self.ln_kv(self.kv_proj(features[cube].flatten(0, 1)))[None]
            half = value.shape[-1] // 2
            place = sincos_grid(rows.flatten(), cols.flatten(), half)
            code = torch.cat(
                [sincos(frames, half).repeat_interleave(len(place), dim=0), place.repeat(len(frames), 1)], dim=-1
            )
            read = self.attn(self.ln_q(self.query)[None], value + code, value, need_weights=False)[0][0]
            found.append(self.proj(self.ln_post(read)))
        return torch.cat(found)

    def _thumbnail(self, features: Tensor, gates: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average the frames at which cubes begin, frame 0 apart, and shrink the average."""
        weights = gates.to(features.dtype)[:, None, None]
        mean = (weights * features[1:]).sum(dim=0) / gates.detach().sum().round()
        found: Tensor = self.thumbnail(Blocks(*grid, 3).mean(mean))
        return found


def noise_at(done: float) -> float:
    """Return the factor of the noise, which falls from 0.1 to 0 over the training.

    Example:
        >>> noise_at(0.0), noise_at(0.5), noise_at(1.0)
        (0.1, 0.05, 0.0)
    """
    return NOISE * (1.0 - min(max(done, 0.0), 1.0))
