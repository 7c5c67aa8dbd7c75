"""What lmms-eval says in text or loosely typed: arguments of a model, of generation, and where answers end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

MAX_NEW_TOKENS = 1024
"""Tokens of an answer where the task does not say."""

_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
# Said by many tasks, and nothing that generate() takes: where answers end is seen to below, and how large pictures
# become is the processor's matter.
_IGNORED = ("until", "do_sample", "max_new_tokens", "image_aspect_ratio", "use_cache")


def read_arguments(text: str) -> dict[str, Any]:
    """Read ``--model_args``: names and values with commas between them, except those inside brackets and quotes.

    Raises:
        ValueError: for a part without a name.

    Example:
        >>> read_arguments("pretrained=embedded,plan=fastv(keep=16, layer=1),frames=4")
        {'pretrained': 'embedded', 'plan': 'fastv(keep=16, layer=1)', 'frames': 4}
    """
    found: dict[str, Any] = {}
    for part in _split(text):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not (name and sign):
            raise ValueError(f"--model_args: {part!r} must be NAME=VALUE")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        value = value[1:-1] if quoted else value
        found[name] = int(value) if value.isdecimal() else value
    return found


def generation_options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    r"""Turn the generation arguments of a task into those of ``generate``, and its stop strings.

    A temperature above 0 samples, everything else is greedy, as in the other models of lmms-eval.

    Raises:
        ValueError: for an argument that is not known.

    Example:
        >>> generation_options({"until": "\n", "max_new_tokens": 8, "temperature": 0, "num_beams": 1})
        ({'max_new_tokens': 8, 'do_sample': False, 'num_beams': 1}, ['\n'])
    """
    unknown = sorted(set(given) - {*_SAMPLING, *_PASSED, *_IGNORED})
    if unknown:
        known = ", ".join(sorted({*_SAMPLING, *_PASSED, *_IGNORED}))
        raise ValueError(f"generation_kwargs: {', '.join(unknown)} cannot be passed on; known are {known}")
    until = given.get("until") or []
    sample = float(given.get("temperature") or 0) > 0
    options = {"max_new_tokens": int(given.get("max_new_tokens") or MAX_NEW_TOKENS), "do_sample": sample}
    passed = (*_PASSED, *(_SAMPLING if sample else ()))
    options |= {name: given[name] for name in passed if given.get(name) is not None}
    return options, [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    r"""Return the text before the first of the stop strings.

    Example:
        >>> cut("red\n\nbecause", ["\n\n", "."])
        'red'
    """
    for stop in filter(None, until):
        text = text.split(stop, 1)[0]
    return text


def _split(text: str) -> Iterator[str]:
    depth, quote, begin = 0, "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == "," and depth == 0:
            yield text[begin:place]
            begin = place + 1
    if text[begin:].strip():
        yield text[begin:]
