"""Text to op graph: what `str(Graph)` prints, read back, equal to the graph (its expressions are the very same objects).

    graph   graph NAME(VALUE, ...)  {const VALUE = [NUMBER, ...]}  {op}  return REF, ...
    VALUE   REF:TYPE[SIZE, ...]      REF is %ID or a name; a named value may say its id, name%ID
    op      VALUE = KIND[AXES] at [COORD, ...]  # SOURCE
            and what is particular to the kind: k of a contraction, where an update goes, ...; expressions as `role: EXPR`
    AXES    i0<SIZE, ...             i: axes of the domain, k: of the core, r: bound by a reduction
    EXPR    1.0  2  3u  true  acc0  REF[COORD, ...]  index(COORD)  exp(EXPR)  max(EXPR, EXPR)  (EXPR + EXPR)
            (EXPR ? EXPR : EXPR)  sum[AXES](EXPR)  piece(LOW<=COORD; <BOUND: EXPR; ...)
            and, for a whole one or what is clamped, `let $0 = EXPR; ...; EXPR`
    COORD   3*(i0//4%2)-i1+7+clamp<LIMIT>(EXPR)

Lines may be broken and indented anywhere. What stands after # is a comment; behind an operator it is the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jax_mpk import abi
from jax_mpk.ir import expr as E
from jax_mpk.ir.coord import CORE_AXIS, REDUCE_AXIS, Coord, Term, collect, digit_extent
from jax_mpk.ir.expr import Const, Expr
from jax_mpk.ir.graph import (
    DTYPES,
    Append,
    Attention,
    Contract,
    Graph,
    Map,
    Op,
    Scan,
    Sort,
    Source,
    Update,
    Value,
    check,
    compute_dtype,
)
from jax_mpk.ir.interpret import NUMPY_DTYPES
from jax_mpk.ir.text import INFIX
from jax_mpk.ir.tokens import ParseError, Reader  # noqa: F401  (the error of `parse`)

_HEAD = re.compile(r"(?:\s|#[^\n]*\n)*graph ([^(\n]+)\(")
_INFIX = {sign: op for op, sign in INFIX.items()}
_RESERVED = frozenset((*E.REDUCE, "append", "const", "let", "limit", "return"))
_AXIS = {"i": 0, "k": CORE_AXIS, "r": REDUCE_AXIS}


def parse(text: str, constants: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The checked graph of a text. `constants`, by name, has the elements that the text leaves out.

    Raises:
      ParseError: the text is no op graph.
      GraphError: the graph breaks an invariant of the IR.
    """
    parser = _Parser(text, constants or {})
    try:
        return check(parser.graph())
    except RecursionError:
        parser.fail("an expression is nested too deeply")


class _Parser(Reader):
    """Every method reads what it is named after, from the next token on."""

    def __init__(self, text: str, constants: Mapping[str, np.ndarray]) -> None:
        head = _HEAD.match(text)
        super().__init__(text, head.end() if head else 0)
        if head is None:
            self.fail("'graph NAME(' expected", 0)
        self.name, self.constants = head.group(1), constants
        self.values: dict[int, Value] = {}
        self.names: dict[str, int] = {}
        self.scope: dict[int, int] = {}
        self.accumulators: tuple[Expr, ...] = ()
        self.lets: dict[int, Expr] = {}

    # ------------------------------------------------------------------------------------------------- graphs and values

    def graph(self) -> Graph:
        args = self.several(lambda: self.declare("arg"), ")")
        for n, i in enumerate(args):
            self.values[i] = replace(self.values[i], index=n)
        while self.accept("const"):
            self.constant(self.declare("const"))
        ops = []
        while not self.accept("return"):
            ops.append(self.op())
        results: tuple[int, ...] = () if self.kind == "end" else (self.ref(),)
        while self.accept(","):
            results += (self.ref(),)
        if self.kind != "end":
            self.expected("the end")
        return Graph(self.values, tuple(ops), args, results, self.name)

    def declare(self, role: str = "temp") -> int:
        at = self.at
        name = self.advance() if self.kind == "word" else ""
        if not name and self.peek() != "%":
            self.expected("a value")
        i = self.integer("the id of a value") if self.accept("%") else len(self.values)
        self.expect(":")
        dtype = self.one_of("an element type", *DTYPES)
        self.expect("[")
        shape = self.several(lambda: self.integer("a size", 0), "]")
        if i in self.values or name in self.names:
            self.fail(f"{name or '%' + str(i)} is declared twice", at)
        if name in _RESERVED:
            self.fail(f"{name} is a word of the language, and no name of a value", at)
        self.values[i] = Value(i, shape, dtype, role, name=name)
        if name:
            self.names[name] = i
        return i

    def ref(self) -> int:
        at = self.at
        name = self.word("a value") if not self.accept("%") else ""
        i = self.names.get(name, -1) if name else self.integer("the id of a value")
        if i not in self.values:
            self.fail(f"{name or '%' + str(i)} is not declared", at)
        return i

    def constant(self, i: int) -> None:
        v, at = self.values[i], self.at
        name = v.name or f"%{i}"
        if self.accept("="):
            self.expect("[")
            data = self.elements(v, self.several(self.literal, "]"), at)
        elif name in self.constants:
            data = np.asarray(self.constants[name])
        else:
            self.expected(f"the elements of {name}, here or in `constants`,")
        if data.size != v.size or data.dtype != NUMPY_DTYPES[v.dtype]:
            self.fail(f"{name} has {v.size} elements of type {v.dtype}; {data.size} of type {data.dtype} are given", at)
        self.values[i] = replace(v, data=data.reshape(v.shape))

    def elements(self, v: Value, given: tuple[Const, ...], at: int) -> np.ndarray:
        kind, numbers = compute_dtype(v.dtype), [e.value for e in given]
        data = np.array(numbers, np.float64 if kind == "f32" else np.int64).astype(NUMPY_DTYPES[v.dtype])
        if any(e.dtype != kind for e in given) or (kind != "f32" and list(data) != numbers):
            self.fail(f"the elements are no {v.dtype}", at)
        return data

    # --------------------------------------------------------------------------------------------------------- operators

    def op(self) -> Op:
        out = self.declare()
        self.expect("=")
        kinds = {"map": self.map, "update": self.update, "contract": self.contract, "attention": self.attention,
                 "sort": self.sort, "scan": self.scan}  # fmt: skip
        make = kinds[self.one_of("an operator", *kinds)]
        self.expect("[")
        self.scope = self.axes("]")
        domain = tuple(self.scope.values())
        if list(self.scope) != list(range(len(domain))):
            self.fail("a domain has the axes i0, i1, ...")
        source = self.comments.get(self.next, "")
        store = self.coords() if self.accept("at") else None
        primitive, _, where = (source or self.comments.get(self.next, "")).partition(" at ")
        return make(Op(out, domain, Source(primitive, where), store))

    def role(self, op: Op, name: str) -> Expr:
        self.expect(name, ":")
        self.scope, self.accumulators, self.lets = op.scope(name), op.accumulators(name), {}
        return self.whole()

    def map(self, op: Op) -> Op:
        return Map(op.out, op.domain, op.source, op.store, self.role(op, "expr"))

    def update(self, op: Op) -> Op:
        target, coords, mode, oob = self.target()
        expr = self.role(op, "expr")
        append = Append(target, op.out, op.domain, tuple(range(len(op.domain))), expr, coords, mode, oob)
        return Update(op.out, op.domain, op.source, op.store, append)

    def target(self) -> tuple[int, tuple[Coord, ...], str, str]:
        """Where an update in place goes: value, coordinates, mode, what happens out of bounds."""
        self.lets, self.accumulators = {}, ()
        self.expect("to")
        target = self.ref()
        self.expect("at")
        coords = self.coords()
        self.expect(",")
        mode = self.one_of("a mode", "set", *abi.COMBINES)
        self.expect("(", "out", "of", "bounds", ":")
        oob = self.one_of("what happens out of bounds", "clamp", "drop")
        self.expect(")")
        return target, coords, mode, oob

    def contract(self, op: Op) -> Op:
        self.expect("k", ":")
        k = self.axes("lhs", stay=True)
        out = Contract(op.out, op.domain, op.source, op.store, k=tuple(k.items()))
        out = replace(out, lhs=self.role(out, "lhs"))
        while self.peek() == f"rhs{len(out.rhs)}":
            out = replace(out, rhs=(*out.rhs, self.role(out, f"rhs{len(out.rhs)}")))
        return replace(out, epilogue=self.role(out, "epilogue"))

    def attention(self, op: Op) -> Op:
        self.expect("batch", "[")
        batch = self.several(self.axis, "]")
        self.expect("rows", "[")
        rows = self.several(self.axis, "]")
        self.expect("column")
        column = self.axis()
        self.expect("keys", "k1", "<")
        keys = self.integer()
        self.expect("head", "k0", "<")
        out = Attention(op.out, op.domain, op.source, op.store, batch, rows, column, keys, self.integer())
        while self.accept("append"):
            new = self.declare()
            self.expect("over")
            self.scope = self.axes("to", stay=True)
            axes, window = tuple(self.scope), tuple(self.scope.values())
            target, coords, mode, oob = self.target()
            a = Append(target, new, window, axes, E.const(0, "i32"), coords, mode, oob)
            name = f"append{len(out.appends)}.expr"
            out = replace(out, appends=(*out.appends, a))
            out = replace(out, appends=(*out.appends[:-1], replace(a, expr=self.role(out, name))))
        for name in ("q", "k", "v", "score", "prob", "epilogue"):
            role: dict[str, Any] = {name: self.role(out, name)}
            out = replace(out, **role)
        return replace(out, limit=self.role(out, "limit")) if self.peek() == "limit" else out

    def sort(self, op: Op) -> Op:
        descending = self.one_of("an order", "ascending", "descending") == "descending"
        payload = self.one_of("what is written", "values", "indices")
        self.expect("count")
        count = self.integer()
        return Sort(op.out, op.domain, op.source, op.store, self.role(op, "key"), payload, descending, count)

    def scan(self, op: Op) -> Op:
        reverse = self.one_of("a direction", "forward", "backward") == "backward"
        how = self.one_of("what is combined", "sum", "prod", "max", "min", "logsumexp")
        self.expect("along")
        out = Scan(op.out, op.domain, op.source, op.store, how=how, axis=self.axis(), reverse=reverse)
        out = replace(out, element=self.role(out, "element"))
        return replace(out, epilogue=self.role(out, "epilogue"))

    # -------------------------------------------------------------------------------------------------------- coordinates

    def axis(self) -> int:
        name = self.peek()
        if self.kind != "word" or name[0] not in _AXIS or not name[1:].isdigit():
            self.expected("an axis (i0, k0, r0, ...)")
        self.advance()
        return _AXIS[name[0]] + int(name[1:])

    def extent(self) -> tuple[int, int]:
        axis = self.axis()
        self.expect("<")
        return axis, self.integer("an extent", 0)

    def axes(self, end: str, stay: bool = False) -> dict[int, int]:
        """Axes with their extents, and `end`, which may stay."""
        at, out = self.at, self.several(self.extent, end)
        self.next -= stay
        return dict(out) if len(dict(out)) == len(out) else self.fail("an axis occurs twice", at)

    def coords(self) -> tuple[Coord, ...]:
        self.expect("[")
        return self.several(self.coord, "]")

    def coord(self) -> Coord:
        const = 0
        terms: list[Term] = []
        sign = -1 if self.accept("-") else 1
        while True:
            if sign > 0 and self.accept("clamp"):
                self.expect("<")
                limit = self.integer("a limit")
                self.expect(">")
                at, dyn = self.at, self.inside(self.whole)
                return (
                    collect(const, terms, dyn, limit)
                    if dyn.dtype == "i32"
                    else self.fail(f"a {dyn.dtype} is no index", at)
                )
            if self.kind == "int":
                value = sign * self.integer()
                if self.accept("*"):
                    terms.append(self.digit(value))
                else:
                    const += value
            else:
                terms.append(self.digit(sign))
            sign = {"+": 1, "-": -1, "": 0}[self.accept("+", "-")]
            if not sign:
                return collect(const, terms)

    def digit(self, coef: int) -> Term:
        if self.accept("("):
            t = self.digit(coef)
            self.expect(")")
            return t
        at = self.at
        axis = self.axis()
        div = self.integer("a divisor", 1) if self.accept("//") else 1
        mod = self.integer("a modulus", 1) if self.accept("%") else 0
        if self.accept("<"):
            return Term(coef, axis, div, mod, self.integer("an extent", 0))
        if axis not in self.scope:
            self.fail(f"axis {self.text[at : self.at].strip()} is not in scope", at)
        return Term(coef, axis, div, mod, digit_extent(self.scope[axis], div, mod))

    # -------------------------------------------------------------------------------------------------------- expressions

    def whole(self) -> Expr:
        if self.accept("let"):
            while (self.peek(), self.peek(2)) == ("$", "="):
                self.expect("$")
                name = self.integer("the number of a name")
                self.expect("=")
                self.lets[name] = self.expr()
                self.expect(";")
        return self.expr()

    def inside(self, what: Callable[[], Expr]) -> Expr:
        """An expression in parentheses."""
        self.expect("(")
        e = what()
        self.expect(")")
        return e

    def expr(self) -> Expr:
        at, token = self.at, self.tokens[self.next]
        if self.accept("("):
            return self.infix()
        if self.accept("$"):
            name = self.integer("the number of a name")
            return self.lets[name] if name in self.lets else self.fail(f"${name} is not defined", at)
        follows = self.peek(1)
        if token.text == "%" or (token.kind == "word" and follows == "[" and token.text not in E.REDUCE):
            value = self.ref()
            return E.load(value, self.coords(), compute_dtype(self.values[value].dtype))
        if token.kind != "word" or token.text in ("inf", "nan", "true", "false"):
            return self.literal()
        self.advance()
        if token.text.startswith("acc") and token.text[3:].isdigit():
            n = int(token.text[3:])
            return self.accumulators[n] if n < len(self.accumulators) else self.fail(f"no {token.text} here", at)
        if token.text in E.REDUCE and follows == "[":
            return self.reduction(token.text, at)
        self.expect("(")
        if token.text == "index":
            e = E.index(self.coord())
        elif token.text == "piece":
            return self.piece(at)
        elif token.text in E.UNARY:
            e = E.unary(token.text, self.expr())
        elif token.text in E.BINARY:
            a = self.expr()
            self.expect(",")
            e = self.binary(token.text, a, self.expr(), at)
        else:
            self.fail(f"no operation is called {token.text}", at)
        self.expect(")")
        return e

    def literal(self) -> Const:
        if word := self.accept("true", "false"):
            return E.const(word == "true", "bool")
        at, sign = self.at, -1 if self.accept("-") else 1
        kind = self.kind
        if kind not in ("float", "int", "unsigned") and self.peek() not in ("inf", "nan"):
            self.expected("an expression")
        text = self.advance()
        if kind in ("float", "word"):
            return E.const(sign * float(text), "f32")
        dtype, low, high = ("u32", 0, 2**32) if kind == "unsigned" else ("i32", -(2**31), 2**31)
        value = sign * int(text.rstrip("u"))
        return E.const(value, dtype) if low <= value < high else self.fail(f"{value} is no {dtype}", at)

    def infix(self) -> Expr:
        """What stands in parentheses: one operation with two operands, or a choice."""
        a, at = self.expr(), self.at
        if self.accept("?"):
            x = self.expr()
            self.expect(":")
            y = self.expr()
            if a.dtype != "bool" or x.dtype != y.dtype:
                self.fail(f"a choice by {a.dtype} between {x.dtype} and {y.dtype}", at)
            e = E.select(a, x, y)
        else:
            op = _INFIX[self.one_of("an operator", *_INFIX)]
            e = self.binary(op, a, self.expr(), at)
        self.expect(")")
        return e

    def binary(self, op: str, a: Expr, b: Expr, at: int) -> Expr:
        if a.dtype != b.dtype and (op, a.dtype, b.dtype) != ("pow", "f32", "i32"):
            self.fail(f"{op} of {a.dtype} and {b.dtype}", at)
        return E.binary(op, a, b)

    def reduction(self, op: str, at: int) -> Expr:
        self.expect("[")
        bound = self.axes("]")
        outer, self.scope = self.scope, {**self.scope, **bound}
        body = self.inside(self.expr)
        self.scope = outer
        if op.startswith("arg") and len(bound) != 1:
            self.fail(f"{op} takes one axis", at)
        return E.reduce(op, body, tuple(bound), tuple(bound.values()))

    def piece(self, at: int) -> Expr:
        low = 0
        if self.peek(2 if self.peek() == "-" else 1) == "<=":
            low = self.integer()
            self.expect("<=")
        coord, bounds, parts = self.coord(), [low], []
        while not self.accept(")"):
            self.expect(";", "<")
            bounds.append(self.integer("a bound"))
            self.expect(":")
            parts.append(self.expr())
        if not parts or len({p.dtype for p in parts}) != 1:
            self.fail(f"a piece with parts of types {', '.join(p.dtype for p in parts)}", at)
        if bounds != sorted(set(bounds)):
            self.fail(f"the bounds of a piece ascend, not {', '.join(map(str, bounds))}", at)
        return E.piece(coord, tuple(bounds), tuple(parts))
