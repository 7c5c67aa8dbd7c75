"""What several sub-commands share: the model, the media and the streams."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from rich.console import Console

import mmfast
from mmfast.adapters import load_pretrained, prepare
from mmfast.media import kind_of, load_image, read_video

DEMO_NOTE = "demo model: it knows coloured shapes and short text, nothing else; --model takes any other"
_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Media:
    """What the user gave, read.

    Attributes:
        images: the images, in order.
        clips: the frames of each video, in order.
        rate: how many of these frames show one second.
        notes: what is not as asked or promised, a line each.
    """

    images: list[Image.Image] = field(default_factory=list)
    clips: list[list[Image.Image]] = field(default_factory=list)
    rate: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[Image.Image]:
        """Every image and frame, in order."""
        return [*self.images, *(frame for clip in self.clips for frame in clip)]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and load a model and read media."""
    parser.add_argument("--model", metavar="ID_OR_PATH", help="hub id or folder; without it the embedded demo model")
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="frames taken from a video (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--device", help="where to run, for example cuda; default: cuda if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="floating type (default: as stored)")


def read_media(paths: Sequence[str], frames: int) -> Media:
    """Read images and videos, told apart by their content.

    Raises:
        MediaError: if one cannot be used.
    """
    if frames < 1:
        raise ValueError(f"--frames={frames} must be at least 1")
    images: list[Image.Image] = []
    clips: list[list[Image.Image]] = []
    warnings: list[str] = []
    rate = 1.0
    for path in paths:
        if kind_of(path) == "image":
            images.append(load_image(path))
            continue
        video = read_video(path, num_frames=frames)
        clips.append([Image.fromarray(frame) for frame in video.frames])
        warnings.extend(video.warnings)
        if video.duration > 0:
            rate = len(video.frames) / video.duration
    if len(clips) > 1:
        raise ValueError(f"{len(clips)} videos were given; one prompt takes one video (and any number of images)")
    return Media(images, clips, rate, warnings)


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the chosen model, or the embedded one."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.model is None:
        dtype = "float32" if options.dtype == "auto" else options.dtype
        return mmfast.load_default(device=device, dtype=dtype)
    return load_pretrained(options.model, device=device, dtype=options.dtype)


def build_inputs(processor: Any, model: Any, question: str, media: Media) -> Any:
    """Turn question and media into what ``generate`` takes."""
    return prepare(
        processor,
        question,
        media.images or None,
        media.clips[0] if media.clips else None,
        fps=media.rate,
        device=model.device,
        dtype=model.dtype,
    )


def answer_text(processor: Any, tokens: torch.Tensor) -> str:
    """Decode the new tokens of one prompt."""
    text: str = processor.decode(tokens, skip_special_tokens=True)
    return text.strip()


def notes(options: argparse.Namespace, media: Media) -> None:
    """Write to stderr what the user should know before reading an answer."""
    if options.model is None:
        sys.stderr.write(f"{DEMO_NOTE}\n")
    for line in media.notes:
        sys.stderr.write(f"note: {line}\n")


def out() -> Console:
    """Return a console on stdout."""
    return Console(file=sys.stdout, soft_wrap=False)


def write_json(value: Any) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something takes a while; silent where nobody watches."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def quiet_libraries() -> None:
    """Keep library chatter below warnings off the streams of the command line."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
