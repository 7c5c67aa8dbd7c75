"""Which frames of a video are looked at: the rules that models were trained and evaluated with.

A different rule moves benchmark scores by 0.5 to 2 points, so every result should name its rule.
M is the number of frames, n the number wanted; indices are 0-based, ascending and never repeated:
where n >= M, every rule gives all M frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np

from mmfast.media.errors import MediaError

DEFAULT_FRAMES = 32


def linspace(total: int, count: int) -> list[int]:
    """From the first to the last frame in equal steps, cut off to whole numbers.

    ``linspace(0, M - 1, n, dtype=int)``: the rule of LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA and
    the evaluations of VidCom2, HoliTom and FastVID.

    Example:
        >>> linspace(100, 8)
        [0, 14, 28, 42, 56, 70, 84, 99]
        >>> linspace(3, 8)
        [0, 1, 2]
    """
    if count >= total:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, count, dtype=int)]


def midpoint(total: int, count: int) -> list[int]:
    """The middle of each of n equal segments.

    ``(round(s i) + round(s (i + 1))) // 2`` with ``s = (M - 1) / n`` and halves rounded to even: the rule of
    SlowFast-LLaVA, FreeVideo-LLM and IG-VLM.

    Example:
        >>> midpoint(100, 8)
        [6, 18, 31, 43, 56, 68, 80, 93]
    """
    if count >= total:
        return list(range(total))
    segment = (total - 1) / count
    return [(round(segment * i) + round(segment * (i + 1))) // 2 for i in range(count)]


def internvl(total: int, count: int) -> list[int]:
    """The middle of each of n equal segments as InternVL rounds it.

    ``int(s / 2 + round(s i))`` with ``s = (M - 1) / n``.

    Example:
        >>> internvl(100, 8)
        [6, 18, 31, 43, 56, 68, 80, 93]
        >>> internvl(30, 4), midpoint(30, 4)
        ([3, 10, 17, 25], [3, 10, 18, 25])
    """
    if count >= total:
        return list(range(total))
    segment = (total - 1) / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]


def fps(total: int, source_fps: float, wanted_fps: float, max_frames: int = 768, min_frames: int = 4) -> list[int]:
    """As many frames as a rate asks for, in equal steps, rounded: the rule of qwen-vl-utils.

    ``n = M / source_fps * wanted_fps``, brought into [min_frames, max_frames], at most M, then down to an
    even number because the models join frames in pairs; ``round(linspace(0, M - 1, n))``.

    Example:
        >>> fps(100, 25.0, 2.0)
        [0, 14, 28, 42, 57, 71, 85, 99]
        >>> len(fps(9000, 30.0, 2.0, max_frames=64))
        64
        >>> fps(1, 25.0, 2.0)
        [0]
    """
    upper = min(max_frames // 2 * 2, total)
    count = int(min(max(total / source_fps * wanted_fps, min_frames), upper)) // 2 * 2
    # One frame cannot be a pair: it is returned alone.
    return [int(index) for index in np.linspace(0, total - 1, max(1, count)).round()]


def stride(total: int, source_fps: float, wanted_fps: float, max_frames: int = 768) -> list[int]:
    """Every k-th frame with ``k = round(source_fps / wanted_fps)``; too many: :func:`linspace`.

    The rule of LLaVA-Video's evaluation, which asks for one frame per second and at most 64.

    Example:
        >>> stride(100, 25.0, 1.0)
        [0, 25, 50, 75]
        >>> stride(9000, 30.0, 1.0, max_frames=4)
        [0, 2999, 5999, 8999]
    """
    step = max(1, round(source_fps / wanted_fps))
    indices = list(range(0, total, step))
    return indices if len(indices) <= max_frames else linspace(total, max_frames)


COUNT_SAMPLERS: dict[str, Callable[[int, int], list[int]]] = {
    "linspace": linspace,
    "midpoint": midpoint,
    "internvl": internvl,
}
RATE_SAMPLERS: dict[str, Callable[[int, float, float, int], list[int]]] = {"fps": fps, "stride": stride}
SAMPLERS = (*COUNT_SAMPLERS, *RATE_SAMPLERS)


def choose_sampler(sampler: str | None, *, num_frames: int | None, fps: float | None) -> str:
    """Settle which rule applies: ``linspace`` for a count, ``fps`` for a rate, unless one is named.

    Raises:
        MediaError: if the rule is unknown or needs the other kind of number.

    Example:
        >>> choose_sampler(None, num_frames=8, fps=None), choose_sampler(None, num_frames=None, fps=2.0)
        ('linspace', 'fps')
    """
    if num_frames is not None and fps is not None:
        raise MediaError(f"num_frames={num_frames} and fps={fps} exclude each other; give one of the two")
    if sampler is None:
        return "linspace" if fps is None else "fps"
    if sampler not in SAMPLERS:
        near = get_close_matches(str(sampler), SAMPLERS)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MediaError(f"sampler={sampler!r} is unknown; {hint}There are: {', '.join(SAMPLERS)}")
    if sampler in COUNT_SAMPLERS and fps is not None:
        raise MediaError(
            f"sampler={sampler!r} goes by count, not by fps={fps}; give num_frames, "
            f"or one of {', '.join(RATE_SAMPLERS)}"
        )
    if sampler in RATE_SAMPLERS and fps is None:
        raise MediaError(f"sampler={sampler!r} goes by rate; give fps, the frames wanted per second of video")
    return sampler


def choose_frames(
    total: int,
    source_fps: float,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    sampler: str | None = None,
    max_frames: int = 768,
) -> list[int]:
    """Choose frames by count or by rate.

    Args:
        total: number of frames of the video, at least 1.
        source_fps: frames per second of the video.
        num_frames: frames wanted; 32 if neither this nor ``fps`` is given.
        fps: frames wanted per second of video; at most ``max_frames`` in all.
        sampler: one of ``SAMPLERS``; None: ``linspace`` for a count, ``fps`` for a rate.
        max_frames: upper limit of the number of frames.

    Returns:
        Indices, ascending, without repetition.

    Raises:
        TypeError: if a number is not one.
        MediaError: if a number or the sampler is out of its range.

    Example:
        >>> choose_frames(100, 25.0, num_frames=4), choose_frames(100, 25.0, fps=1.0)
        ([0, 33, 66, 99], [0, 33, 66, 99])
    """
    check_numbers(num_frames=num_frames, fps=fps, max_frames=max_frames)
    sampler = choose_sampler(sampler, num_frames=num_frames, fps=fps)
    if fps is not None:
        return RATE_SAMPLERS[sampler](total, source_fps, fps, max_frames)
    count = min(DEFAULT_FRAMES, max_frames) if num_frames is None else num_frames
    return COUNT_SAMPLERS[sampler](total, count)


def check_numbers(*, num_frames: int | None, fps: float | None, max_frames: int) -> None:
    """Refuse numbers that ask for no frame, or for more than ``max_frames``.

    Example:
        >>> check_numbers(num_frames=0, fps=None, max_frames=768)
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: num_frames=0 must lie in 1..768 (max_frames)
    """
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}={value!r} must be a whole number (int)")
    if max_frames < 1:
        raise MediaError(f"max_frames={max_frames} must be at least 1")
    if num_frames is not None and not 1 <= num_frames <= max_frames:
        raise MediaError(f"num_frames={num_frames} must lie in 1..{max_frames} (max_frames)")
    if fps is None:
        return
    if isinstance(fps, bool) or not isinstance(fps, int | float):
        raise TypeError(f"fps={fps!r} must be a number, the frames wanted per second of video")
    if not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"fps={fps} must be a finite number above 0; 2.0 is two frames per second of video")


def check_part(start: float, end: float | None) -> None:
    """Refuse times that are none.

    Raises:
        TypeError: if they are no numbers.
        MediaError: if one is negative or not finite.

    Example:
        >>> check_part(-1.0, None)
        Traceback (most recent call last):
        mmfast.media.errors.MediaError: start=-1.0 must be a finite number of seconds, at least 0
    """
    for name, value in (("start", start), ("end", end)):
        if value is None and name == "end":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} must be a number of seconds")
        if not (math.isfinite(value) and value >= 0):
            raise MediaError(f"{name}={value} must be a finite number of seconds, at least 0")


def frames_of_part(total: int, source_fps: float, start: float, end: float | None) -> range:
    """Return the frames between two times: at least one, and none beyond the last.

    Args:
        total: number of frames of the video, at least 1.
        source_fps: frames per second of the video.
        start: in seconds.
        end: in seconds; None for the end of the video.

    Example:
        >>> frames_of_part(100, 25.0, 1.0, 2.0), frames_of_part(100, 25.0, 9.0, None)
        (range(25, 50), range(99, 100))
    """
    first = min(math.floor(start * source_fps), total - 1)
    last = total if end is None else min(math.ceil(end * source_fps), total)
    return range(first, max(first + 1, last))


def check_indices(indices: Sequence[int], *, max_frames: int) -> list[int]:
    """Check indices given by the caller.

    Raises:
        TypeError: if they are not whole numbers.
        MediaError: if there is none, one is negative, or there are more than ``max_frames``.

    Example:
        >>> check_indices([5, 0, 5], max_frames=768)
        [5, 0, 5]
    """
    if isinstance(indices, str | bytes) or not hasattr(indices, "__iter__"):
        raise TypeError(f"indices={indices!r} must be a list of frame numbers")
    checked = []
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise TypeError(f"indices holds {index!r}, which is no frame number (int >= 0)")
        if index < 0:
            raise MediaError(f"indices holds {index}; frame numbers start at 0 and do not count from the end")
        checked.append(int(index))
    if not 1 <= len(checked) <= max_frames:
        raise MediaError(f"indices holds {len(checked)} frames; it must hold 1..{max_frames} (max_frames)")
    return checked
