"""InternVL: square tiles, several per image."""

from __future__ import annotations

from mmfast.adapters.base import Adapter, family


@family("internvl")
class InternVL(Adapter):
    """Each tile is one item; the processor does not say which tiles make up an image."""

    def patches_per_side(self, modality: str) -> int | None:
        """Squares of patches are joined."""
        ratio: float = self.model.config.downsample_ratio
        return round(1 / ratio)
