"""The text of an op graph, read back: the same graph, and clear errors for what is none."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_mpk import compiler, device
from jax_mpk.ir import expr as E
from jax_mpk.ir.graph import Graph, GraphError
from jax_mpk.ir.parse import ParseError, parse
from jax_mpk.options import Options
from tests import functions

CASES = {**functions.CASES, **functions.TASKS} | {
    n: functions.no_decoder(n, 3, np.float32) for n in functions.NO_DECODERS
}
PASSES = "lower", "simplify", "recognise", "fission", "fuse", "partial", "layout", "refine"


def assert_same(have: Graph, want: Graph) -> None:
    """Equal in everything; expressions and constants too, which dataclasses compare by identity or not at all."""
    assert have == want and str(have) == str(want)
    for x, y in zip(have.ops, want.ops, strict=True):
        assert all(e is y.exprs()[r] for r, e in x.exprs().items())
    for i, v in want.values.items():
        if v.data is not None:
            assert have.values[i].data.dtype == v.data.dtype and have.values[i].data.shape == v.data.shape
            assert have.values[i].data.tobytes() == v.data.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    f, args = CASES[name]
    stages = compiler.compile(jax.make_jaxpr(f)(*args), device.CPU, Options(cache_entries=0), last=PASSES[-1]).stages
    assert tuple(stages) == PASSES
    for g in stages.values():
        assert_same(parse(str(g), {g.value_name(i): v.data for i, v in g.values.items() if v.role == "const"}), g)


NUMBERS = """
graph numbers(x:f32[4], n:i32[4])
  const c:bf16[2] = [-0.0, inf]  # a comment
  const b:bool[3] = [true, false, true]
  %4:f32[4] = map[i0<4]  # add at a.py:3 (f)
      expr: ((x[i0] + -0.0) * (((nan / inf) - -inf) + (0.1 + (1e-30 + 16777216.0))))
  %5:u32[4] = map[i0<4]
      expr: (i2u(n[-i0+3]) + 4294967295u)
  %6:i32[2,2] = map[i0<4] at [i0//2, i0%2]
      expr: ((n[i0] < -1) ? index(3*(i0//2)-2*i0-1) : (n[clamp<3>(n[i0])] & -2147483648))
  %7:bool[4] = map[i0<4]
      expr: (piece(1<=i0+1; <3: true; <4: false; <5: b[i0-1]) | is_finite(c[i0//2]))
  return %4, %5, %6, x, %7
"""


def test_numbers_of_every_type():
    text = NUMBERS.strip().replace("  # a comment", "")
    g = parse(NUMBERS)
    assert str(g) == text
    assert_same(parse(text), g)
    found = {x for op in g.ops for x in E.walk(op.expr) if isinstance(x, E.Const)}
    values = [(-0.0, "f32"), (np.nan, "f32"), (-np.inf, "f32"), (np.float32(0.1), "f32"), (2**32 - 1, "u32"),
              (-(2**31), "i32"), (False, "bool")]  # fmt: skip
    assert all(E.const(v, d) in found for v, d in values)
    assert np.signbit(np.float32(g.values[2].data[0]))
    assert g.ops[0].source.where == "a.py:3 (f)" and g.ops[0].source.primitive == "add"


def test_constants_are_float32():
    """What is no float32 in Python is one in an expression: equal constants are one, and the text says all of it."""
    assert E.const(0.1, "f32") is E.const(float(np.float32(0.1)), "f32") and E.const(1e300, "f32").value == np.inf


def test_names_and_ids():
    """A named value says its id where it is not the number of values before it."""
    text = "graph f(x%4:f32[3], y:f32[3])\n  sum.0%9:f32[3] = map[i0<3]\n      expr: (x[i0] + y[i0])\n  return sum.0"
    g = parse(text)
    assert str(g) == text and list(g.values) == [4, 1, 9] and g.args == (4, 1) and g.values[9].name == "sum.0"


def test_shared_expressions_under_a_reduction():
    """Names for what is shared keep the extents of axes that are bound further out."""
    x = E.load(0, (E.coord_axis(0, 2), E.coord_axis(E.REDUCE_AXIS, 7)), "f32")
    for _ in range(12):
        x = E.binary("mul", x, E.unary("neg", x))
    g = parse("graph f(x:f32[2,7])\n  %1:f32[2] = map[i0<2]\n      expr: sum[r0<7](x[i0, r0])\n  return %1")
    g = g.with_ops([g.ops[0].with_exprs({"expr": E.reduce("sum", x, (E.REDUCE_AXIS,), (7,))})])
    assert "let $0 = (x[i0, r0<7] * neg(x[i0, r0<7])); $1 =" in str(g)
    assert_same(parse(str(g)), g)


HEAD = "graph f(x:f32[4], n:i32[4])\n  %2:f32[4] = map[i0<4]\n      expr: "


@pytest.mark.parametrize(("text", "where", "message"), [
    ("grap f()", (1, 1), r"'graph NAME\(' expected"),
    ("graph f(x:f33[4])", (1, 11), "an element type .* expected, not 'f33'"),
    ("graph f(x:f32[4] y:f32[4])", (1, 18), "',' or '\\)' expected, not 'y'"),
    ("graph f(x:f32[4], x:f32[4])", (1, 19), "x is declared twice"),
    ("graph f(%0:f32[4], %0:f32[4])", (1, 20), "%0 is declared twice"),
    ("graph f(max:f32[4])", (1, 9), "max is a word of the language"),
    ("graph f(x:f32[4])\n  const c:f32[3]\n  return c", (3, 3), "the elements of c, here or in `constants`, expected"),
    ("graph f()\n  const c:f32[3] = [1.0]\n  return c", (2, 18), "c has 3 elements of type f32; 1 of type float32"),
    ("graph f(x:f32[4])\n  return y", (2, 10), "y is not declared"),
    ("graph f(x:f32[4])\n  return x x", (2, 12), "the end expected, not 'x'"),
    ("graph f(x:f32[4])\n", (2, 1), "a value expected, not the end"),
    ("graph f(x:f32[4])\n  %1:f32[4] = mop[i0<4]", (2, 15), "an operator .* expected, not 'mop'"),
    ("graph f(x:f32[4])\n  %1:f32[4] = map[i1<4]", (2, 24), "a domain has the axes i0, i1"),
    (HEAD + "x[i0", (3, 17), "',' or ']' expected, not the end"),
    (HEAD + "x[i1]", (3, 15), "axis i1 is not in scope"),
    (HEAD + "x[j]", (3, 15), r"an axis \(i0, k0, r0, ...\) expected, not 'j'"),
    (HEAD + "y[i0]", (3, 13), "y is not declared"),
    (HEAD + "(x[i0] + n[i0])", (3, 20), "add of f32 and i32"),
    (HEAD + "(x[i0] $ 1.0)", (3, 20), "an operator .* expected"),
    (HEAD + "(x[i0] ? 1.0 : 2.0)", (3, 20), "a choice by f32"),
    (HEAD + "max(x[i0], 1)", (3, 13), "max of f32 and i32"),
    (HEAD + "exp x[i0]", (3, 17), r"'\(' expected"),
    (HEAD + "expp(x[i0])", (3, 13), "no operation is called expp"),
    (HEAD + "acc0", (3, 13), "no acc0 here"),
    (HEAD + "let $0 = x[i0]; ($0 + $1)", (3, 35), r"\$1 is not defined"),
    (HEAD + "argmax[r0<2, r1<2](x[r0+r1])", (3, 13), "argmax takes one axis"),
    (HEAD + "piece(i0; <2: 1.0; <4: 2)", (3, 13), "parts of types f32, i32"),
    (HEAD + "1e", (3, 15), "':' expected, not the end"),
    (HEAD + "(x[i0] + 2147483648)", (3, 22), "2147483648 is no i32"),
    (HEAD + "u2f(4294967296u)", (3, 17), "4294967296 is no u32"),
    ("graph f()\n  const c:i8[2] = [1, 128]\n  return c", (2, 17), "are no i8"),
    ("graph f()\n  const c:f32[1] = [1]\n  return c", (2, 18), "are no f32"),
    (HEAD + "+", (3, 13), r"an expression expected, not '\+'"),
    (HEAD + "--1.0", (3, 14), "an expression expected, not '-'"),
    (HEAD + "-true", (3, 14), "an expression expected, not 'true'"),
    (HEAD + "x[clamp<3>(x[i0])]", (3, 23), "a f32 is no index"),
    (HEAD + "x[i0//0]", (3, 19), "a divisor is at least 1, not 0"),
    (HEAD + "x[i0%0]", (3, 18), "a modulus is at least 1, not 0"),
    (HEAD + "x[-clamp<3>(n[i0])]", (3, 16), "an axis .* expected, not 'clamp'"),
    (HEAD + "x[clamp<3>(n[i0])+i0]", (3, 30), "',' or ']' expected"),
    (HEAD + "sum[r0<2, r0<3](x[r0])", (3, 17), "an axis occurs twice"),
    (HEAD + "piece(i0; <3: 1.0; <2: 2.0)", (3, 13), "the bounds of a piece ascend, not 0, 3, 2"),
    ("graph f(x:f32[-4])", (1, 15), "a size is at least 0, not -4"),
    (HEAD + "neg(" * 10**5, None, "nested too deeply"),
], ids=lambda x: x[-30:].replace("\n", " ") if isinstance(x, str) else "")  # fmt: skip
def test_errors(text, where, message):
    with pytest.raises(ParseError, match=message) as e:
        parse(text)
    assert where is None or (e.value.line, e.value.column) == where, e.value


def test_what_is_no_graph_is_no_graph():
    """Well-formed text of a graph that breaks an invariant."""
    for e, message in (("x[i0+1]", "outside 0..3"), ("x[i0, i0]", "2 coordinates"), ("%2[i0]", "before it is defined")):
        with pytest.raises(GraphError, match=message):
            parse(HEAD + e + "\n  return %2")
