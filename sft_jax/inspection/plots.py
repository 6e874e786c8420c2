"""Plots as SVG text with axes, units and a description; colours are those of the page's style sheet."""

import itertools
from collections.abc import Sequence

import numpy as np

from sft_jax.inspection.markup import escape

WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 22, 44
_BARS = 28  # bars of a row of grouped bars: height in all


def length_histogram(lengths: np.ndarray, limit: int, label: str) -> str:
    """Returns how many examples there are of each length, over octaves, with the longest that fits a row drawn in."""
    low = int(np.log2(max(1, min(int(lengths.min()), limit))))
    high = int(np.ceil(np.log2(max(int(lengths.max()), limit) + 1)))
    edges = 2.0 ** np.linspace(low, high, 4 * (high - low) + 1)
    counts, _ = np.histogram(lengths, edges)
    ticks = [(float(2**power), f"{2**power:,}") for power in range(low, high + 1, max(1, -(-(high - low) // 8)))]
    return _histogram(
        np.log2(edges), counts, [(np.log2(at), text) for at, text in ticks], f"{label}: examples by length",
        "tokens of an example (logarithmic)", "examples", marker=(float(np.log2(limit)), f"longest that fits: {limit:,}"),
        ranges=[f"{np.ceil(a):,.0f} to {np.ceil(b) - 1:,.0f} tokens" for a, b in zip(edges, edges[1:], strict=False)],
    )  # fmt: skip


def share_histogram(shares: np.ndarray, title: str, x_label: str, y_label: str) -> str:
    """Returns a histogram of shares between 0 and 1, as per cent."""
    edges = np.linspace(0, 100, 26)
    counts, _ = np.histogram(100 * shares, edges)
    ticks = [(float(at), f"{at}%") for at in range(0, 101, 20)]
    ranges = [f"{a:.0f}% to {b:.0f}%" for a, b in zip(edges, edges[1:], strict=False)]
    return _histogram(edges, counts, ticks, title, x_label, y_label, ranges=ranges)


def grouped_bars(names: Sequence[str], groups: Sequence[tuple[str, np.ndarray]], title: str, x_label: str) -> str:
    """Returns horizontal bars: for each name one of each group, as its per cent of the group's sum."""
    thick = _BARS / len(groups)
    height = _TOP + len(names) * (_BARS + 12) + _BOTTOM
    left, width = 120, WIDTH - 120 - 60
    parts = [axis_text(left - 8, _TOP + 16 + n * (_BARS + 12), _shortened(name), "end") for n, name in enumerate(names)]
    for kind, (group, amounts) in enumerate(groups):
        for n, share in enumerate((100 * amounts / max(1, amounts.sum())).tolist()):
            y = _TOP + n * (_BARS + 12) + kind * thick
            tip = f"{names[n]}: {share:.1f}% of {group} ({amounts[n]:,})"
            parts.append(_bar(left, y, width * share / 100, thick - 1, tip, f"bar bar{kind}"))
            parts.append(axis_text(left + width * share / 100 + 4, y + thick - 2, f"{share:.1f}%", "start"))
    base = height - _BOTTOM
    parts += [f'<line class="axis" x1="{left}" y1="{base}" x2="{left + width}" y2="{base}"/>']
    parts += [axis_text(left + width * at / 100, base + 15, f"{at}%", "middle") for at in range(0, 101, 25)]
    parts.append(axis_text(left + width / 2, base + 34, x_label, "middle"))
    keys = "".join(
        f'<span class="key"><i class="swatch bar{kind}"></i>{escape(group)}</span>' for kind, (group, _) in enumerate(groups)
    )
    return figure(parts, title, height, keys)


def _histogram(
    edges: np.ndarray,
    counts: np.ndarray,
    ticks: Sequence[tuple[float, str]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    ranges: Sequence[str],
    marker: tuple[float, str] | None = None,
) -> str:
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    base = _TOP + height
    steps = _steps(int(counts.max(initial=0)))
    top = steps[-1]

    def x(value: float) -> float:
        return _LEFT + width * (value - edges[0]) / (edges[-1] - edges[0])

    def y(count: float) -> float:
        return base - height * count / top

    parts = []
    for count in steps:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y(count):.1f}" x2="{WIDTH - _RIGHT}" y2="{y(count):.1f}"/>')
        parts.append(axis_text(_LEFT - 6, y(count) + 4, f"{count:,}", "end"))
    for number, count in enumerate(counts.tolist()):
        left, right = x(edges[number]), x(edges[number + 1])
        if count:
            shown = min(y(count), base - 1)  # one among thousands is seen too
            parts.append(
                _bar(left + 0.5, shown, right - left - 1, base - shown, f"{ranges[number]}: {count:,} {y_label}", "bar bar0")
            )
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{WIDTH - _RIGHT}" y2="{base}"/>')
    parts += [axis_text(x(at), base + 15, text, "middle") for at, text in ticks]
    parts.append(axis_text(_LEFT + width / 2, base + 34, x_label, "middle"))
    parts.append(
        f'<text class="label" transform="translate(12 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    if marker:
        at = x(marker[0])
        anchor = "end" if at > WIDTH / 2 else "start"
        parts.append(f'<line class="limit" x1="{at:.1f}" y1="{_TOP - 6}" x2="{at:.1f}" y2="{base}"/>')
        parts.append(f'<text class="limit-label" x="{at:.1f}" y="{_TOP - 9}" text-anchor="{anchor}">{escape(marker[1])}</text>')
    return figure(parts, title, _HEIGHT)


def _steps(most: int) -> list[int]:
    """Returns round counts from 0 to one that is not below `most`.

    >>> _steps(7)
    [0, 2, 4, 6, 8]
    """
    most = max(1, most)
    step = next(factor * 10**power for power in itertools.count() for factor in (1, 2, 5) if 4 * factor * 10**power >= most)
    return list(range(0, -(-most // step) * step + 1, step))


def _bar(x: float, y: float, width: float, height: float, tip: str, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def axis_text(x: float, y: float, text: str, anchor: str) -> str:
    """Returns a label of an axis; `anchor` is "start", "middle" or "end"."""
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def figure(parts: Sequence[str], title: str, height: float, keys: str = "") -> str:
    """Returns a figure of WIDTH x `height` with the SVG elements `parts`; `keys` is HTML that explains its colours."""
    name = escape(title)
    keys = f'<div class="keys">{keys}</div>' if keys else ""
    return (
        f'<figure><figcaption>{name}</figcaption>{keys}<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
