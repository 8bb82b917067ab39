"""`draw`: a task graph as SVG. One box a grid, one row a hop, one curve for the events between two grids."""

from __future__ import annotations

from xml.sax.saxutils import escape

from jax_mpk.inspect import hops
from jax_mpk.inspect.cost import plural
from jax_mpk.ir.tasks import TaskGraph

BOX, HEIGHT, GAP, ROW, MARGIN = 210, 52, 28, 118, 70
FILL = {"contract": "#dbe9ff", "attention": "#ffe3c9", "map": "#e6f4e1", "update": "#f3e4f7", "sort": "#fff6c9"}


def draw(tg: TaskGraph, name: str) -> str:
    """The drawing of a task graph that has its events. Boxes are coloured by kind; hover for the source line."""
    links = [e for e in hops.edges(tg) if e.producer != e.consumer]
    level = hops.levels(tg, links)
    place = _places(level, links)
    wide = max((len(r) for r in _rows(level)), default=1)
    width = 2 * MARGIN + wide * (BOX + GAP)
    height = MARGIN + 20 + max(level, default=0) * ROW
    frame = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} font-family="Helvetica, Arial, sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0 0L8 4L0 8z" fill="#5b6b82"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="16" y="28" font-size="15" font-weight="bold">{escape(name)}</text>',
        f'<text x="16" y="46" fill="#555">{tg.tasks} tasks, {tg.events} events, {max(level, default=0)} hops</text>',
    ]

    def corner(n: int) -> tuple[float, float]:
        return MARGIN + place[n] * (BOX + GAP) + GAP / 2, MARGIN + (level[n] - 1) * ROW

    for hop in range(1, max(level, default=0) + 1):
        y = MARGIN + (hop - 1) * ROW + HEIGHT / 2 + 4
        out.append(f'<text x="16" y="{y:.0f}" fill="#999">hop {hop}</text>')
    labels = []
    lanes: dict[int, int] = {}
    for e in links:
        (x0, y0), (x1, y1) = corner(e.producer), corner(e.consumer)
        x0, y0, x1 = x0 + BOX / 2, y0 + HEIGHT, x1 + BOX / 2
        between = [corner(n)[0] + BOX for n in range(len(level)) if level[e.producer] < level[n] < level[e.consumer]]
        if between:  # around the boxes between, each such edge into a row in a lane of its own
            x0, x1 = x0 + BOX * 0.3, x1 + BOX * 0.4
            lane = max(between) + 14 + 9 * lanes.setdefault(level[e.consumer], 0)
            lanes[level[e.consumer]] += 1
            path = (
                f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + 30:.0f} {lane:.0f} {y0 + 20:.0f} {lane:.0f} {y0 + 66:.0f}"
                f"V{y1 - 66:.0f}C{lane:.0f} {y1 - 20:.0f} {x1:.0f} {y1 - 36:.0f} {x1:.0f} {y1 - 1:.0f}"
            )
            labels.append(_label(lane + 3, y1 - 70, str(e.events)))
        else:
            bend = (y1 - y0) * 0.45
            path = f"M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1 - 1:.0f}"
            labels.append(_label(x0 + 0.35 * (x1 - x0) + 4, y0 + 0.4 * (y1 - y0), str(e.events)))
        tip = escape(f"{tg.grids[e.consumer].name} {e.why}")
        dash = 'stroke-width="1" stroke-dasharray="5 4"' if between else 'stroke-width="1.5"'
        out.append(
            f'<path d="{path}" fill="none" stroke="#5b6b82" {dash} marker-end="url(#tip)"><title>{tip}</title></path>'
        )
    for n, g in enumerate(tg.grids):
        x, y = corner(n)
        axes = " × ".join(f"{a}/{t}" if t < a else str(a) for a, t in zip(g.extent, g.tile, strict=True) if a > 1)
        what = escape(_short(f"{g.kind} {axes}", 30))
        out.append(
            f'<g><title>{escape(g.source)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="7" '
            f'fill="{FILL.get(g.kind, "#eee")}" stroke="#8795aa"/>'
            f'<text x="{x + 10:.0f}" y="{y + 17:.0f}" font-weight="bold">{escape(_short(g.name, 20))}</text>'
            f'<text x="{x + BOX - 10:.0f}" y="{y + 17:.0f}" text-anchor="end">{plural(g.count, "task")}</text>'
            f'<text x="{x + 10:.0f}" y="{y + 32:.0f}" fill="#444" font-size="11">{what}</text>'
            f'<text x="{x + 10:.0f}" y="{y + 45:.0f}" fill="#777" font-size="10">{escape(_where(g.source))}</text></g>'
        )
    return "\n".join([*out, *labels, "</svg>", ""])


def _rows(level: list[int]) -> list[list[int]]:
    return [[n for n, x in enumerate(level) if x == hop] for hop in range(1, max(level, default=0) + 1)]


def _places(level: list[int], links: list[hops.Edge]) -> dict[int, float]:
    """Horizontal positions in boxes: each row centred, ordered by where its producers are."""
    rows = _rows(level)
    wide = max((len(r) for r in rows), default=1)
    place: dict[int, float] = {}
    for row in rows:

        def wish(n: int) -> float:
            known = [place[e.producer] for e in links if e.consumer == n and e.producer in place]
            return sum(known) / len(known) if known else n

        for i, n in enumerate(sorted(row, key=lambda n: (wish(n), n))):
            place[n] = i + (wide - len(row)) / 2
    return place


def _label(x: float, y: float, text: str) -> str:
    return (f'<text x="{x:.0f}" y="{y:.0f}" font-size="10" fill="#334" stroke="white" stroke-width="3" '
            f'paint-order="stroke">{escape(text)}</text>')  # fmt: skip


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _where(source: str) -> str:
    """`add at /a/b/model.py:17 (f)` as `add model.py:17`."""
    primitive, _, place = source.partition(" at ")
    return _short(f"{primitive} {place.split(' (')[0].rsplit('/', 1)[-1]}".strip(), 36)
