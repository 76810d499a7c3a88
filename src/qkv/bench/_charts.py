"""Charts as inline SVG: no script, no font, no request. Every text passes `tag`, which escapes it.

A series is told apart by its number as well as by its colour: each badge carries the number that the legend gives the
method. Colours are CSS variables (``--c0`` ...), so that one SVG serves light and dark pages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
COLOURS = 7
_MOST = 1e30  # an axis ends here, whatever a broken method gave
BADGE = 8.5

Point = tuple[float, float]


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
    """Data to pixels. log: base 10. floor: smaller values (zero as well) are drawn at it."""

    low: float
    high: float
    log: bool = False
    vertical: bool = False
    floor: float | None = None

    @classmethod
    def over(
        cls, values: Sequence[float], *, log: bool = False, vertical: bool = False, floor: float | None = None,
        zero: bool = False, least: float | None = None,
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
            return cls(10 ** (a - air), 10 ** (b + air), True, vertical, floor)
        air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(0.0 if zero else low - air, high + air, False, vertical, floor)

    def __call__(self, value: float) -> float:
        """The pixel of a value (clamped to the frame)."""
        if self.floor is not None:
            value = max(value, self.floor)
        value = min(max(value, self.low), self.high)
        a, b = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - a) / (b - a)
        if self.vertical:
            return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
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
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw)
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


def plain_number(x: float) -> str:
    """A tick's text."""
    if x and (abs(x) < 1e-3 or abs(x) >= 1e5):
        return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{x:.10g}"


def per_cent(x: float) -> str:
    """A share as a tick's text."""
    return f"{100 * x:.10g}%"


def _frame(
    x: Axis, y: Axis, x_text: str, y_text: str, x_ticks: Sequence[float], x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> list[Markup]:  # fmt: skip
    out = []
    for v in y.ticks():
        at = y(v)
        out.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        mark = "≤" if y.floor is not None and v <= y.floor else ""
        out.append(tag("text", mark + y_format(v), class_="tick", x=LEFT - 6, y=at + 4, text_anchor="end"))
    for v in x_ticks:
        at = x(v)
        out.append(tag("line", class_="grid", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM))
        out.append(tag("text", x_format(v), class_="tick", x=at, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(tag("text", x_text, class_="axis", x=middle, y=HEIGHT - 6, text_anchor="middle"))
    half = (TOP + HEIGHT - BOTTOM) / 2
    turn = f"rotate(-90 11 {half:.0f})"
    out.append(tag("text", y_text, class_="axis", x=11, y=half, text_anchor="middle", transform=turn))
    return out


def _svg(title: str, says: str, *children: Any) -> Markup:
    return tag(
        "svg", tag("title", title), tag("desc", says), *children,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {says}", class_="chart",
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


def _badges(wanted: Sequence[tuple[int, str, Point]], only_vertical: bool = False) -> list[Markup]:
    """Badges near their points, pushed apart until none hides another or a point, each tied to its point by a line."""
    points = [p for _, _, p in wanted]
    places = _beside(points) if only_vertical else _around(points)
    under, over = [], []
    for (number, text, (px, py)), (bx, by) in zip(wanted, places, strict=True):
        line = tag("line", class_="leader", x1=px, y1=py, x2=bx, y2=by)
        dot = tag("circle", class_="dot", cx=px, cy=py, r=3.2)
        under.append(tag("g", line, dot, class_=_colour(number)))
        circle = tag("circle", class_="badge", cx=bx, cy=by, r=BADGE)
        name = tag("text", number, class_="number", x=bx, y=by + 3.5, text_anchor="middle")
        over.append(tag("g", tag("title", text), circle, name, class_=_colour(number)))
    return under + over


def _beside(points: Sequence[Point]) -> list[list[float]]:
    """Places right of the points, in their order from top to bottom, as far apart as the frame allows."""
    low, high = BADGE + 1, HEIGHT - BOTTOM - BADGE
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


def _around(points: Sequence[Point]) -> list[list[float]]:
    """Places near the points, pushed off each other and off all points, within the frame."""
    places = [[p[0] + (3 if i % 2 else -3), p[1] - 14.0] for i, p in enumerate(points)]
    for _ in range(600 if len(points) <= 16 else 100):
        moved = _push_apart(places)
        moved = _push_off(places, points) or moved
        for place in places:
            place[0] = min(WIDTH - BADGE - 1, max(LEFT + BADGE, place[0]))
            place[1] = min(HEIGHT - BOTTOM - BADGE, max(BADGE + 1, place[1]))
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
    best: list[Point] = []
    for p in sorted({p for _, p in points}):
        if not best or p[1] < best[-1][1]:
            best.append(p)
    steps = " ".join(f"{'L' if i else 'M'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(_stairs(best)))
    said = [f"{s.text}: {per_cent(round(p[0], 3))}, {plain_number(float(f'{p[1]:.3g}'))}" for s, p in points]
    whole = tag("line", class_="full", x1=x(1.0), x2=x(1.0), y1=TOP, y2=HEIGHT - BOTTOM)
    badges = _badges([(s.number, t, (x(p[0]), y(p[1]))) for (s, p), t in zip(points, said, strict=True)])
    frame = _frame(x, y, x_text, y_text, x.ticks(), per_cent, plain_number)
    return _svg(title, "; ".join(said), *frame, whole, tag("path", d=steps, class_="frontier"), *badges)


def _stairs(points: Sequence[Point]) -> list[Point]:
    out: list[Point] = []
    for p in points:
        if out:
            out.append((p[0], out[-1][1]))
        out.append(p)
    return out


def curves(
    title: str, series: Sequence[Series], x_text: str, y_text: str, *, x_log: bool = False, y_log: bool = False,
    floor: float | None = None, y_format: Callable[[float], str] = plain_number, zero: bool = False,
    x_ticks: Sequence[float] | None = None, marks: bool = True,
) -> Markup:  # fmt: skip
    """One line a method, its badge at the right end."""
    drawn = [s for s in series if s.points]
    x = Axis.over([p[0] for s in drawn for p in s.points], log=x_log)
    x = Axis(x.low, x.high * (x.high / x.low) ** 0.1 if x_log else x.high + 0.1 * (x.high - x.low), x_log)
    y = Axis.over([p[1] for s in drawn for p in s.points], log=y_log, vertical=True, floor=floor, zero=zero)
    lines: list[Any] = []
    ends = []
    for s in drawn:
        places = [(x(a), y(b)) for a, b in s.points]
        path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
        dots = [tag("circle", class_="dot", cx=a, cy=b, r=2.6) for a, b in places] if marks else []
        lines.append(
            tag("g", tag("title", s.text), tag("path", d=path, class_="line"), *dots, class_=_colour(s.number))
        )
        ends.append((s.number, s.text, places[-1]))
    said = [f"{s.text}: " + ", ".join(plain_number(float(f"{b:.3g}")) for _, b in _some(s.points)) for s in drawn]
    ticks = x.ticks() if x_ticks is None else x_ticks
    frame = _frame(x, y, x_text, y_text, ticks, plain_number, y_format)
    return _svg(title, "; ".join(said), *frame, *lines, *_badges(ends, only_vertical=True))


def _some(points: Sequence[Point]) -> Sequence[Point]:
    return points if len(points) <= 6 else [points[0], points[len(points) // 2], points[-1]]


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
