"""CLIP models: load their parts, and hand methods what they say of questions and patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmfast.adapters.base import Adapter
from mmfast.adapters.media import Segment
from mmfast.plan import Plan
from mmfast.token_pruning.base import BeforeLLM, VisionSignal
from mmfast.token_pruning.frame_base import FrameSelector

PATCHES = VisionSignal("patch_features")
"""What CLIP embeddings of visual tokens are made of."""
_OPEN_CLIP = "open_clip:"
_HOW = "accelerate(model, plan, clip=mmfast.ClipTower.load(...))"


class ClipTower(Protocol):
    """A :class:`mmfast.ClipTower`, seen from here."""

    @property
    def width(self) -> int:
        """Channels of the patch features it projects."""

    @property
    def knows_pixels(self) -> bool:
        """Whether it can undo what the processor of the model did to pixels."""

    def frame_embeds(self, pixels: Tensor) -> Tensor:
        """Embed pictures ``[T, 3, H, W]``, normalised as the model reads them, as ``[T, E]``."""

    def text_embeds(self, input_ids: Tensor) -> Tensor:
        """Embed tokens ``[n]`` as ``[M, E]``."""

    def image_embeds(self, patch_features: Tensor) -> Tensor:
        """Embed patches ``[N, C]`` as ``[N, E]``."""


@dataclass(frozen=True)
class ClipParts:
    """What is needed of a CLIP model.

    Attributes:
        words: turns text into tokens, without those for begin and end.
        encode: turns at most ``segment`` tokens into ``[1, E]``.
        project: turns patches ``[N, C]`` into ``[N, E]``.
        see: turns pictures ``[T, 3, side, side]`` in the range 0..1 into ``[T, E]``.
        side: pixels per side of a picture.
        segment: most tokens that the text encoder takes beside begin and end.
        width: C.
    """

    words: Callable[[str], list[int]]
    encode: Callable[[list[int]], Tensor]
    project: Callable[[Tensor], Tensor]
    see: Callable[[Tensor], Tensor]
    side: int
    segment: int
    width: int


def load_clip(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
) -> ClipParts:
    """Load a CLIP model; arguments and errors as of :meth:`mmfast.ClipTower.load`."""
    place = torch.device("cpu" if device is None else device)
    name = str(source)
    if name.startswith(_OPEN_CLIP):
        return _open_clip(name.removeprefix(_OPEN_CLIP), weights, place)
    if weights is not None:
        raise ValueError(f"weights={str(weights)!r} goes with source='open_clip:NAME' alone, got source={name!r}")
    options: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **options)
    if config.model_type != "clip":
        raise ValueError(f"{name!r} is a {config.model_type!r} model, no CLIP model with text and image encoder")
    model = _weights(name, options).to(place).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)

    def words(text: str) -> list[int]:
        # Longer than one segment is meant to be, so the tokenizer need not warn of it.
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def encode(segment: list[int]) -> Tensor:
        ids = torch.tensor([[tokenizer.bos_token_id, *segment, tokenizer.eos_token_id]], device=place)
        embeds: Tensor = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        return embeds

    def project(patches: Tensor) -> Tensor:
        embeds: Tensor = model.visual_projection(model.vision_model.post_layernorm(patches.to(place)))
        return embeds

    def see(pictures: Tensor) -> Tensor:
        pixels = normalised(pictures.to(place), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        embeds: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return embeds

    vision = config.vision_config
    segment = config.text_config.max_position_embeddings - 2
    return ClipParts(words, encode, project, see, int(vision.image_size), segment, vision.hidden_size)


def _weights(name: str, options: dict[str, Any]) -> Any:
    try:
        return CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **options)
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"{name!r} has no *.safetensors weights, and others are not read; load the model elsewhere and write "
                "it again with save_pretrained()"
            ) from error
        raise


def _open_clip(name: str, weights: str | Path | None, device: torch.device) -> ClipParts:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "open_clip models need the package open_clip_torch: pip install 'mmfast[clip]', or load the model from "
            "transformers files"
        ) from error
    if weights is None or Path(weights).suffix != ".safetensors" or not Path(weights).is_file():
        raise ValueError(f"weights={None if weights is None else str(weights)!r} must be a *.safetensors file")
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip knows no model {name!r}; see open_clip.list_models()")
    model: Any = open_clip.create_model(name, pretrained=str(weights), precision="fp32", device=device).eval()
    tokenizer: Any = open_clip.get_tokenizer(name)
    visual = model.visual
    if not all(hasattr(visual, part) for part in ("ln_post", "proj")) or not hasattr(tokenizer, "sot_token_id"):
        raise ValueError(f"the open_clip model {name!r} has no plain CLIP towers; take one like 'ViT-L-14-336'")

    def words(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text.lower())
        return found

    def encode(segment: list[int]) -> Tensor:
        ids = torch.zeros(1, model.context_length, dtype=torch.int64, device=device)
        whole = [tokenizer.sot_token_id, *segment, tokenizer.eot_token_id]
        ids[0, : len(whole)] = torch.tensor(whole, device=device)
        embeds: Tensor = model.encode_text(ids)
        return embeds

    def project(patches: Tensor) -> Tensor:
        embeds: Tensor = visual.ln_post(patches.to(device)) @ visual.proj
        return embeds

    def see(pictures: Tensor) -> Tensor:
        embeds: Tensor = model.encode_image(normalised(pictures.to(device), visual.image_mean, visual.image_std))
        return embeds

    size = visual.image_size
    side = int(size if isinstance(size, int) else size[0])
    return ClipParts(words, encode, project, see, side, model.context_length - 2, int(visual.proj.shape[0]))


def normalised(pictures: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Bring pictures ``[T, 3, H, W]`` in the range 0..1 to the mean and deviation a model was trained with."""
    shift, scale = (torch.tensor(list(values), device=pictures.device)[:, None, None] for values in (mean, deviation))
    return (pictures - shift) / scale


# ------------------------------------------------------------------------------ at work in a plan


def check_clip(adapter: Adapter, plan: Plan, tower: ClipTower | None) -> None:
    """Refuse plans that need a CLIP model and have none, or one that does not fit.

    Raises:
        ValueError: naming the method and what to do.
    """
    method, selector = _wanting(plan), _choosing(plan)
    for needy in (selector, method):
        if needy is not None and tower is None:
            raise ValueError(f"method {needy.name!r} with relevance='clip' needs a CLIP model: {_HOW}")
    if selector is not None and tower is not None and not tower.knows_pixels:
        raise ValueError(
            f"method {selector.name!r} shows frames to the CLIP model, which has to know how their pixels were "
            "normalised: pass the processor of this model as tokenizer= of ClipTower.load"
        )
    if method is None or tower is None:
        return
    for modality in ("image", "video"):
        if hasattr(adapter.base, f"get_{modality}_features"):
            config = adapter.tower(modality).config
            width = getattr(config, "embed_dim", None) or config.hidden_size
            if width != tower.width:
                raise ValueError(
                    f"method {method.name!r}: the vision encoder of this model is {width} wide, the CLIP model "
                    f"{tower.width}; load the CLIP model that the vision encoder was taken from, or use relevance='llm'"
                )


def clip_signals(plan: Plan) -> list[VisionSignal]:
    """Say what has to be read of the vision encoder for the CLIP model."""
    return [] if _wanting(plan) is None else [PATCHES]


def _wanting(plan: Plan) -> BeforeLLM | None:
    found = (method for method in plan.at("before_llm") if isinstance(method, BeforeLLM) and method.wants_clip)
    return next(found, None)


def _choosing(plan: Plan) -> FrameSelector | None:
    found = (method for method in plan.at("frames") if isinstance(method, FrameSelector) and method.wants_clip)
    return next(found, None)


def clip_reader(
    tower: ClipTower | None, method: BeforeLLM | None, input_ids: Tensor | None, valid: Tensor
) -> ClipReader | None:
    """Return a reader of the prompts of one call if the method before the language model wants one."""
    wants = tower is not None and method is not None and method.wants_clip
    return ClipReader(tower, input_ids, valid) if tower is not None and wants else None


class ClipReader:
    """Ask a CLIP model about the prompts of one call.

    Args:
        tower: the CLIP model.
        input_ids: ``[B, S]`` tokens, or None where the caller gave embeddings.
        valid: ``[B, S]`` bool, False for padding.
    """

    def __init__(self, tower: ClipTower, input_ids: Tensor | None, valid: Tensor) -> None:
        if input_ids is None:
            raise ValueError("a CLIP model has to read the question: pass input_ids, not inputs_embeds alone")
        self.tower = tower
        self.input_ids = input_ids
        self.valid = valid

    def text(self, row: int, parts: Sequence[Segment]) -> dict[str, Tensor]:
        """Embed the question of a row: what follows the last image or video, or all text where nothing does.

        Returns:
            ``{"clip_text_embeds": [M, E]}``, empty where the row has no media.
        """
        if not parts:
            return {}
        text = self.valid[row].to(self.input_ids.device).clone()
        for part in parts:
            text[part.slots.to(text.device)] = False
        last = max(int(part.slots[-1]) for part in parts)
        question = text.clone()
        question[: last + 1] = False
        return {
            "clip_text_embeds": self.tower.text_embeds(self.input_ids[row, question if bool(question.any()) else text])
        }

    def image(self, part: Segment) -> dict[str, Tensor]:
        """Embed the visual tokens of an image or video.

        Returns:
            ``{"clip_image_embeds": [N, E]}``.

        Raises:
            ValueError: if they were not encoded while the plan was active.
        """
        patches = part.signals.get(PATCHES)
        if patches is None:
            raise ValueError(
                f"the features of this {part.layout.modality} were made before this plan was active, so a CLIP model "
                "cannot compare them with the question; encode the media after accelerate()"
            )
        return {"clip_image_embeds": self.tower.image_embeds(patches.detach())}
