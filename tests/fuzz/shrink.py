"""The smallest case that fails in the same way: fewer outputs, lines turned into operands, smaller shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.case import FLOATS, Case, Operand, names, tidy

Fails = Callable[[Case], bool]


def shrink(case: Case, fails: Fails, steps: int = 400) -> Case:
    """Greedy: the first simplification that still fails is taken, until none does or `steps` are used up."""
    used = 0
    while used < steps:
        for smaller in _simpler(case):
            used += 1
            if fails(smaller):
                case = smaller
                break
            if used >= steps:
                return case
        else:
            return case
    return case


def _simpler(case: Case) -> Iterator[Case]:
    for o in case.outputs:
        if len(case.outputs) > 1:
            yield tidy(replace(case, outputs=(o,)))
    if case.transform:
        yield replace(case, transform="")
    for n, x in reversed(list(enumerate(case.lines))):  # an earlier line as the result
        if len(case.outputs) == 1 and x.name != case.outputs[0]:
            yield tidy(replace(case, outputs=(x.name,)))
        kind = "normal" if x.dtype in FLOATS else "small"
        fresh = Operand(f"a{900 + n}", x.shape, x.dtype, kind, n)
        rest = tuple(replace(y, text=re.sub(rf"\b{x.name}\b", fresh.name, y.text)) for y in case.lines if y is not x)
        if x.name not in case.outputs:
            yield tidy(replace(case, lines=rest, operands=(*case.operands, fresh)))
            for source in names(x.text):  # the line left out
                if source in {y.name for y in case.lines} | {o.name for o in case.operands}:
                    text = tuple(
                        replace(y, text=re.sub(rf"\b{x.name}\b", source, y.text)) for y in case.lines if y is not x
                    )
                    yield tidy(replace(case, lines=text))
    for n, o in enumerate(case.operands):
        if o.kind in ("special", "wide"):
            simple = replace(o, kind="normal" if o.dtype in FLOATS else "small")
            yield replace(case, operands=(*case.operands[:n], simple, *case.operands[n + 1 :]))
