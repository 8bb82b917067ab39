"""Golden tests: the text of an op graph, and what a pass makes of it.

A case is a file `tests/golden/<pass>/<name>.txt`: comments that say what it shows, `target: NAME` if that matters, a graph
(see `jax_mpk.ir.parse`), a line `---`, and what the pass gives: a graph, or the codes that `emit` prints for it.

    python -m tests.golden             says which cases differ, and how
    python -m tests.golden --update    writes what the passes give (or of some cases: --update fuse/residual ...)

A new case is a file that ends with its line `---`: write it, update it, and read what was written.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from jax_mpk import abi, compiler, device
from jax_mpk.compiler import Unit
from jax_mpk.inspect.dump import listing
from jax_mpk.ir.graph import Graph, check
from jax_mpk.ir.parse import parse

ROOT = Path(__file__).parent
TARGETS = {"cpu": device.CPU, "h100": device.H100}
PASSES = tuple(p.name for p in compiler.PASSES if p.produces == "graph" and p.name != compiler.PASSES[0].name)
"""The passes from graph to graph."""
CASES = sorted(f"{p.parent.name}/{p.stem}" for p in ROOT.glob("*/*.txt"))


def path(case: str) -> Path:
    return ROOT / f"{case}.txt"


def read(case: str) -> tuple[str, str]:
    """The upper part of a case, which ends with `---`, and the text that is expected."""
    upper, line, expected = path(case).read_text().partition("\n---\n")
    if not line:
        raise ValueError(f"{path(case)} has no line '---'")
    return f"{upper}\n---", expected


_TARGET = re.compile(r"^target: (\w+)$", re.MULTILINE)


def graph(case: str) -> Graph:
    """The graph of a case."""
    text = read(case)[0].removesuffix("---")
    return parse(_TARGET.sub("", text, count=1))  # an empty line stays: errors name the right one


def run(case: str) -> str:
    """What the pass makes of the graph of a case."""
    target = _TARGET.search(read(case)[0])
    unit = Unit("golden", None, TARGETS[target.group(1) if target else "cpu"], graph=graph(case))  # type: ignore[arg-type]
    last = path(case).parent.name
    if last != "emit":
        (one,) = (p for p in compiler.PASSES if p.name == last)
        product = one.run(unit)
        assert isinstance(product, Graph)
        return str(check(product)) + "\n"
    for p in compiler.PASSES:
        unit = replace(unit, **{p.produces: p.run(unit)}) if p.produces in ("tasks", "program") else unit
    return _codes(unit) + "\n"


def _codes(unit: Unit) -> str:
    """Of a program only what is printed from bodies: bytecode with its accesses, or the struct of every operator."""
    program = abi.decode(unit.program)
    if unit.target.gpu:
        source = program["Source"].tobytes().decode()
        return "\n".join(re.findall(r"^struct V\d+ \{\n.*?^\};$", source, re.MULTILINE | re.DOTALL))
    lines = listing(program).splitlines()
    return "\n".join(re.sub(r" params .*", "", x) for x in lines if x.startswith(("op ", "  ")))
