"""Plots of measured numbers as SVG: values with intervals, a row each; values over a number, with a line and a band; curves of a run."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sft_jax.inspection.markup import escape
from sft_jax.inspection.plots import WIDTH, axis_text, figure

_ROW = 36  # height of a row of `intervals`: a name, and below it what was measured
_NAME = 64  # characters of a name
_FEW_POINTS = 40  # of a curve whose points are drawn as well
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

def line_plot(
    series: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str, x_label: str, y_label: str, *, logarithmic: bool = False
) -> str:
    """Returns curves over a common axis that begins at 0.

    Args:
        series: (name, x float [n], y float [n]) of each curve; a single point is drawn as a dot. With more than one curve there is a key.
        logarithmic: of the vertical axis; values that are not above 0 are left out.
    """
    kept = [(name, *(part[np.isfinite(y) & ((not logarithmic) | (y > 0))] for part in (x, y))) for name, x, y in series]
    kept = [(name, x, y) for name, x, y in kept if len(x)]
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    base, right = _TOP + height, max((float(x.max()) for _, x, _ in kept), default=1.0) or 1.0
    values = np.concatenate([y for _, _, y in kept]) if kept else np.ones(1)
    ticks = _decades(float(values.min()), float(values.max())) if logarithmic else _ticks(float(values.min()), float(values.max()))
    scale = np.log10 if logarithmic else np.asarray
    low, high = float(scale(ticks[0])), float(scale(ticks[-1]))

    def place(x, y) -> tuple[np.ndarray, np.ndarray]:
        return _LEFT + width * x / right, base - height * (scale(y) - low) / (high - low)

    parts = []
    for tick in ticks:
        _, at = place(0.0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(axis_text(_LEFT - 6, float(at) + 4, f"{tick:.4g}", "end"))
    for number, (name, x, y) in enumerate(kept):
        across, down = place(x, y)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
        tip = f"<title>{escape(name)}: {y[0]:.4g} at {x[0]:g}, {y[-1]:.4g} at {x[-1]:g}</title>"
        parts.append(f'<polyline class="curve line{number % 4}" points="{points}">{tip}</polyline>')
        if len(x) <= _FEW_POINTS:
            parts += [f'<circle class="bar{number % 4}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in zip(across, down, strict=True)]
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{WIDTH - _RIGHT}" y2="{base}"/>')
    parts += [axis_text(_LEFT + width * tick / right, base + 15, f"{tick:,.4g}", "middle") for tick in _ticks(0.0, right) if tick <= right]
    parts.append(axis_text(_LEFT + width / 2, base + 34, x_label, "middle"))
    parts.append(
        f'<text class="label" transform="translate(12 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    keys = "".join(f'<span class="key"><i class="swatch bar{n % 4}"></i>{escape(name)}</span>' for n, (name, _, _) in enumerate(kept))
    return figure(parts, title, _HEIGHT, keys if len(kept) > 1 else "")


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

def _decades(low: float, high: float) -> list[float]:
    """Returns powers of ten around two positive numbers, at most six.

    >>> _decades(0.02, 3)
    [0.01, 0.1, 1.0, 10.0]
    """
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    step = max(1, -(-(last - first) // 5))
    return [float(f"1e{power}") for power in range(first, max(last, first + 1) + step, step)]
