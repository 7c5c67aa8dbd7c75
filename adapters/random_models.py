"""Models of real shapes with random weights, and prompts for them: what speed is measured on without a download.

Their answers mean nothing; what they cost is what the published models of the same configuration cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT_TOKENS = 64
"""Tokens of a prompt that show nothing."""
BEFORE_MEDIA = 8
"""Of these, the tokens before the image or video; the others follow it."""

SCALES = ("tiny", "small", "real")


@dataclass(frozen=True)
class Widths:
    """Sizes of one language model and its vision encoder.

    Attributes:
        layers: decoder layers.
        hidden: width.
        intermediate: width of the feed-forward part.
        heads: query heads.
        kv_heads: key/value heads.
        vocabulary: tokens, special ones included.
        tower_layers: blocks of the vision encoder.
        tower_hidden: its width.
        tower_intermediate: width of its feed-forward part.
        tower_heads: its heads.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    tower_heads: int


_LLAMA = Widths(32, 4096, 11008, 32, 32, 32064, 24, 1024, 4096, 16)
_QWEN2 = Widths(28, 3584, 18944, 28, 4, 152_064, 26, 1152, 4304, 16)
_QWEN25 = Widths(28, 3584, 18944, 28, 4, 152_064, 32, 1280, 3420, 16)
_TINY = Widths(3, 64, 128, 4, 2, 512, 2, 32, 64, 2)
_SMALL = Widths(6, 512, 1408, 8, 8, 4096, 2, 64, 128, 2)


@dataclass(frozen=True)
class RandomModel:
    """One model of random weights at one scale.

    Attributes:
        name: what it has the shape of.
        scale: ``"real"``, or ``"small"`` or ``"tiny"`` with fewer layers, less width and fewer patches.
        visual: visual tokens of one prompt, separators between rows or after a video included.
        kept: to how few of them benchmarks prune.
        model: the model, in evaluation mode.
        inputs: for a batch, makes what ``generate`` takes; all rows ask about media of one size.
    """

    name: str
    scale: str
    visual: int
    kept: int
    model: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class _Shape:
    """How a family is built.

    Attributes:
        model_class: name of the model's class.
        widths: its real sizes.
        config: for sizes and the number of patches along a side, makes its configuration.
        side: for each scale, patches along the side of an image, tile or frame.
        frames: for each scale, frames of a video; nothing where an image is asked about.
        media: for a configuration, patches along a side and frames, makes the tensors of one prompt's media, and says
            how many visual tokens they become.
        kept: for each scale, to how many tokens benchmarks prune.
    """

    model_class: str
    widths: Widths
    config: Callable[[Widths, int], Any]
    side: Mapping[str, int]
    frames: Mapping[str, int]
    media: Callable[[Any, int, int], tuple[dict[str, Tensor], int]]
    kept: Mapping[str, int]


def random_model(
    name: str,
    scale: str = "real",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
) -> RandomModel:
    """Build a model of random weights where it will run, and a way to ask it.

    It is built without memory first, so that every weight is drawn once, on its device and in its dtype.

    Args:
        name: one of :func:`random_model_budgets`.
        scale: ``"real"``, ``"small"`` or ``"tiny"``.
        device: where.
        dtype: of the weights.
        attention: attention implementation of transformers.

    Raises:
        ValueError: if there is no such model or scale.

    Example:
        >>> found = random_model("LLaVA-1.5-7B", "tiny", dtype=torch.float32)
        >>> found.visual, found.inputs(2)["input_ids"].shape
        (64, torch.Size([2, 128]))
    """
    if name not in _SHAPES:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, _SHAPES))}")
    _check_scale(scale)
    shape = _SHAPES[name]
    widths = {"tiny": _TINY, "small": _SMALL, "real": shape.widths}[scale]
    side, frames = shape.side[scale], shape.frames.get(scale, 0)
    config = shape.config(widths, side)
    media, visual = shape.media(config, side, frames)
    placeholder = config.video_token_id if frames else config.image_token_id
    inputs = _asking(placeholder, visual, media, torch.device(device), dtype)
    model = _built(getattr(transformers, shape.model_class), config, torch.device(device), dtype, attention)
    return RandomModel(name, scale, visual, shape.kept[scale], model, inputs)


def random_model_budgets(scale: str = "real") -> dict[str, int]:
    """Name the models there are, with the visual tokens that benchmarks prune to.

    Args:
        scale: ``"real"``, ``"small"`` or ``"tiny"``.

    Raises:
        ValueError: if there is no such scale.

    Example:
        >>> random_model_budgets()["LLaVA-NeXT-7B"]
        160
    """
    _check_scale(scale)
    return {name: shape.kept[scale] for name, shape in _SHAPES.items()}


def _check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} must be one of {', '.join(map(repr, SCALES))}")


def _built(model_class: Any, config: Any, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    model.to_empty(device=device)
    torch.manual_seed(0)
    # Also what is no weight, such as the frequencies of rotary embeddings, is written here.
    with torch.device(device):
        model.init_weights()
    # Random weights end an answer at a random place; every answer has as many tokens as are asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    built: nn.Module = model.eval()
    return built


def _asking(
    placeholder: int, visual: int, media: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[int], dict[str, Tensor]]:
    def inputs(batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 300, (batch, TEXT_TOKENS + visual), generator=generator)
        ids[:, BEFORE_MEDIA : BEFORE_MEDIA + visual] = placeholder
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "image_grid_thw" in media:
            found["mm_token_type_ids"] = (ids == placeholder).int()
        found |= {name: tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for name, tensor in media.items()}
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in found.items()
        }

    return inputs


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# -------------------------------------------------------------------------------------- configurations


def _text(kind: type[Any], widths: Widths, **more: Any) -> Any:
    return kind(
        vocab_size=widths.vocabulary,
        hidden_size=widths.hidden,
        intermediate_size=widths.intermediate,
        num_hidden_layers=widths.layers,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.kv_heads,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def _tower(widths: Widths, side: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": widths.tower_hidden,
        "intermediate_size": widths.tower_intermediate,
        "num_hidden_layers": widths.tower_layers,
        "num_attention_heads": widths.tower_heads,
        "image_size": 14 * side,
        "patch_size": 14,
        **more,
    }


def _llava_config(widths: Widths, side: int) -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_tower(widths, side)),
        text_config=_text(transformers.LlamaConfig, widths),
        image_token_id=widths.vocabulary - 1,
    )


def _llava_next_config(widths: Widths, side: int) -> Any:
    tile = 14 * side
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_tower(widths, side)),
        text_config=_text(transformers.LlamaConfig, widths),
        image_token_id=widths.vocabulary - 1,
        image_grid_pinpoints=[[tile * rows, tile * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
    )


def _onevision_config(widths: Widths, side: int) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_tower(widths, side, vision_use_head=False)),
        text_config=_text(transformers.Qwen2Config, widths, use_sliding_window=False),
        image_token_id=widths.vocabulary - 1,
        video_token_id=widths.vocabulary - 2,
        image_grid_pinpoints=[[14 * side * rows, 14 * side * cols] for rows in (1, 2) for cols in (1, 2)],
    )


def _qwen_config(widths: Widths, side: int) -> Any:
    half = widths.hidden // widths.heads // 2
    vocabulary = widths.vocabulary
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(
            transformers.Qwen2_5_VLTextConfig,
            widths,
            use_sliding_window=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
        ).to_dict(),
        vision_config={
            "depth": widths.tower_layers,
            "hidden_size": widths.tower_hidden,
            "intermediate_size": widths.tower_intermediate,
            "num_heads": widths.tower_heads,
            "out_hidden_size": widths.hidden,
            "fullatt_block_indexes": [block for block in (7, 15, 23, 31) if block < widths.tower_layers] or [1],
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
    )


# ----------------------------------------------------------------------------------------------- media


def _one_image(config: Any, side: int, frames: int) -> tuple[dict[str, Tensor], int]:
    return {"pixel_values": _noise(1, 3, 14 * side, 14 * side)}, side * side


def _five_tiles(config: Any, side: int, frames: int) -> tuple[dict[str, Tensor], int]:
    """Four tiles that fill the whole image, and the image itself; each row of the four ends in a separator."""
    tile = 14 * side
    tensors = {"pixel_values": _noise(1, 5, 3, tile, tile), "image_sizes": torch.tensor([[2 * tile, 2 * tile]])}
    return tensors, 5 * side * side + 2 * side


def _video(config: Any, side: int, frames: int) -> tuple[dict[str, Tensor], int]:
    """Frames whose features are pooled to half the side, rounded up; one separator ends the video."""
    pixels = _noise(1, frames, 3, 14 * side, 14 * side)
    return {"pixel_values_videos": pixels}, frames * ((side + 1) // 2) ** 2 + 1


def _packed_image(config: Any, side: int, frames: int) -> tuple[dict[str, Tensor], int]:
    """Patches of an image in one row each; four become one token."""
    grid = torch.tensor([[1, side, side]])
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": _noise(side * side, patch), "image_grid_thw": grid}, side * side // 4


_SHAPES: dict[str, _Shape] = {
    "LLaVA-1.5-7B": _Shape(
        "LlavaForConditionalGeneration",
        _LLAMA,
        _llava_config,
        {"tiny": 8, "small": 24, "real": 24},
        {},
        _one_image,
        {"tiny": 16, "small": 64, "real": 64},
    ),
    "LLaVA-NeXT-7B": _Shape(
        "LlavaNextForConditionalGeneration",
        _LLAMA,
        _llava_next_config,
        {"tiny": 4, "small": 12, "real": 24},
        {},
        _five_tiles,
        {"tiny": 16, "small": 40, "real": 160},
    ),
    "LLaVA-OneVision-7B": _Shape(
        "LlavaOnevisionForConditionalGeneration",
        _QWEN2,
        _onevision_config,
        {"tiny": 6, "small": 27, "real": 27},
        {"tiny": 4, "small": 8, "real": 64},
        _video,
        {"tiny": 8, "small": 157, "real": 1254},
    ),
    "Qwen2.5-VL-7B": _Shape(
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN25,
        _qwen_config,
        {"tiny": 8, "small": 48, "real": 72},
        {},
        _packed_image,
        {"tiny": 8, "small": 72, "real": 162},
    ),
}
