"""Plots of measured numbers as SVG: values with intervals, a row each, and values over a number, with a line and a band."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sft_jax.inspection.markup import escape
from sft_jax.inspection.plots import WIDTH, axis_text, figure

_ROW = 36  # height of a row of `intervals`: a name, and below it what was measured
_NAME = 64  # characters of a name
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 66, 20, 16, 44, 270


class Measured(NamedTuple):
    """A row of `intervals`."""

    name: str
    values: Sequence[float]  # of single runs
    mean: float
    low: float | None  # of the interval of the mean
    high: float | None


class Line(NamedTuple):
    """A line over x, with a band around it where `low` and `high` are there."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def intervals(rows: Sequence[Measured], title: str, x_label: str) -> str:
    """Returns means as dots with their intervals as bars and single runs as rings, one row each from the top."""
    left, width = _RIGHT, WIDTH - 2 * _RIGHT
    numbers = [x for row in rows for x in (*row.values, row.mean, row.low, row.high) if x is not None]
    ticks = _ticks(min(numbers), max(numbers))
    base = _TOP + len(rows) * _ROW

    def x(value: float) -> float:
        return left + width * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [f'<line class="grid" x1="{x(at):.1f}" y1="{_TOP}" x2="{x(at):.1f}" y2="{base}"/>' for at in ticks]
    parts += [axis_text(x(at), base + 15, f"{at:g}", "middle") for at in ticks]
    for number, row in enumerate(rows):
        y = _TOP + (number + 0.7) * _ROW
        told = f"{row.mean:.4g}" + (f" [{row.low:.4g}, {row.high:.4g}]" if row.low is not None else "") + f", {len(row.values)} runs"
        name = row.name if len(row.name) <= _NAME else f"{row.name[: _NAME - 1]}…"
        parts.append(f'<g><title>{escape(f"{row.name}: {told}")}</title>{axis_text(left, y - 11, name, "start")}')
        if row.low is not None:
            parts.append(f'<line class="curve line0" x1="{x(row.low):.1f}" y1="{y:.1f}" x2="{x(row.high):.1f}" y2="{y:.1f}"/>')
        parts += [f'<circle class="ring" cx="{x(value):.1f}" cy="{y:.1f}" r="3"/>' for value in row.values]
        parts.append(f'<circle class="bar0" cx="{x(row.mean):.1f}" cy="{y:.1f}" r="4"/></g>')
    parts.append(axis_text(left + width / 2, base + 34, x_label, "middle"))
    return figure(parts, title, base + _BOTTOM)


def curve(
    points: Sequence[tuple[float, float]], title: str, x_label: str, y_label: str, *, line: Line | None = None, marker: tuple[float, str] | None = None
) -> str:  # fmt: skip
    """Returns values over a positive number on a logarithmic axis, with a line and its band.

    `marker` is a place on the x axis that is drawn in, with what stands there.
    """
    width, height, base = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    xs = [math.log(x) for x in [*(x for x, _ in points), *(line.x if line else ())]]
    margin = max(0.03 * (max(xs) - min(xs)), 1e-6)
    first, last = min(xs) - margin, max(xs) + margin
    ticks = _ticks(*_range([y for _, y in points], line))

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, ticks[0]), ticks[-1])
        return _LEFT + width * (math.log(x) - first) / (last - first), base - height * (y - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for at in ticks:
        y = place(math.exp(first), at)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(axis_text(_LEFT - 6, y + 4, f"{at:g}", "end"))
    if line and len(line.low):
        there, back = zip(line.x, line.high, strict=True), reversed(list(zip(line.x, line.low, strict=True)))
        parts.append(f'<polygon class="band" points="{_path([place(*at) for at in (*there, *back)])}"/>')
    if line:
        parts.append(f'<polyline class="curve line0" points="{_path([place(*at) for at in zip(line.x, line.y, strict=True)])}"/>')
    for x, y in points:
        at = place(x, y)
        parts.append(f'<circle class="ring" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5"><title>{escape(f"{x:,g}: {y:.4g}")}</title></circle>')
    if marker:
        at = place(marker[0], ticks[0])[0]
        parts.append(f'<line class="limit" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{base}"/>')
        parts.append(f'<text class="limit-label" x="{at - 4:.1f}" y="{_TOP + 10}" text-anchor="end">{escape(marker[1])}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{WIDTH - _RIGHT}" y2="{base}"/>')
    parts += [axis_text(place(x, ticks[0])[0], base + 15, f"{x:,.6g}", "middle") for x in _spread({x for x, _ in points}, (last - first) / 7)]
    parts.append(axis_text(_LEFT + width / 2, base + 34, x_label, "middle"))
    parts.append(
        f'<text class="label" transform="translate(12 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return figure(parts, title, _HEIGHT)


def _range(values: list[float], line: Line | None) -> tuple[float, float]:
    """Returns what the y axis shows: all values and the line; of the band as much as leaves them half of the height."""
    low, high = min([*values, *(line.y if line else ())]), max([*values, *(line.y if line else ())])
    room = (high - low) / 2
    if line and len(line.low):
        low, high = max(min(low, *line.low), low - room), min(max(high, *line.high), high + room)
    return low, high


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _spread(values: set[float], apart: float) -> list[float]:
    """Returns those of some numbers whose logarithms are `apart` from the one before, the largest one always."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if not kept or math.log(kept[-1] / value) >= apart:
            kept.append(value)
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """Returns four to nine round numbers, the first not above `low` and the last not below `high`.

    >>> _ticks(0.2, 1.1)
    [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    """
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 7)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
