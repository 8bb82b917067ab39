"""A profile as a Perfetto trace and as a picture: a track for every worker, a slice for every task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from jax_mpk.inspect.profile import Profile

STAGES = ("prologue", "core", "epilogue")
FILL = {"rows": "#7fb069", "contract": "#5b8def", "attention": "#f2994a", "sort": "#d9b310", "scan": "#9b6dd7"}
"""By the kind of task; a prologue is lighter, an epilogue darker."""
WIDTH, LINE, LEFT, TOP = 1600, 7, 60, 74


def trace(x: Profile) -> str:
    """The trace event format of Chrome, which Perfetto reads: times in us, a thread a worker, stages inside of tasks."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"{x.name} ({x.platform})"}}
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": w, "args": {"name": f"worker {w}"}}
        for w in range(x.workers)
    ]
    for n in range(len(x.op)):
        op, (begin, *_, end) = x.operators[x.op[n]], x.at[n].tolist()
        here = {"pid": 0, "tid": int(x.worker[n])}
        args = {"operator": op.name, "index": int(x.index[n]), "part": int(x.part[n]), "where": op.where,
                "wait us": round(float(x.wait[n]), 3), "hop us": round(float(x.hop[n]), 3)}  # fmt: skip
        events.append(
            {"ph": "X", "name": op.name, "cat": op.kind, "ts": begin, "dur": end - begin, "args": args, **here}
        )
        for s, stage in enumerate(STAGES):
            lo, hi = x.at[n, s : s + 2].tolist()
            if hi > lo and (lo, hi) != (begin, end):
                events.append({"ph": "X", "name": stage, "cat": "stage", "ts": lo, "dur": hi - lo, **here})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})


def svg(x: Profile) -> str:
    """A line a worker, time to the right; hover for the task."""
    height, per = TOP + x.workers * LINE + 30, (WIDTH - LEFT - 20) / max(x.total, 1e-9)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">',
        "<style>g rect:hover{stroke:#000;stroke-width:.6}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="15" font-weight="bold">{escape(x.name)}: {x.total:.1f} us on {escape(x.platform)}</text>',
    ]
    kinds = dict.fromkeys(op.kind for op in x.operators if op.kind in FILL)
    for n, kind in enumerate(kinds):
        out.append(f'<rect x="{16 + 110 * n}" y="38" width="12" height="12" fill="{FILL[kind]}"/>')
        out.append(f'<text x="{33 + 110 * n}" y="48">{kind}</text>')
    for t in _ticks(x.total):
        at = LEFT + t * per
        out.append(f'<path d="M{at:.1f} {TOP - 6}V{height - 24}" stroke="#ddd"/>')
        out.append(f'<text x="{at:.1f}" y="{TOP - 9}" font-size="10" fill="#777" text-anchor="middle">{t:g}</text>')
    step = max(1, 16 // LINE + 1)
    for w in range(0, x.workers, step):
        out.append(
            f'<text x="{LEFT - 6}" y="{TOP + (w + 0.85) * LINE:.1f}" font-size="9" fill="#777" text-anchor="end">{w}</text>'
        )
    for n in range(len(x.op)):
        op, times = x.operators[x.op[n]], x.at[n].tolist()
        tip = f"{op.name}[{x.index[n]}] {times[0]:.2f} to {times[3]:.2f} us, hop {x.hop[n]:.2f} {op.where}"
        y, bars = TOP + float(x.worker[n]) * LINE, []
        for (lo, hi), shade in zip(zip(times, times[1:], strict=False), (0.45, 0.8, 1.0), strict=True):
            if hi > lo:
                bars.append(f'<rect x="{LEFT + lo * per:.2f}" y="{y:.1f}" width="{max((hi - lo) * per, 0.15):.2f}" height="{LINE - 1}" '
                            f'fill="{FILL.get(op.kind, "#999")}" fill-opacity="{shade}"/>')  # fmt: skip
        out.append(f"<g><title>{escape(tip)}</title>{''.join(bars)}</g>")
    return "\n".join([*out, "</svg>", ""])


def _ticks(total: float) -> list[float]:
    """About ten round times from 0 on."""
    step = next(s * 10.0**e for e in range(-3, 9) for s in (1, 2, 5) if s * 10.0**e * 12 >= total)
    return [n * step for n in range(int(total / step) + 1)]
