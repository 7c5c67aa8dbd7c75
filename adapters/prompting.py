"""From a question with pictures or a clip to what ``generate`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmfast.adapters.compression import CompressionTokens, compression_tokens

_IMAGE, _VIDEO = {"type": "image"}, {"type": "video"}


@dataclass(frozen=True)
class _Prompt:
    """One question, its content entries in order, and what fills their slots."""

    content: list[dict[str, str]]
    images: list[Image.Image]
    videos: list[NDArray[np.uint8]]
    fps: float


def prepare(
    processor: Any,
    question: str | Sequence[str],
    images: Any = None,
    video_frames: Any = None,
    *,
    fps: float | Sequence[float] = 1.0,
    frames_as_images: bool | None = None,
    num_compressed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Build the inputs of ``model.generate`` through the chat template of the processor.

    Args:
        processor: what ``load_pretrained`` or ``AutoProcessor`` returned.
        question: one question, or several for a padded batch.
        images: for one question an image or a sequence of images; for several, one such entry (or None) each.
            Images are PIL or uint8 ``[H, W, 3]``.
        video_frames: for one question the frames of one clip, a sequence of images or uint8 ``[T, H, W, 3]``;
            for several, one such entry (or None) each. All frames of a clip have the same size.
        fps: how many of these frames show one second, one number or one for each question; models that know of
            time are told.
        frames_as_images: give frames as images, each after the text ``frame 3:``, instead of as a video.
            None does so where the processor has no slot for video, and where each frame gets compression tokens.
        num_compressed: how many compression tokens stand behind each image or video, for processors that have them
            (see :func:`mmfast.adapters.add_compression_tokens`); 0 writes none, None as many as the processor says.
        device: where to put the tensors; None leaves them on the CPU.
        dtype: floating type of the pixels; None keeps float32.

    Returns:
        The ``BatchFeature`` of the processor, for ``model.generate(**inputs)``.

    Raises:
        ValueError: if there is no question, the numbers of questions and images differ, a question contains a
            placeholder of the processor, a rate is not positive, a picture is malformed, a video cannot be given as
            one, or compression tokens are asked for that the processor does not have.
        TypeError: for images of another type.

    Example:
        >>> from PIL import Image
        >>> import mmfast
        >>> _, processor = mmfast.load_default()
        >>> inputs = prepare(processor, "what color is the star?", Image.new("RGB", (64, 48)))
        >>> tuple(inputs["pixel_values"].shape), int((inputs["input_ids"] == processor.image_token_id).sum())
        ((1, 3, 224, 224), 256)
    """
    questions, batches, clips = _batch(question, images, video_frames)
    has_video_slot = getattr(processor, "video_processor", None) is not None
    compression = _compression(processor, num_compressed)
    if frames_as_images is None:
        frames_as_images = not has_video_slot or compression is not None
    elif not frames_as_images and not has_video_slot:
        raise ValueError(
            f"frames_as_images=False needs a processor with a slot for video, which {type(processor).__name__} lacks."
        )
    prompts = [
        _prompt(processor, text, shown, frames, rate, frames_as_images)
        for text, shown, frames, rate in zip(questions, batches, clips, _rates(fps, len(questions)), strict=True)
    ]
    texts = [_render(processor, prompt.content) for prompt in prompts]
    if compression is not None:
        counts = [len(prompt.images) + len(prompt.videos) for prompt in prompts]
        texts = [_marked(processor, text, compression, count) for text, count in zip(texts, counts, strict=True)]
    inputs = processor(text=texts, **_media(prompts), **_text_options(processor, texts))
    place = "cpu" if device is None else device
    return inputs.to(place) if dtype is None else inputs.to(place, dtype=dtype)


def _batch(question: str | Sequence[str], images: Any, clips: Any) -> tuple[list[str], list[Any], list[Any]]:
    """Bring one question into the form of several."""
    if isinstance(question, str):
        return [question], [images], [clips]
    questions = list(question)
    if not questions:
        raise ValueError("question must hold at least one question, got none.")
    columns = []
    for name, column in (("images", images), ("video_frames", clips)):
        if column is None:
            columns.append([None] * len(questions))
        elif isinstance(column, Image.Image) or len(column) != len(questions):
            got = "one image" if isinstance(column, Image.Image) else f"{len(column)} entries"
            raise ValueError(f"{name} must hold one entry for each of the {len(questions)} questions, got {got}.")
        else:
            columns.append(list(column))
    return questions, columns[0], columns[1]


def _rates(fps: float | Sequence[float], count: int) -> list[float]:
    """Return the rate of each question's clip."""
    rates = list(fps) if isinstance(fps, Sequence) else [fps] * count
    if len(rates) != count:
        raise ValueError(f"fps must be one number or one for each of the {count} questions, got {len(rates)}.")
    if wrong := [rate for rate in rates if not rate > 0]:
        raise ValueError(f"fps must be positive, got {wrong[0]}.")
    return rates


def _prompt(processor: Any, question: str, images: Any, frames: Any, fps: float, frames_as_images: bool) -> _Prompt:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text that is not empty, got {question!r}.")
    known = compression_tokens(processor)
    marks = () if known is None else known.names()
    for token in (getattr(processor, "image_token", None), getattr(processor, "video_token", None), *marks):
        if isinstance(token, str) and token in question:
            raise ValueError(f"question must not contain the placeholder {token!r}, got {question!r}.")
    content: list[dict[str, str]] = []
    pictures: list[Image.Image] = []
    videos: list[NDArray[np.uint8]] = []
    if images is not None:
        pictures += [_picture(image) for image in _listed(images)]
        content += [_IMAGE] * len(pictures)
    if frames is not None:
        shots = [_picture(frame) for frame in _listed(frames)]
        if not shots:
            raise ValueError("video_frames must hold at least one frame, got none.")
        if frames_as_images:
            for number, shot in enumerate(shots, start=1):
                # A number on a single frame would tell nothing.
                tag = [{"type": "text", "text": f"frame {number}:"}] if len(shots) > 1 else []
                content += [*tag, _IMAGE]
                pictures.append(shot)
        else:
            sizes = {shot.size for shot in shots}
            if len(sizes) > 1:
                raise ValueError(f"video_frames must all have one size, got (width, height) {sorted(sizes)}.")
            videos.append(np.stack([np.asarray(shot) for shot in shots]))
            content.append(_VIDEO)
    content.append({"type": "text", "text": question})
    return _Prompt(content, pictures, videos, fps)


def _listed(pictures: Any) -> list[Any]:
    """One image, a sequence of images, or an array of frames, as a list."""
    single = isinstance(pictures, Image.Image) or (isinstance(pictures, np.ndarray) and pictures.ndim == 3)
    return [pictures] if single else list(pictures)


def _picture(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"an image array must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}.")
        # An array whose first axis is 3 could be read as channels first; a PIL image cannot be misread.
        return Image.fromarray(picture)
    raise TypeError(f"images must be PIL images or uint8 arrays, got {type(picture).__name__}.")


def _render(processor: Any, content: list[dict[str, str]]) -> str:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template is not None:
        messages = [{"role": "user", "content": content}]
        text: str = processor.apply_chat_template(
            messages,
            chat_template=template if isinstance(template, str) else None,
            add_generation_prompt=True,
            tokenize=False,
        )
        return text
    # Base models have no template: placeholders first, as in the examples of their model cards.
    tokens = {"image": getattr(processor, "image_token", ""), "video": getattr(processor, "video_token", "")}
    return "".join(part["text"] if part["type"] == "text" else f"{tokens[part['type']]}\n" for part in content)


def _compression(processor: Any, count: int | None) -> CompressionTokens | None:
    """Say which compression tokens are written, if any."""
    known = compression_tokens(processor)
    if count is not None and (isinstance(count, bool) or count < 0 or (count and known is None)):
        raise ValueError(
            f"num_compressed={count!r} must be an int of at least 0, and more only for processors with compression "
            "tokens: mmfast.adapters.add_compression_tokens adds them"
        )
    if known is None or count == 0:
        return None
    return known if count is None else known.of(count)


def _marked(processor: Any, text: str, compression: CompressionTokens, media: int) -> str:
    """Write the compression tokens behind each image and video of a prompt."""
    # Where the processor wraps images by itself, its template writes what opens the wrapping.
    opening = getattr(processor, "boi_token", None)
    places = [opening] if opening and opening in text else []
    places = places or [getattr(processor, "image_token", None), getattr(processor, "video_token", None)]
    found = [token for token in dict.fromkeys(places) if token and token in text]
    if sum(text.count(token) for token in found) != media:
        raise ValueError(
            f"compression tokens cannot be written behind the {media} images and videos of a prompt, because the "
            f"template of {type(processor).__name__} does not write one placeholder for each; write the prompt by hand"
        )
    for token in found:
        text = text.replace(token, token + compression.written())
    return text


def _media(prompts: Sequence[_Prompt]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any(prompt.images for prompt in prompts):
        images = [prompt.images for prompt in prompts]
        # Processors that cut images into tiles need to know which prompt an image belongs to. A prompt
        # without images stands in no processor's list, and the flat list serves those that mix.
        found["images"] = images if all(images) else [image for entry in images for image in entry]
    clips = [(video, prompt.fps) for prompt in prompts for video in prompt.videos]
    if clips:
        found["videos"] = [video for video, _ in clips]
        # The frames were chosen by the caller; some processors would sample among them again.
        found["do_sample_frames"] = False
        found["video_metadata"] = [
            {
                "total_num_frames": len(video),
                "fps": rate,
                "duration": len(video) / rate,
                "frames_indices": list(range(len(video))),
            }
            for video, rate in clips
        ]
    return found


def _text_options(processor: Any, texts: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1}
    bos = processor.tokenizer.bos_token
    if bos is not None and texts[0].startswith(bos):
        # The template wrote it; the tokenizer would write it again.
        options["add_special_tokens"] = False
    return options
