"""Scatter charts of accuracy against cost, as SVG that follows the colours of its page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 44
_LABEL = (16.0, 12.0)
"""Room that a label of two digits takes."""

STYLE = """
.chart { width: 100%; height: auto; font: 12px system-ui, sans-serif; } .chart text { fill: var(--soft); }
.chart .grid { stroke: var(--line); } .chart .front { fill: none; stroke: var(--bar); stroke-width: 2; }
.chart .whisker { stroke: var(--soft); stroke-width: 1; } .chart .own { fill: var(--link); }
.chart .full { fill: var(--ink); } .chart .baseline { fill: none; stroke: var(--soft); stroke-width: 1.4; }
.chart text.number { fill: var(--ink); font-weight: 600; font-size: 11px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.key svg { width: 1.1em; height: 1.1em; vertical-align: -.2em; margin-right: .35em; overflow: visible; }
"""


@dataclass(frozen=True)
class Point:
    """One plan in a chart.

    Attributes:
        number: what is written beside it; "" for nothing.
        title: what is shown when it is pointed at.
        kind: ``"full"``, the name of a baseline, or "" for other plans.
        x: its cost, smaller is better.
        y: its score, larger is better.
        low: lower end of the score's interval.
        high: upper end.
    """

    number: str
    title: str
    kind: str
    x: float
    y: float
    low: float
    high: float


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that none other beats: at least as cheap and as good, and better in one of both.

    Example:
        >>> at = [Point("", "", "", x, y, y, y) for x, y in ((1, 50), (2, 40), (2, 70), (4, 70))]
        >>> [(point.x, point.y) for point in pareto_front(at)]
        [(1, 50), (2, 70)]
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def scatter(points: Sequence[Point], x_name: str, y_name: str, *, logarithmic: bool = False) -> str:
    """Draw points, the intervals of plans and of the full model, and the Pareto front of all points.

    Args:
        points: at least one.
        x_name: what costs, plain text.
        y_name: what is scored, plain text.
        logarithmic: spread the costs by their ratios; they must be positive.

    Returns:
        One ``<svg>`` element, styled by :data:`STYLE`.

    Raises:
        ValueError: if there are no points, or costs of zero on a logarithmic axis.
    """
    if not points:
        raise ValueError("a chart needs at least one point")
    if logarithmic and min(point.x for point in points) <= 0:
        raise ValueError("a logarithmic axis needs costs above 0")
    horizontal = _Axis([point.x for point in points], _LEFT, WIDTH - _RIGHT, logarithmic=logarithmic)
    heights = [value for point in points for value in (point.low, point.high, point.y)]
    vertical = _Axis(heights, HEIGHT - _BOTTOM, _TOP, least=10.0)
    parts = [_grid(horizontal, vertical)]
    placed = [(point, horizontal(point.x), vertical(point.y)) for point in points]
    parts += [
        f'<path class="whisker" d="M{x:.1f} {vertical(point.low):.1f}V{vertical(point.high):.1f}"/>'
        for point, x, _ in placed
        if point.kind in ("", "full")
    ]
    front = [(horizontal(point.x), vertical(point.y)) for point in pareto_front(points)]
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in front[1:])
    parts.append(f'<path class="front" d="M{front[0][0]:.1f} {front[0][1]:.1f}{steps}H{WIDTH - _RIGHT}"/>')
    # Plans last, so that no baseline covers them.
    for point, x, y in sorted(placed, key=lambda found: (found[0].kind == "", found[0].kind == "full")):
        parts.append(marker(point.kind, x, y, title=point.title))
    parts += _numbers(placed)
    label = escape(f"{y_name} against {x_name}: " + "; ".join(point.title for point in points))
    names = (
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text transform="translate(12 {(HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}{names}</svg>"
    )


def marker(kind: str, x: float, y: float, *, title: str = "") -> str:
    """Draw the sign of one kind of plan; kinds differ in shape, not only in colour.

    Example:
        >>> marker("", 1, 2)
        '<circle class="own" cx="1.0" cy="2.0" r="5"></circle>'
    """
    told = f"<title>{escape(title)}</title>" if title else ""
    if not kind:
        return f'<circle class="own" cx="{x:.1f}" cy="{y:.1f}" r="5">{told}</circle>'
    shapes = {
        "full": "m0 -7l7 7l-7 7l-7 -7z",
        "random": "m-4 -4l8 8m0 -8l-8 8",
        "uniform": "m0 -5v10m-5 -5h10",
        "pool2d": "m-4 -4h8v8h-8z",
        "downsample": "m0 5l-5 -9h10z",
    }
    look = "full" if kind == "full" else "baseline"
    return f'<path class="{look}" d="M{x:.1f} {y:.1f}{shapes.get(kind, shapes["pool2d"])}">{told}</path>'


class _Axis:
    """From values to places on the page.

    Args:
        values: what must find room.
        start: place of the small end.
        end: place of the large end.
        logarithmic: by ratios.
        least: how much the axis spans at least.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, logarithmic: bool = False, least: float = 0.0
    ) -> None:
        self._log, self._start, self._end = logarithmic, start, end
        low, high = min(values), max(values)
        if logarithmic:
            low, high = math.log2(low), math.log2(high)
        room = max(0.08 * (high - low), (least - (high - low)) / 2, 0.25 if logarithmic else 0.02 * abs(high) or 1.0)
        self._low, self._high = low - room, high + room

    def __call__(self, value: float) -> float:
        value = math.log2(value) if self._log else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return round values inside the axis."""
        if self._log:
            found = [2.0**power for power in range(math.ceil(self._low), math.floor(self._high) + 1)]
            return found[:: max(1, math.ceil(len(found) / 8))] or [2**self._low, 2**self._high]
        rough = (self._high - self._low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self._low / step)
        return [step * place for place in range(first, math.floor(self._high / step) + 1)]


def _grid(horizontal: _Axis, vertical: _Axis) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in horizontal.ticks():
        x = horizontal(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:.4g}</text>')
    for value in vertical.ticks():
        y = vertical(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    return "".join(parts)


def _numbers(placed: Sequence[tuple[Point, float, float]]) -> list[str]:
    """Write each number beside its point, where nothing stands yet."""
    width, height = _LABEL
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in placed]
    parts = []
    for point, x, y in placed:
        if not point.number:
            continue
        boxes = [
            (x + right, y + down, x + right + width, y + down + height)
            for right, down in ((7, -16), (-7 - width, -16), (7, 4), (-7 - width, 4), (-8, -22), (-8, 9))
        ]
        left, _, _, low = box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        parts.append(
            f'<text class="number" x="{left + width / 2:.1f}" y="{low - 2:.1f}" text-anchor="middle">'
            f"{escape(point.number)}</text>"
        )
    return parts


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down)
