"""Bar charts in SVG, in the colours of a light page or of a dark one, as the reader prefers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABELS, _VALUES, _BAR, _GAP, _TOP, _MARGIN = 860, 400, 90, 20, 8, 44, 16
_STYLE = """<style>
.ground { fill: #f7f8fa } .text { fill: #1f2933 } .others { fill: #9aa5b1 } .ours { fill: #1d8a7a }
@media (prefers-color-scheme: dark) {
.ground { fill: #1a1c1e } .text { fill: #e4e7eb } .others { fill: #616e7c } .ours { fill: #2bb39f }
}
</style>"""
_CUT = 5
"""A bar that is so many times longer than the next one is cut, and says so, or none of the others could be seen."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a chart: `shown` is the value as text."""

    label: str
    value: float
    shown: str
    highlighted: bool = False


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Return a chart of horizontal bars in the order given, as an SVG document."""
    length = _WIDTH - _LABELS - _VALUES - 2 * _MARGIN
    longest = _axis([bar.value for bar in bars])
    height = _TOP + len(bars) * (_BAR + _GAP) + _MARGIN - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        _STYLE,
        f'<rect width="{_WIDTH}" height="{height}" rx="8" class="ground"/>',
        f'<text x="{_MARGIN}" y="28" class="text" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    start = _MARGIN + _LABELS
    for number, bar in enumerate(bars):
        top = _TOP + number * (_BAR + _GAP)
        base = top + _BAR - 6
        cut = bar.value > longest
        width = length * min(max(bar.value, 0.0) / longest, 1.0) if longest else 0.0
        weight = ' font-weight="600"' if bar.highlighted else ""
        parts += [
            f'<text x="{start - 10}" y="{base}" class="text" text-anchor="end"{weight}>{escape(bar.label)}</text>',
            f'<rect x="{start}" y="{top}" width="{width:.1f}" height="{_BAR}" rx="2" '
            f'class="{"ours" if bar.highlighted else "others"}"/>',
            f'<text x="{start + width + 8:.1f}" y="{base}" class="text"{weight}>{escape(bar.shown)}</text>',
        ]
        if cut:
            # a slanted gap near the end: the bar goes on
            gap = start + width - 26
            parts.append(f'<path d="M{gap:.1f} {top + _BAR + 1} l6 {-_BAR - 2} h6 l-6 {_BAR + 2} z" class="ground"/>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _axis(values: Sequence[float]) -> float:
    """Return the value of a full bar: the greatest one that is not far above all others."""
    ordered = sorted(values)
    while len(ordered) > 1 and ordered[-1] > _CUT * max(ordered[-2], 0.0) > 0:
        ordered.pop()
    return ordered[-1] * (1.25 if len(ordered) < len(values) else 1.0) if ordered else 0.0
