"""Charts as SVG: no script, no font, no request. Every text passes `tag`, which escapes it.

A series is told apart by its number as well as by its colour: each badge carries the number that the legend gives the
method. Colours are CSS variables (``--c0`` ...), so that one SVG serves light and dark pages. A page that shows charts
inline holds `COLOURS_CSS` and `CHART_CSS`; `alone` makes a file of a chart, with both and a legend inside.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
COLOURS = 7
LEGEND_ROW, LETTER = 20, 6.6
_MOST = 1e30  # an axis ends here, whatever a broken method gave
BADGE = 8.5

Point = tuple[float, float]

LIGHT = """--page: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --onc: #ffffff;
  --c0: #1b1f24; --c1: #0b6cb3; --c2: #c04d00; --c3: #00785a; --c4: #a83f7c; --c5: #8a6300; --c6: #5a4fcf; --c7: #4d6470;"""
DARK = """--page: #12161b; --ink: #e6eaee; --soft: #a0aab4; --line: #343c45; --onc: #12161b;
  --c0: #e6eaee; --c1: #5db5f0; --c2: #f58a42; --c3: #3fcf9f; --c4: #eb8fc4; --c5: #e6b84a; --c6: #a9a0ff; --c7: #a9bcc7;"""
COLOURS_CSS = Markup(f""":root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}""")
"""The colours, light and dark, as variables."""
CHART_CSS = Markup(""".tick { fill: var(--soft); font-size: 11px; }
.axis { fill: var(--ink); font-size: 12px; } .name { fill: var(--ink); font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; }
.full { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.frontier { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.leader { stroke: currentColor; stroke-width: 1; opacity: .7; }
.dot { fill: currentColor; }
.bound { fill: var(--line); fill-opacity: .5; stroke: var(--soft); stroke-width: 1; }
.badge { fill: currentColor; stroke: var(--page); stroke-width: 1; }
.number { fill: var(--onc); font-size: 10px; font-weight: 700; }""")
"""What the classes of a chart look like."""
ALONE_CSS = Markup("""text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.page { fill: var(--page); } .title { fill: var(--ink); font-size: 13px; font-weight: 600; }""")


@dataclass(frozen=True)
class Series:
    """A method's points, already in data units. number: its badge. text: its name, for readers that do not see."""

    number: int
    text: str
    points: Sequence[Point]


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element; children and attribute values are escaped unless they are `Markup`. ``class_`` is ``class``."""
    given = {k.rstrip("_").replace("_", "-"): escape(_short(v)) for k, v in attributes.items() if v is not None}
    parts = "".join(f' {key}="{value}"' for key, value in given.items())
    return Markup(f"<{name}{parts}>{''.join(str(escape(c)) for c in children)}</{name}>")


def _short(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


# -- axes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Data to pixels. log: base 10. floor: smaller values (zero as well) are drawn at it. height: of the chart."""

    low: float
    high: float
    log: bool = False
    vertical: bool = False
    floor: float | None = None
    height: int = HEIGHT

    @classmethod
    def over(
        cls, values: Sequence[float], *, log: bool = False, vertical: bool = False, floor: float | None = None,
        zero: bool = False, least: float | None = None, height: int = HEIGHT,
    ) -> Axis:  # fmt: skip
        """An axis that shows all values with some air; zero: it starts at 0; least: it reaches at least so far."""
        finite = [min(v if floor is None else max(v, floor), _MOST) for v in values if math.isfinite(v)]
        finite = [v for v in finite if v > 0 or not log] or [1.0]
        if least is not None:
            finite.append(least)
        low, high = min(finite), max(finite)
        if log:
            a, b = math.log10(low), math.log10(high)
            air = max(0.08 * (b - a), 0.12)
            return cls(10 ** (a - air), 10 ** (b + air), True, vertical, floor, height)
        air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(0.0 if zero else low - air, high + air, False, vertical, floor, height)

    def __call__(self, value: float) -> float:
        """The pixel of a value (clamped to the frame)."""
        if self.floor is not None:
            value = max(value, self.floor)
        value = min(max(value, self.low), self.high)
        a, b = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - a) / (b - a)
        if self.vertical:
            return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> list[float]:
        """Round values, three to seven of them."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [m * 10.0**e for e in range(first, last + 1) for m in marks if low <= m * 10.0**e <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return _linear_ticks(low, high)


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    scale = 10 ** math.floor(math.log10(raw))
    steps = [m * scale for m in (0.5, 1, 2, 2.5, 5, 10)]
    at = next(i for i, step in enumerate(steps) if i and step >= raw)
    found = _steps(low, high, steps[at])
    return found if len(found) >= 3 else _steps(low, high, steps[at - 1])


def _steps(low: float, high: float, step: float) -> list[float]:
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


def plain_number(x: float) -> str:
    """A tick's text."""
    if x and (abs(x) < 1e-3 or abs(x) >= 1e5):
        return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{x:.10g}"


def thousands(x: float) -> str:
    """A large count as a tick's text: 200k, 3M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= scale:
            return f"{x / scale:.4g}{unit}"
    return f"{x:.4g}"


def per_cent(x: float) -> str:
    """A share as a tick's text."""
    return f"{100 * x:.10g}%"


def _frame(
    x: Axis, y: Axis, x_text: str, y_text: str, x_ticks: Sequence[float], x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> list[Markup]:  # fmt: skip
    out, bottom = [], y.height - BOTTOM
    for v in y.ticks():
        at = y(v)
        out.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        mark = "≤" if y.floor is not None and v <= y.floor else ""
        out.append(tag("text", mark + y_format(v), class_="tick", x=LEFT - 6, y=at + 4, text_anchor="end"))
    for v in x_ticks:
        at = x(v)
        out.append(tag("line", class_="grid", x1=at, x2=at, y1=TOP, y2=bottom))
        out.append(tag("text", x_format(v), class_="tick", x=at, y=bottom + 16, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(tag("text", x_text, class_="axis", x=middle, y=y.height - 6, text_anchor="middle"))
    half = (TOP + bottom) / 2
    turn = f"rotate(-90 11 {half:.0f})"
    out.append(tag("text", y_text, class_="axis", x=11, y=half, text_anchor="middle", transform=turn))
    return out


def _svg(title: str, says: str, *children: Any, height: int = HEIGHT) -> Markup:
    return tag(
        "svg", tag("title", title), tag("desc", says), *children,
        viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=f"{title}. {says}", class_="chart",
    )  # fmt: skip


def _colour(number: int) -> str:
    return "c0" if number == 0 else f"c{1 + (number - 1) % COLOURS}"


def badge(number: int) -> Markup:
    """A method's badge by itself, for the legend."""
    circle = tag("circle", cx=10, cy=10, r=BADGE, class_="badge")
    text = tag("text", number, x=10, y=13.5, text_anchor="middle", class_="number")
    return tag(
        "svg",
        circle,
        text,
        viewBox="0 0 20 20",
        width=20,
        height=20,
        class_=f"key {_colour(number)}",
        aria_hidden="true",
    )


def _badges(
    wanted: Sequence[tuple[int, str, Point]],
    only_vertical: bool = False,
    off: Sequence[Point] = (),
    height: int = HEIGHT,
) -> list[Markup]:
    """Badges near their points, pushed apart until none hides another or a point (one of `off` neither), each tied to its
    point by a line.
    """
    points = [p for _, _, p in wanted]
    places = _beside(points, height) if only_vertical else _around(points, [*points, *off], height)
    under, over = [], []
    for (number, text, (px, py)), (bx, by) in zip(wanted, places, strict=True):
        line = tag("line", class_="leader", x1=px, y1=py, x2=bx, y2=by)
        dot = tag("circle", class_="dot", cx=px, cy=py, r=3.2)
        under.append(tag("g", line, dot, class_=_colour(number)))
        over.append(tag("g", tag("title", text), *_numbered(number, bx, by), class_=_colour(number)))
    return under + over


def _numbered(number: int, x: float, y: float) -> tuple[Markup, Markup]:
    circle = tag("circle", class_="badge", cx=x, cy=y, r=BADGE)
    return circle, tag("text", number, class_="number", x=x, y=y + 3.5, text_anchor="middle")


def _beside(points: Sequence[Point], height: int) -> list[list[float]]:
    """Places right of the points, in their order from top to bottom, as far apart as the frame allows."""
    low, high = BADGE + 1, height - BOTTOM - BADGE
    gap = min(2 * BADGE + 1.5, (high - low) / max(1, len(points) - 1))
    order = sorted(range(len(points)), key=lambda i: (points[i][1], i))
    places = [[p[0] + 13.0, min(high, max(low, p[1]))] for p in points]
    for above, i in itertools.pairwise(order):
        places[i][1] = max(places[i][1], places[above][1] + gap)
    end = high
    for i in reversed(order):
        places[i][1] = min(places[i][1], end)
        end = places[i][1] - gap
    return places


def _around(points: Sequence[Point], off: Sequence[Point], height: int) -> list[list[float]]:
    """Places near the points, pushed off each other and off `off`, within the frame."""
    places = [[round(p[0] + (3 if i % 2 else -3), 1), round(p[1] - 14.0, 1)] for i, p in enumerate(points)]
    off = [(round(x, 1), round(y, 1)) for x, y in off]  # so that no machine's last digit moves a badge
    for _ in range(600 if len(points) <= 32 else 100):
        moved = _push_apart(places)
        moved = _push_off(places, off) or moved
        for place in places:
            place[0] = min(WIDTH - BADGE - 1, max(LEFT + BADGE, place[0]))
            place[1] = min(height - BOTTOM - BADGE, max(BADGE + 1, place[1]))
        if not moved:
            break
    return places


def _push_apart(places: list[list[float]]) -> bool:
    """One round of pushing badges off each other; whether any had to move."""
    gap, moved = 2 * BADGE + 1.5, False
    for i in range(len(places)):
        for j in range(i):
            dx, dy = places[i][0] - places[j][0], places[i][1] - places[j][1]
            far = math.hypot(dx, dy)
            if far >= gap:
                continue
            moved, push = True, (gap - far) / 2 + 0.1
            ux, uy = (dx / far, dy / far) if far > 1e-6 else (math.cos(i), math.sin(i))
            for place, sign in ((places[i], 1), (places[j], -1)):
                place[0] += sign * ux * push
                place[1] += sign * uy * push
    return moved


def _push_off(places: list[list[float]], points: Sequence[Point]) -> bool:
    """One round of pushing badges off points, their own included."""
    gap, moved = BADGE + 4.0, False
    for i, place in enumerate(places):
        for x, y in points:
            dx, dy = place[0] - x, place[1] - y
            far = math.hypot(dx, dy)
            if far >= gap:
                continue
            moved, push = True, gap - far + 0.1
            ux, uy = (dx / far, dy / far) if far > 1e-6 else (math.cos(i), math.sin(i))
            place[0] += ux * push
            place[1] += uy * push
    return moved


# -- the charts -------------------------------------------------------------------------------------------------------


def frontier(
    title: str, series: Sequence[Series], x_text: str, y_text: str, *, floor: float | None = None, y_log: bool = True
) -> Markup:
    """Cost (share of full) against quality loss, one point a method; the line joins what nothing else beats on both."""
    points = [(s, s.points[0]) for s in series if s.points]
    xs, ys = [p[0] for _, p in points], [p[1] for _, p in points]
    x = Axis.over(xs, zero=True, least=1.0)
    y = Axis.over(ys, log=y_log, vertical=True, floor=floor)
    steps = _frontier([p for _, p in points], x, y)
    said = [f"{s.text}: {per_cent(round(p[0], 3))}, {plain_number(float(f'{p[1]:.3g}'))}" for s, p in points]
    whole = tag("line", class_="full", x1=x(1.0), x2=x(1.0), y1=TOP, y2=HEIGHT - BOTTOM)
    badges = _badges([(s.number, t, (x(p[0]), y(p[1]))) for (s, p), t in zip(points, said, strict=True)])
    frame = _frame(x, y, x_text, y_text, x.ticks(), per_cent, plain_number)
    return _svg(title, "; ".join(said), *frame, whole, steps, *badges)


def _stairs(points: Sequence[Point]) -> list[Point]:
    out: list[Point] = []
    for p in points:
        if out:
            out.append((p[0], out[-1][1]))
        out.append(p)
    return out


def _frontier(points: Sequence[Point], x: Axis, y: Axis, more: bool = False) -> Markup:
    """The line that joins what nothing else beats on both counts: small y, and small x (or large x where more is better)."""
    best: list[Point] = []
    for p in sorted(set(points), key=lambda p: (-p[0] if more else p[0], p[1])):
        if not best or p[1] < best[-1][1]:
            best.append(p)
    steps = " ".join(f"{'L' if i else 'M'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(_stairs(best)))
    return tag("path", d=steps, class_="frontier")


def curves(
    title: str, series: Sequence[Series], x_text: str, y_text: str, *, x_log: bool = False, y_log: bool = False,
    floor: float | None = None, x_format: Callable[[float], str] = plain_number,
    y_format: Callable[[float], str] = plain_number, zero: bool = False, x_ticks: Sequence[float] | None = None,
    marks: bool = True, around: bool = False, best: Literal["less", "more"] | None = None, x_mark: float | None = None,
    height: int = HEIGHT,
) -> Markup:  # fmt: skip
    """One line a series, its badge at the right end, or (around) near its last point wherever there is room.

    best: a dashed line joins the points that no other one beats, small y and less or more of x. x_mark: a dotted line.
    """
    drawn = [s for s in series if s.points]
    every = [p for s in drawn for p in s.points]
    x = Axis.over([p[0] for p in every] + ([] if x_mark is None else [x_mark]), log=x_log)
    if not around:
        x = Axis(x.low, x.high * (x.high / x.low) ** 0.1 if x_log else x.high + 0.1 * (x.high - x.low), x_log)
    y = Axis.over([p[1] for p in every], log=y_log, vertical=True, floor=floor, zero=zero, height=height)
    lines: list[Any] = []
    if x_mark is not None:
        lines.append(tag("line", class_="full", x1=x(x_mark), x2=x(x_mark), y1=TOP, y2=height - BOTTOM))
    if best:
        lines.append(_frontier(every, x, y, best == "more"))
    ends, off = [], []
    for s in drawn:
        places = [(x(a), y(b)) for a, b in s.points]
        path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        dots = [tag("circle", class_="dot", cx=a, cy=b, r=2.6) for a, b in places] if marks else []
        lines.append(
            tag("g", tag("title", s.text), tag("path", d=path, class_="line"), *dots, class_=_colour(s.number))
        )
        ends.append((s.number, s.text, places[-1]))
        off += places[:-1]
    said = [f"{s.text}: " + ", ".join(plain_number(float(f"{b:.3g}")) for _, b in _some(s.points)) for s in drawn]
    ticks = x.ticks() if x_ticks is None else x_ticks
    frame = _frame(x, y, x_text, y_text, ticks, x_format, y_format)
    badges = _badges(ends, only_vertical=not around, off=off if around else (), height=height)
    return _svg(title, "; ".join(said), *frame, *lines, *badges, height=height)


def alone(title: str, chart: Markup, names: Sequence[tuple[int, str]], height: int = HEIGHT) -> str:
    """A chart of that height as a file of its own: its title above, the legend of (number, name) below, light and dark."""
    top = 26
    longest = max((len(name) for _, name in names), default=1)
    columns = max(1, min(3, int((WIDTH - 8) / (2 * BADGE + 12 + LETTER * longest))))
    rows = math.ceil(len(names) / columns)
    legend = []
    for i, (number, name) in enumerate(names):
        column, row = divmod(i, rows)
        cx, cy = 4 + BADGE + column * (WIDTH - 8) / columns, top + height + 8 + BADGE + row * LEGEND_ROW
        text = tag("text", name, class_="name", x=cx + BADGE + 5, y=cy + 4)
        legend.append(tag("g", *_numbered(number, cx, cy), text, class_=_colour(number)))
    whole = top + height + 12 + rows * LEGEND_ROW
    says = re.search(r'aria-label="([^"]*)"', chart)
    inner = re.sub(r' (role|aria-label)="[^"]*"', "", str(chart))
    inner = inner.replace("<svg ", f'<svg y="{top}" width="{WIDTH}" height="{height}" ', 1)
    style = tag("style", COLOURS_CSS, "\n", CHART_CSS, "\n", ALONE_CSS)
    page = tag("rect", class_="page", width=WIDTH, height=whole, rx=6)
    head = tag("text", title, class_="title", x=8, y=18)
    return str(tag(
        "svg", style, page, head, Markup(inner), *legend, xmlns="http://www.w3.org/2000/svg", role="img",
        viewBox=f"0 0 {WIDTH} {whole}", width=WIDTH * 5 // 3, height=whole * 5 // 3, aria_label=Markup(says[1] if says else ""),
    )).replace("><", ">\n<") + "\n"  # fmt: skip


def _some(points: Sequence[Point]) -> Sequence[Point]:
    return points if len(points) <= 6 else [points[0], points[len(points) // 2], points[-1]]


def bars(title: str, rows: Sequence[tuple[str, float, float | None]]) -> tuple[Markup, int]:
    """Ratios as bars, each in the outline of its bound: (name, ratio, bound). The chart, and its height."""
    left, high, top = 8, 34, 4
    width, height = WIDTH - 2 * left, top + high * len(rows) + 20
    most = max(max(value, bound or 0.0) for _, value, bound in rows)
    one, out = left + width / most, list[Any]()
    for i, (name, value, bound) in enumerate(rows):
        y = top + high * i
        says = f"{value:.2f}×" + ("" if bound is None else f" of {bound:.2f}×")
        out.append(tag("text", name, class_="name", x=left, y=y + 12))
        out.append(tag("text", says, class_="name", x=WIDTH - left, y=y + 12, text_anchor="end"))
        if bound is not None:
            out.append(tag("rect", class_="bound", x=left, y=y + 17, width=width * bound / most, height=11, rx=2))
        out.append(tag("rect", class_="dot c1", x=left, y=y + 17, width=width * value / most, height=11, rx=2))
        out.append(tag("line", class_="full", x1=one, x2=one, y1=y + 15, y2=y + 30))
    out.append(tag("text", "1×", class_="tick", x=one, y=height - 4, text_anchor="middle"))
    said = "; ".join(f"{n}: {v:.2f}" + ("" if b is None else f", bound {b:.2f}") for n, v, b in rows)
    return _svg(title, said, *out, height=height), height


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[int, int], tuple[float, str, str]]
) -> Markup:
    """A small map. cells: (row, column) -> share 0..1 (its darkness), the text in the cell, and what it says in words."""
    wide, high, left, top = 46, 24, 40, 4
    width, height = left + wide * len(columns) + 2, top + high * len(rows) + 18
    out: list[Any] = []
    for i, text in enumerate(rows):
        out.append(tag("text", text, class_="tick", x=left - 5, y=top + high * i + 16, text_anchor="end"))
    for j, text in enumerate(columns):
        out.append(tag("text", text, class_="tick", x=left + wide * (j + 0.5), y=height - 4, text_anchor="middle"))
    for (i, j), (share, text, words) in sorted(cells.items()):
        x, y = left + wide * j, top + high * i
        box = tag("rect", x=x + 1, y=y + 1, width=wide - 2, height=high - 2, rx=3, class_="cell")
        fill = tag(
            "rect", x=x + 1, y=y + 1, width=wide - 2, height=high - 2, rx=3, class_="heat", fill_opacity=0.9 * share
        )
        ink = "on" if share > 0.55 else "off"
        label = tag("text", text, x=x + wide / 2, y=y + 16, text_anchor="middle", class_=f"value {ink}")
        out.append(tag("g", tag("title", words), box, fill, label))
    said = "; ".join(words for _, (_, _, words) in sorted(cells.items()))
    return tag(
        "svg", tag("title", title), *out, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        aria_label=f"{title}: {said}", class_="map",
    )  # fmt: skip
