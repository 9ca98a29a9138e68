"""Training curves as small SVG panels, drawn by hand so that they follow the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fewstep.evals.findings import Series
from fewstep.evals.markup import Html, h

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MAX_POINTS = 240
SMOOTH_FROM = 24
"""From this many points on, a running mean is drawn over the pale raw curve, if it is noisy."""
FIRST = ("loss", "grad_norm", "mismatch", "share", "lambda", "adaptive", "adaptive_ratio", "gap")


@dataclass(frozen=True)
class Panel:
    """The curves that share all but the last part of their key: `loss/t2i` has `portrait`, ..."""

    title: str
    curves: Series


def panels(metrics: Series) -> list[Panel]:
    """Losses first, then gradient norms, teacher shares and the rest by name."""
    grouped: dict[str, Series] = {}
    for key, points in metrics.items():
        parent, _, last = key.rpartition("/")
        grouped.setdefault(parent or key, {})[last] = points

    def order(title: str) -> tuple[int, str]:
        group = title.split("/")[0]
        return (FIRST.index(group) if group in FIRST else len(FIRST), title)

    return [Panel(title, grouped[title]) for title in sorted(grouped, key=order)]


def draw(panel: Panel) -> Html:
    """A figure with axes, one line a curve and a legend with the last values."""
    points = [point for curve in panel.curves.values() for point in curve]
    steps, values = [s for s, _ in points], [v for _, v in points]
    share = panel.title.split("/")[0] in ("share", "lambda", "adaptive")
    log = not share and min(values) > 0 and max(values) / min(values) > 50
    low, high = (0.0, max(1.0, *values)) if share else _range(values, log=log)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        height = math.log10(value) if log else value
        return HEIGHT - BOTTOM - (height - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts: list[Html] = []
    for tick in _ticks(low, high, whole=log):
        value = 10**tick if log else tick
        parts.append(h("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, **_at(y(value))))
        parts.append(h("text", f"{value:.4g}", x=LEFT - 6, y=f"{y(value) + 3.5:.1f}", class_="ty"))
    for tick in _ticks(first, last, count=4):
        parts.append(h("text", f"{tick:g}", x=f"{x(tick):.1f}", y=HEIGHT - 7, class_="tx"))
    for i, curve in enumerate(panel.curves.values()):
        shown = _thin(curve)
        if len(curve) >= SMOOTH_FROM and _is_noisy(curve):
            parts.append(_line(shown, x, y, f"{_tone(i)} raw"))
            shown = _smooth(shown)
        parts.append(_line(shown, x, y, _tone(i)))
    legend = [
        h("li", h("i", class_=_tone(i)), name, h("b", f"{curve[-1][1]:.3g}"))
        for i, (name, curve) in enumerate(panel.curves.items())
    ]
    told = "; ".join(
        f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}"
        for name, curve in panel.curves.items()
    )
    return h(
        "figure",
        h("figcaption", panel.title, h("span", " log scale") if log else None),
        h(
            "svg",
            parts,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{panel.title}, steps {first:g} to {last:g}: {told}",
        ),
        h("ul", legend, class_="legend"),
        class_="curve",
    )


def _tone(i: int) -> str:
    """Eight colours; those that come again are dashed."""
    return f"s{i % 8}" if i < 8 else f"s{i % 8} dashed"


def _at(height: float) -> dict[str, str]:
    return {"y1": f"{height:.1f}", "y2": f"{height:.1f}"}


def _line(points, x, y, classes: str) -> Html:
    drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    if len(points) == 1:
        step, value = points[0]
        return h(
            "circle", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=2.5, class_=f"{classes} dot"
        )
    return h("polyline", points=drawn, class_=classes)


def _range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    elif 0 <= low < 0.5 * high:
        low = 0.0
    pad = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - pad), high + pad


def _ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers inside [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step)
    return [float(n * step) for n in range(first, math.floor(high / step) + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the mean of each run of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in r) / len(r), sum(v for _, v in r) / len(r)) for r in runs]


def _is_noisy(points: Sequence[tuple[float, float]]) -> bool:
    """True if the curve goes up and down much more than from its lowest to its highest point."""
    values = [value for _, value in points]
    travelled = sum(abs(b - a) for a, b in pairwise(values))
    return travelled > 3 * (max(values) - min(values))


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a centred window of a tenth of the curve, narrower at the ends."""
    reach = max(2, len(points) // 20)
    smooth = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = points[i - near : i + near + 1]
        smooth.append((step, sum(value for _, value in window) / len(window)))
    return smooth
