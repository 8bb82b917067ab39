"""`explain`: a compiled function in words, hop by hop, with what makes each operator wait."""

from __future__ import annotations

from jax_mpk.compiler import Compiled
from jax_mpk.errors import plural
from jax_mpk.inspect import hops
from jax_mpk.inspect.cost import cost
from jax_mpk.inspect.text import size


def explain(compiled: Compiled) -> str:
    """Totals, then every hop: its operators with tasks, bytes and source line, and for each the input it waits for.

    An operator is listed at the first hop that its inputs allow; one marked `*` is on a longest path.
    """
    tg, graph = compiled.stages["events"], compiled.stages["refine"]
    final, target = compiled.stages["memory"], compiled.target
    links = hops.edges(tg)
    level = hops.levels(tg, links)
    depth = max(level, default=0)
    costs = cost(graph, tg)
    critical = _critical(level, links, depth)
    passes = ", ".join(f"{name} {1000 * t:.0f} ms" for name, t in compiled.times.items())
    program = len(compiled.program or b"")
    lines = [
        f"{compiled.name} for {target.name}: {len(tg.grids)} operators in {depth} hops, {final.tasks} tasks, "
        + f"{final.events} events, {final.workers} workers planned",
        f"reads {size(costs.read)}B ({size(costs.stream)}B of them constant during the call), "
        + f"writes {size(costs.written)}B, {size(costs.flops)} flops; "
        + f"workspace {size(final.workspace)}B, program {size(program)}B",
        str(compiled.stages["verify"]),
        f"compiled in {sum(compiled.times.values()):.3f} s: {passes}",
    ]
    for hop in range(1, depth + 1):
        lines.append(f"hop {hop}")
        for n, g in enumerate(tg.grids):
            if level[n] != hop:
                continue
            c = costs.ops[n]
            mark = "*" if n in critical else " "
            lines.append(f"  {mark} {g.name}: {g.kind} in {plural(g.count, 'task')}, reads {size(c.read)}B, "
                         f"writes {size(c.written)}B  # {g.source}")  # fmt: skip
            for e in links:
                if e.consumer == n and level[e.producer] == hop - 1:
                    lines.append(f"      waits for {tg.grids[e.producer].name}: {e.why} ({plural(e.events, 'event')})")
    return "\n".join(lines)


def _critical(level: list[int], links: list[hops.Edge], depth: int) -> set[int]:
    """The grids on some longest path."""
    out = {n for n, x in enumerate(level) if x == depth}
    for hop in range(depth, 1, -1):
        out |= {
            e.producer for e in links if e.consumer in out and level[e.consumer] == hop and level[e.producer] == hop - 1
        }
    return out
