"""Draws the picture, passes as in the code: `python docs/make_architecture.py > docs/architecture.svg`."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from jax_mpk.compiler import PASSES

GREY, BLUE, GREEN, ORANGE, VIOLET = "#eef1f5", "#dbe9ff", "#e6f4e1", "#ffe3c9", "#f3e4f7"


def box(x: int, y: int, w: int, h: int, fill: str, title: str, *lines: str) -> Iterator[str]:
    yield f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="#8795aa"/>'
    yield f'<text x="{x + w / 2}" y="{y + 20}" text-anchor="middle" font-weight="bold">{escape(title)}</text>'
    for n, line in enumerate(lines):
        at = f'x="{x + w / 2}" y="{y + 37 + 15 * n}" text-anchor="middle"'
        yield f'<text {at} font-size="11" fill="#333">{escape(line)}</text>'


def arrow(x0: int, y0: int, x1: int, y1: int, label: str = "") -> Iterator[str]:
    yield f'<path d="M{x0} {y0}L{x1} {y1}" stroke="#5b6b82" stroke-width="1.6" marker-end="url(#tip)"/>'
    if label:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        at = f'x="{x + 8}" y="{y + 4}"' if x0 == x1 else f'x="{x}" y="{y - 8}" text-anchor="middle"'
        yield f'<text {at} font-size="11" fill="#555">{escape(label)}</text>'


def drawing() -> Iterator[str]:
    names = {kind: [p.name for p in PASSES if p.produces == kind] for kind in ("graph", "tasks")}
    graph, tasks = names["graph"], names["tasks"]
    yield '<svg xmlns="http://www.w3.org/2000/svg" width="980" height="516" viewBox="0 0 980 516" '
    yield 'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    yield '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    yield '<path d="M0 0L8 4L0 8z" fill="#5b6b82"/></marker></defs><rect width="980" height="516" fill="white"/>'
    yield from box(
        20, 20, 200, 84, GREY, "fn(*args)", "any Flax or JAX function", "inside jax.jit, scan,", "shard_map, grad, vmap"
    )
    yield from arrow(220, 62, 270, 62)
    yield from box(
        270,
        20,
        200,
        84,
        GREY,
        "jaxpr",
        "trace.py: captured arrays",
        "become operands, forwarded",
        "outputs stay outside",
    )
    yield from arrow(470, 62, 520, 62)
    yield from box(
        520,
        20,
        200,
        84,
        GREY,
        "one primitive",
        "primitive.py: megakernel,",
        "differentiated and batched",
        "through its jaxpr",
    )
    yield '<path d="M620 104V127H245V138" fill="none" stroke="#5b6b82" stroke-width="1.6"/>'
    yield from arrow(245, 138, 245, 150)
    yield '<text x="440" y="121" font-size="11" fill="#555">lowering: compiler.py</text>'
    yield from box(
        20,
        150,
        450,
        88,
        BLUE,
        "op graph (ir/graph.py)",
        "tensors, operators with expressions on their edges",
        "map, update, contract, attention, sort, scan",
        " → ".join(graph),
    )
    yield from box(
        520,
        150,
        440,
        88,
        GREEN,
        "task graph (ir/tasks.py)",
        "boxes of bytes in, events out",
        " → ".join(tasks[:4]) + " →",
        " → ".join(tasks[4:]),
    )
    yield from arrow(470, 194, 520, 194)
    yield from arrow(740, 238, 740, 284)
    yield from box(
        520,
        284,
        440,
        76,
        ORANGE,
        "verify (no code shared with the passes)",
        "order of every conflicting access, no deadlock,",
        "every result byte written once: or it never launches",
    )
    yield from arrow(520, 322, 470, 322)
    yield from box(
        20,
        284,
        450,
        76,
        VIOLET,
        "program: one blob of tables (jax_mpk/abi = ffi/abi.h)",
        "operators, bytecode, tasks, events, weight streams;",
        "an attribute of the XLA custom call, and the unit of caching",
    )
    yield from arrow(130, 360, 130, 412, "CPU")
    yield from arrow(610, 398, 610, 412)
    yield '<path d="M340 360V398H610" fill="none" stroke="#5b6b82" stroke-width="1.6"/>'
    yield '<text x="350" y="391" font-size="11" fill="#555">CUDA</text>'
    yield from box(
        20,
        412,
        450,
        88,
        GREY,
        "CPU executor (ffi/cpu)",
        "prebuilt C++, loaded with the package; no compiler needed",
        "worker threads, vectorised task bodies, fused bytecode",
        "test mode: any legal order from a seed, poisoned buffers",
    )
    yield from box(
        520,
        412,
        440,
        88,
        GREY,
        "CUDA kernel (cuda/, ffi/cuda)",
        "program → source → NVRTC → CUBIN",
        "one block per multiprocessor; consumers, controller,",
        "and a loader that walks the weight stream",
    )
    yield "</svg>"


if __name__ == "__main__":
    print("\n".join(drawing()))
