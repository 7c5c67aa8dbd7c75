"""What several sub-commands share: the model, the media and the streams."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and transformers take seconds to import and may be broken, which doctor must survive:
# in this room they are imported where they are used.
if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.console import Console

DEMO = "the embedded demo model, which knows coloured shapes and short text, nothing else"
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_PIPE_WIDTH = 160
# A step may take minutes; rich would judge the speed by the last half minute alone.
_SPEED_SECONDS = 3600.0
# Models make larger frames of a video smaller anyway; without it many frames of a large one would not fit.
_LONGER_SIDE = 1280


@dataclass(frozen=True)
class Media:
    """What the user gave, read.

    Attributes:
        names: file names, in the order given.
        images: the images, in order.
        frames: frames of the one video, if there is one.
        times: when each of these frames is shown, in seconds.
        rate: how many of these frames show one second.
        warnings: what is not as asked or promised, a line each.
    """

    names: tuple[str, ...]
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    times: tuple[float, ...] = ()
    rate: float = 1.0
    warnings: tuple[str, ...] = ()


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is asked of which model."""
    parser.add_argument("media", nargs="+", metavar="MEDIA", help="images, and at most one video")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    add_model_arguments(parser)
    parser.add_argument("--frames", type=int, default=4, metavar="N", help="frames taken from a video (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which model, where and in which floating type."""
    told = "hub id, folder or embedded-voco; without it the embedded demo model"
    parser.add_argument("--model", metavar="ID_OR_PATH", help=told)
    parser.add_argument("--device", help="where to run, for example cuda:1; default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=_DTYPES, help="floating type; default: as stored, but no float16 on a CPU")


def check_numbers(options: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1 before anything is loaded.

    Raises:
        ValueError: naming the option and its value.
    """
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")


def check_page(option: str, path: Path | None) -> None:
    """Refuse a page that cannot be written before minutes are spent on measuring.

    Raises:
        ValueError: naming the option and its value.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--{option}={path} must end in .html: a page is what is written")
    if path.is_dir() or not path.resolve().parent.is_dir():
        what = "a folder" if path.is_dir() else "its folder does not exist"
        raise ValueError(f"--{option}={path}: {what}; name a file")


def read_media(paths: Sequence[str], frames: int) -> Media:
    """Read images and videos, told apart by their content.

    Raises:
        MediaError: if one cannot be used.
        ValueError: if there are several videos.
    """
    from mmfast.media import kind_of, load_image, read_video

    names = tuple(Path(path).name or path for path in paths)
    kinds = [kind_of(path) for path in paths]
    if kinds.count("video") > 1:
        raise ValueError(f"{kinds.count('video')} videos were given; a prompt takes one, and any number of images")
    images = tuple(load_image(path) for path, kind in zip(paths, kinds, strict=True) if kind == "image")
    if "video" not in kinds:
        return Media(names, images)
    video = read_video(paths[kinds.index("video")], num_frames=frames, size=_LONGER_SIDE)
    return Media(names, images, tuple(video.images()), video.timestamps, video.rate, video.warnings)


def device_of(name: str | None) -> torch.device:
    """Find out where to run.

    Raises:
        ValueError: if the device does not exist here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device={name} is no device; write for example cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device={name}: torch sees {torch.cuda.device_count()} CUDA devices; mmfast doctor says more"
        )
    return device


def load_model(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Load the chosen model, or the embedded one, with its processor."""
    import mmfast
    from mmfast.adapters import load_pretrained
    from mmfast.zoo import EMBEDDED, is_embedded

    name = options.model or EMBEDDED
    if is_embedded(name):
        dtype = options.dtype if options.dtype not in (None, "auto") else "float32"
        return mmfast.load_default(name, device=device, dtype=dtype)
    return load_pretrained(options.model, device=device, dtype=options.dtype, progress=sys.stderr.isatty())


def build_inputs(processor: Any, model: Any, question: str, media: Media) -> Any:
    """Turn question and media into what ``generate`` takes; frames go into the video slot, if there is one."""
    from mmfast.adapters import prepare

    return prepare(
        processor,
        question,
        list(media.images) or None,
        list(media.frames) or None,
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
        sys.stderr.write(f"note: this is {DEMO}; --model takes any other\n")
    for line in media.warnings:
        sys.stderr.write(f"note: {one_line(line)}\n")


def one_line(text: str) -> str:
    """Bring text onto one line, without characters that would steer a terminal.

    Example:
        >>> one_line("two" + chr(10) + "  words" + chr(27) + "[31m")
        'two words?[31m'
    """
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Replace what would steer a terminal: a model or a file name may contain escape sequences."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


def console(stream: Any = None) -> Console:
    """Return a console on stdout, or on another stream; tables in a pipe or file are not squeezed to 80 columns."""
    from rich.console import Console

    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    found = Console(file=sys.stdout if stream is None else stream, **plain)
    return found if found.is_terminal else Console(file=found.file, width=_PIPE_WIDTH, **plain)


def write_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(value, indent=1, default=repr) + "\n")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something takes a while; silent where nobody watches."""
    watched = console(sys.stderr)
    if not watched.is_terminal:
        yield
        return
    with watched.status(what):
        yield


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show on stderr how far something is and how long it will take; silent where nobody watches.

    Args:
        what: what is at work.
        total: how many steps there are, if that is known yet.

    Yields:
        What moves the bar; it takes ``advance``, ``completed``, ``total`` and ``description``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    watched = console(sys.stderr)
    # Plans are written with brackets, which are no markup. What differs in length stands last: the bar stays in place.
    told = TextColumn("{task.description}", markup=False)
    with Progress(
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), told),
        console=watched,
        transient=True,
        disable=not watched.is_terminal,
        speed_estimate_period=_SPEED_SECONDS,
    ) as progress:
        yield partial(progress.update, progress.add_task(what, total=total))


def quiet_libraries() -> None:
    """Keep library chatter below errors off the streams of the command line."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
