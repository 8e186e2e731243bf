"""Charts as SVG that takes its colours from the page: curves and bars, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
Series = tuple[str, Sequence[tuple[float, float]]]


def curves(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Return a line chart.

    Args:
        series: (name, points (x, y)); points that are not finite are left out.
        x_label: under the chart.
        y_label: beside it.
    """
    kept = [(n, [p for p in points if all(map(math.isfinite, p))]) for n, points in series]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return "<p>nothing to show</p>"
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, min(ys)), max(ys)
    parts = [_open(f"{y_label} by {x_label}")]
    for tick in ticks(y0, y1):
        y = _y(tick, y0, y1)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(x0, x1):
        x = _x(tick, x0, x1)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:.4g}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, (_, points) in enumerate(kept):
        path = " ".join(f"{_x(x, x0, x1):.1f},{_y(y, y0, y1):.1f}" for x, y in points)
        parts.append(f'<polyline class="s{i % 4}" points="{path}"/>')
        if len(points) < 30:
            parts += [
                f'<circle class="s{i % 4}" r="3"'
                f' cx="{_x(x, x0, x1):.1f}" cy="{_y(y, y0, y1):.1f}"/>'
                for x, y in points
            ]
    legend = "".join(
        f'<span><i class="s{i % 4}"></i>{escape(name)}</span>' for i, (name, _) in enumerate(kept)
    )
    return "".join(parts) + f'</svg><p class="legend">{legend}</p>'


def bars(rows: Sequence[tuple[str, float, float | None]], label: str) -> str:
    """Return horizontal bars (name, value, spread); the spread is a thin line at the end."""
    top = max(
        (value + (spread or 0) for _, value, spread in rows if math.isfinite(value)), default=1
    )
    top = top if top > 0 else 1.0
    height, left = 26, 150
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height * len(rows) + 4}" role="img"'
        f' aria-label="{escape(label)}">'
    ]
    room = WIDTH - left - 80
    for i, (name, value, spread) in enumerate(rows):
        y, width = i * height, max(0.0, value) / top * room if math.isfinite(value) else 0
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="s0" x="{left}" y="{y + 4}" width="{width:.1f}" height="18" rx="2"/>'
        )
        end = left + width
        if spread:
            reach = spread / top * room
            parts.append(
                f'<line class="spread" x1="{end - reach:.1f}" x2="{end + reach:.1f}"'
                f' y1="{y + 13}" y2="{y + 13}"/>'
            )
            end += reach
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 17}">{value:.4g}</text>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Return up to six round numbers between two."""
    if not high > low:
        return [low]
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _open(label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'


def _x(x: float, low: float, high: float) -> float:
    return _LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - _LEFT - _RIGHT)


def _y(y: float, low: float, high: float) -> float:
    return HEIGHT - _BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - _TOP - _BOTTOM)
