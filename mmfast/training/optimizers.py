"""Muon for matrices, AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_FACTORS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz steps in float32.

    Args:
        matrix: ``[m, n]``.
        steps: of the iteration.

    Returns:
        ``[m, n]`` float32.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalised(torch.randn(4, 6, generator=torch.Generator().manual_seed(0))))
        >>> bool((values > 0.5).all() and (values < 1.5).all())
        True
    """
    a, b, c = _FACTORS
    wide: Tensor = matrix.float()
    turned = wide.shape[0] > wide.shape[1]
    if turned:
        wide = wide.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram: Tensor = wide @ wide.T
        wide = torch.addmm(wide, b * gram + c * gram @ gram, wide, beta=a)
    return wide.T if turned else wide


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest (https://kellerjordan.github.io/posts/muon).

    The update of a matrix is scaled by ``0.2 * sqrt(max(m, n))``, which gives it the size of an AdamW update
    (arXiv 2502.16982). Everything is computed in float32; torch's own Muon iterates in bfloat16.

    Args:
        matrices: parameters of two axes for the orthogonalised update.
        others: parameters for AdamW.
        rate: learning rate of the matrices.
        other_rate: learning rate of the others.
        weight_decay: decoupled, for both.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> optimizer = Muon([layer.weight], [layer.bias], rate=0.1, other_rate=0.01)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        rate: float,
        other_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [
            {"params": list(matrices), "lr": rate, "muon": True},
            {"params": list(others), "lr": other_rate, "muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group["lr"])
        return loss

    @staticmethod
    def _muon(parameter: Tensor, gradient: Tensor, state: dict[str, Any], rate: float) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].mul_(0.95).add_(gradient)
        ahead = gradient.add(state["momentum"], alpha=0.95)
        scale = 0.2 * max(parameter.shape) ** 0.5
        parameter.add_(orthogonalised(ahead).to(parameter.dtype), alpha=-rate * scale)

    @staticmethod
    def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], rate: float) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        count = float(state["step"])
        state["mean"].lerp_(gradient, 1 - 0.9)
        state["square"].mul_(0.98).addcmul_(gradient, gradient, value=1 - 0.98)
        spread = (state["square"] / (1 - 0.98**count)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["mean"], spread, value=-rate / (1 - 0.9**count))
