"""Boxes in answers: finding one in a text, and how well it covers another."""

from __future__ import annotations

import re
from typing import NamedTuple

_NUMBER = r"(-?\d+(?:\.\d+)?|-?\.\d+)"
_GAP = r"\s*[,;\s]\s*"
# Four numbers in one bracket, or two corners in brackets of their own.
_CORNERS = re.compile(
    rf"[\[(<{{]\s*{_NUMBER}{_GAP}{_NUMBER}\s*[\])}}]?\s*,?\s*[\[(<{{]?\s*,?\s*{_NUMBER}{_GAP}{_NUMBER}\s*[\])>}}]"
)


class Box(NamedTuple):
    """A box by its corners.

    Attributes:
        left: smaller x.
        top: smaller y, counted from above.
        right: larger x.
        bottom: larger y.
    """

    left: float
    top: float
    right: float
    bottom: float


def find_box(text: str) -> Box | None:
    """Find the first box in a text.

    Brackets of any kind are read, ``[x1, y1, x2, y2]`` as well as ``(x1,y1),(x2,y2)``. Corners in the wrong
    order are swapped.

    Args:
        text: what the model wrote; the coordinates keep their scale.

    Returns:
        The box, or None if there is none.

    Example:
        >>> find_box("The cat is at [0.1, 0.2, 0.5, 0.6].")
        Box(left=0.1, top=0.2, right=0.5, bottom=0.6)
        >>> find_box("<box>(100,200),(300,400)</box>")
        Box(left=100.0, top=200.0, right=300.0, bottom=400.0)
        >>> find_box("no box")
    """
    match = _CORNERS.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def intersection_over_union(first: Box, second: Box) -> float:
    """Divide the common area of two boxes by what they cover together.

    Returns:
        0.0 to 1.0; 0.0 if both are empty.

    Example:
        >>> intersection_over_union(Box(0, 0, 2, 2), Box(1, 0, 3, 2))
        0.3333333333333333
    """
    width = min(first.right, second.right) - max(first.left, second.left)
    height = min(first.bottom, second.bottom) - max(first.top, second.top)
    common = max(0.0, width) * max(0.0, height)
    together = _area(first) + _area(second) - common
    return common / together if together > 0 else 0.0


def _area(box: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top)
