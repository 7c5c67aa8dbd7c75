"""Attention of one prompt, computed on demand in blocks and never as a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfast.kernels import attention_stats
from mmfast.kernels.attention_stats import Options, reference
from mmfast.kernels.dispatch import chosen

_OVER: tuple[Literal["sum", "max"], ...] = ("sum", "max")
_BLOCK_ELEMENTS = 1 << 22
"""Largest number of float32 logits held at once (16 MiB)."""


@dataclass(frozen=True)
class AttentionView:
    """What the tokens of ONE prompt look at in one layer, read from its queries and keys.

    Nothing is stored but references to the layer's own tensors; probabilities exist a few rows at a
    time, so that memory stays at O(heads x tokens) whatever backend the model attends with. Rows and column sums come
    from the kernels of :mod:`mmfast.kernels.attention_stats` where those run. A row that sees nothing is zero.

    Attributes:
        query: ``[H, n, d]`` queries of the prompt's tokens, as the layer used them.
        key: ``[G, past + n, d]`` keys; G divides H. The last n belong to the prompt's tokens.
        value: ``[G, past + n, d]`` values, or None where they were not asked for.
        scaling: factor of the logits, ``d ** -0.5`` when None.
        softcap: cap of the logits, for models that have one.
        mask: ``[n, past + n]`` or ``[H, n, past + n]`` bool (True = visible) or additive; None = causal.
        silent: ``[n]`` bool, tokens that are looked at but do not look themselves: their rows are zero; None =
            none of them.

    Example:
        >>> view = AttentionView(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
        >>> view.rows(torch.tensor([1]))[0, 0].tolist()
        [0.5, 0.5, 0.0]
        >>> view.column_sums(torch.ones(3)).sum().item()
        3.0
    """

    query: Tensor
    key: Tensor
    value: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    mask: Tensor | None = None
    silent: Tensor | None = None

    @property
    def length(self) -> int:
        """Number n of tokens of the prompt."""
        return int(self.query.shape[1])

    @property
    def heads(self) -> int:
        """Number H of query heads."""
        return int(self.query.shape[0])

    @property
    def past(self) -> int:
        """Number of cached tokens before the prompt."""
        return int(self.key.shape[1]) - self.length

    def logits(self, rows: Tensor, *, masked: bool = True) -> Tensor:
        """Compute rows of scaled logits over the past and the prompt, before the softmax.

        Args:
            rows: ``[R]`` int64 query rows.
            masked: set what a row may not see to minus infinity.

        Returns:
            float32 ``[H, R, past + n]``.
        """
        scaling = self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        logits = reference.logits(self.query[:, rows], self.key, scaling, self.softcap)
        if not masked:
            return logits
        if self.mask is None:
            places = torch.arange(self.key.shape[1], device=logits.device)
            return logits.masked_fill(places > (rows + self.past)[:, None], -torch.inf)
        return reference.masked(logits, self.mask[..., rows, :])

    def rows(self, rows: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Compute rows of attention probabilities over the prompt's own tokens.

        The softmax runs over everything a row sees, cached tokens included; only the columns of the
        prompt are returned. For many rows use :meth:`blocks` or :meth:`column_sums`.

        Args:
            rows: ``[R]`` int64 query rows.
            temperature: divides the logits.

        Returns:
            float32 ``[H, R, n]``.
        """
        if self._fast():
            mask = None if self.mask is None else self.mask[..., rows, :]
            options = self._options(temperature, mask)
            options["places"] = rows + self.past
            query, key = self.query[None, :, rows], self.key[None]
            probabilities = attention_stats.few_rows(query, key, first=self.past, **options)[0]
        else:
            probabilities = reference.softmax(self.logits(rows) / temperature)[..., self.past :]
        if self.silent is None:
            return probabilities
        return probabilities.masked_fill(self.silent[rows][:, None], 0.0)

    def blocks(self, rows: Tensor, *, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through many rows, a bounded number at a time.

        Args:
            rows: ``[R]`` int64 query rows.
            temperature: divides the logits.

        Yields:
            ``[r]`` int64 places inside ``rows``, and their probabilities, float32 ``[H, r, n]``.
        """
        size = max(1, _BLOCK_ELEMENTS // (self.heads * int(self.key.shape[1])))
        for start in range(0, rows.numel(), size):
            part = rows[start : start + size]
            places = torch.arange(start, start + part.numel(), device=rows.device)
            yield places, self.rows(part, temperature=temperature)

    def row_lse(self, *, temperature: float = 1.0) -> Tensor | None:
        """Compute what :meth:`column_sums` needs of all rows, to keep it where columns are summed more than once.

        Args:
            temperature: divides the logits.

        Returns:
            float32 ``[H, n]``, the log-sum-exp of each row; None where plain torch runs, which does not need it.
        """
        if not self._fast():
            return None
        return attention_stats.row_lse(self.query[None], self.key[None], **self._options(temperature, self.mask))[0]

    def column_sums(
        self,
        weights: Tensor,
        *,
        heads: Literal["mean", "max", "each"] = "mean",
        temperature: float = 1.0,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Add up what all rows give to each column: ``c_j = sum_i weights_i P_ij``.

        Args:
            weights: ``[n]`` weight of each query row, or ``[H, n]`` one per head (``heads="each"`` only);
                rows of weight zero are not computed.
            heads: average the heads, take the largest entry over the heads before adding up, or
                return each head.
            temperature: divides the logits.
            lse: from :meth:`row_lse` with the same temperature; None = computed, for rows of any weight.

        Returns:
            float32 ``[n]``, or ``[H, n]`` for ``heads="each"``.
        """
        per_head = weights.ndim == 2
        reduce: Literal["none", "mean", "max"] = "none" if heads == "each" else heads
        if self._fast():
            if self.silent is not None:
                weights = weights.masked_fill(self.silent, 0.0)
            query, key, options = self.query[None], self.key[None], self._options(temperature, self.mask)
            return attention_stats.column_sums(
                query, key, None if lse is None else lse[None], weights[None], heads=reduce, first=self.past, **options
            )[0]
        used = (weights != 0).any(dim=0) if per_head else weights != 0
        rows = used.nonzero().squeeze(-1)
        total = self.query.new_zeros((self.heads, self.length) if heads == "each" else self.length, dtype=torch.float32)
        for places, block in self.blocks(rows, temperature=temperature):
            total += reference.reduced(block, weights[..., rows[places]].float(), reduce, "sum")
        return total

    def column_sums_and_peaks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Average the heads, then add up what some rows give to each column, and take the largest of it.

        Args:
            rows: ``[R]`` int64 query rows.

        Returns:
            The sums and the largest entries, float32 ``[n]`` each.
        """
        if self._fast():
            options = self._options(1.0, None if self.mask is None else self.mask[..., rows, :])
            options["places"] = rows + self.past
            query, key = self.query[None, :, rows], self.key[None]
            weights = torch.ones(rows.numel(), device=query.device)
            weights = weights if self.silent is None else weights.masked_fill(self.silent[rows], 0.0)
            lse = attention_stats.row_lse(query, key, **options)
            total, largest = (
                attention_stats.column_sums(
                    query, key, lse, weights, heads="mean", over=over, first=self.past, **options
                )[0]
                for over in _OVER
            )
            return total, largest
        total = self.query.new_zeros(self.length, dtype=torch.float32)
        largest = torch.zeros_like(total)
        for _, block in self.blocks(rows):
            mean = block.mean(dim=0)
            total += mean.sum(dim=0)
            largest = torch.maximum(largest, mean.amax(dim=0))
        return total, largest

    def mass(self, columns: Tensor) -> Tensor:
        """Add up what each row gives to some columns.

        Args:
            columns: ``[n]`` bool.

        Returns:
            float32 ``[H, n]``.
        """
        if self._fast():
            marked = torch.nn.functional.pad(columns, (self.past, 0))
            options = self._options(1.0, self.mask)
            given = attention_stats.visual_mass(self.query[None], self.key[None], marked, **options)[0]
            return given if self.silent is None else given.masked_fill(self.silent, 0.0)
        rows = torch.arange(self.length, device=columns.device)
        return torch.cat([(block * columns).sum(dim=-1) for _, block in self.blocks(rows)], dim=-1)

    def _fast(self) -> bool:
        """Say whether the kernels run here; a view whose logits are its own has none."""
        if type(self).logits is not AttentionView.logits or not self.length:
            return False
        given = (self.query, self.key, self.mask)
        return chosen("attention_stats", attention_stats.refusal(*given, width=int(self.query.shape[-1]))) == "triton"

    def _options(self, temperature: float, mask: Tensor | None) -> Options:
        """Return what the kernels need to know about the logits."""
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask[None]
        return {
            "scaling": self.scaling,
            "softcap": self.softcap,
            "temperature": temperature,
            "causal": mask is None,
            "mask": mask,
        }
