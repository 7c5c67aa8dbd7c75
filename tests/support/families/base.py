"""What the tiny families have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from support.prompts import BOS, EOS, IMAGE, PAD, VIDEO, VOCABULARY, Media, Piece, left_padded, noise, tokens

LAYERS, HIDDEN, HEADS, KV_HEADS = 5, 64, 4, 2
SPREAD = 0.15
"""Standard deviation of the weights; with the usual 0.02 logits are flat and errors invisible."""


def text_config(**changes: Any) -> dict[str, Any]:
    """The sizes of the decoder, with grouped-query attention."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **changes,
    }


def vision_config(kind: str, image_size: int, patch_size: int, layers: int = 3, **changes: Any) -> dict[str, Any]:
    """The sizes of a CLIP or SigLIP tower."""
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        **changes,
    }


class Family:
    """One family: a tiny random model, and inputs as its processor would make them.

    Attributes:
        name: the ``model_type``.
        model_class: name of the class in transformers.
        sizes: how many different image sizes there are to ask for.
        has_video: whether it reads videos.
        renumbers: positions are one-dimensional, so a shortened prompt is renumbered unless told otherwise.
        window: length of the sliding window of some layers, if any.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    sizes: ClassVar[int] = 1
    has_video: ClassVar[bool] = False
    renumbers: ClassVar[bool] = True
    window: ClassVar[int | None] = None

    def config(self) -> Any:
        """Return the configuration of the tiny model."""
        raise NotImplementedError

    def image(self, size: int = 0, seed: int = 0) -> Media:
        """Return an image of one of the sizes."""
        raise NotImplementedError

    def video(self, seed: int = 0, frames: int | None = None) -> Media:
        """Return a video; of how many frames (or temporal patches) can be said."""
        raise NotImplementedError

    def join(self, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        """Join what the media of all rows bring; most families simply line it up."""
        found: dict[str, list[Tensor]] = {}
        for media in (media for row in rows for media in row):
            for name, value in media.tensors.items():
                found.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in found.items()}

    def token_inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return further inputs that run beside ``input_ids``."""
        return {}

    def settle(self, row: Sequence[Piece]) -> list[Piece]:
        """Adapt media to the prompt they stand in."""
        return list(row)

    def first_prompt(self) -> Batch:
        """Return what the model is run on once before any test."""
        return self.batch([2, self.image(), 2])

    # ------------------------------------------------------------------ ready-made

    def batch(self, *rows: Sequence[Piece]) -> Batch:
        """Build a batch, padded on the left."""
        return Batch(self, tuple(tuple(self.settle(row)) for row in rows), tuple(range(len(rows))))

    @cache  # noqa: B019 - the families are module constants, and so are their models
    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """Return the one tiny model with this attention and dtype; the weights never differ."""
        known = attention in ("sdpa", "eager")
        build = getattr(transformers, self.model_class)._from_config
        model = build(self.config(), attn_implementation=attention if known else "sdpa")
        if not known:
            # A name of our own, for the decoder alone.
            model.get_decoder().config._attn_implementation_internal = attention
        randomise(model)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        model = model.to(dtype).eval()
        with torch.no_grad():
            # transformers puts hooks of its own on the vision tower when it first runs.
            model(**cast(self.first_prompt().inputs, dtype))
        return model

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Batch:
    """Some prompts, and the inputs made of them.

    Attributes:
        family: whose inputs they are.
        rows: the prompts.
        seeds: what the text of each row is drawn from.
    """

    family: Family
    rows: tuple[tuple[Piece, ...], ...]
    seeds: tuple[int, ...]

    @cached_property
    def ids(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        return [tokens(row, seed) for row, seed in zip(self.rows, self.seeds, strict=True)]

    @cached_property
    def media(self) -> list[list[Media]]:
        """The images and videos of each row."""
        return [[piece for piece in row if isinstance(piece, Media)] for row in self.rows]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the processor would return; new tensors each time."""
        return {
            "input_ids": left_padded(self.ids),
            "attention_mask": left_padded([[1] * len(row) for row in self.ids]),
            **self.family.token_inputs(self.ids),
            **self.family.join(self.media),
        }

    def alone(self, row: int) -> Batch:
        """Return one of the rows as a batch of its own, which needs no padding."""
        return Batch(self.family, (self.rows[row],), (self.seeds[row],))

    def __len__(self) -> int:
        return len(self.rows)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Give pixels the dtype of the model, as users do."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def randomise(model: nn.Module) -> None:
    """Draw every weight anew, so that no default of the initialisation matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator) * SPREAD
            # The gains of norms start at one, or at zero where the norm adds the one itself.
            weight.copy_(1.0 + drawn if bool((weight == 1).all()) else drawn)


def placeholders(modality: str, count: int) -> tuple[int, ...]:
    """Return a run of placeholders."""
    return (IMAGE if modality == "image" else VIDEO,) * count


def pixels(*shape: int, seed: int) -> Tensor:
    """Draw pixels."""
    return noise(*shape, seed=seed)
