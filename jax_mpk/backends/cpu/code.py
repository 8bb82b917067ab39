"""Code generation for one nest: hoisting, common subexpressions, reductions, registers (see `jax_mpk.abi`).

A nest becomes one code. Work that does not depend on the vector axis is hoisted to scalar stages; every reduction is a
stage of its own, operands first; the vector stage comes last and stores. Equal subexpressions are one node, so each is computed once per stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

from jax_mpk import abi
from jax_mpk.backends.cpu.registers import Code, Instr, Stage, encode
from jax_mpk.ir import expr as E
from jax_mpk.ir.body import Nest, depends, outside, unknown
from jax_mpk.ir.expr import Acc, Const, Expr, Index, Load, Reduce
from jax_mpk.ir.opcodes import alias, opcode
from jax_mpk.ir.pieces import NotRefined, boxes
from jax_mpk.ir.place import Place

STRIP = 128
"""Elements that an instruction is assumed to process at once, in the cost model that chooses the vector axis."""


def compile(nest: Nest, number: Mapping[int, int], single: Container[int] = ()) -> Code:
    """The code of a nest; `number`: the loop axes of the operator by id. `single`: those of which it runs for one point after
    the other."""
    return _Coder(nest, number, single).code()


@dataclass
class _Coder:
    nest: Nest
    number: Mapping[int, int]
    single: Container[int] = ()
    stages: list[Stage] = field(default_factory=list)
    scalars: dict[Expr, int] = field(default_factory=dict)  # node -> virtual register
    count: int = 0
    _deps: dict[Expr, frozenset[int]] = field(default_factory=dict)
    _need: dict[Expr, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.value, self.store, self.box = self.nest.value, self.nest.store, self.nest.box

    def code(self) -> Code:
        rounds = f"round_{self.store.place.dtype}" if self.store.mode == "set" else ""
        if isinstance(self.value, E.Unary) and self.value.op == rounds:
            self.value = self.value.a  # the store rounds
        roots = [self.value, *(() if self.store.where is None else (self.store.where,))]
        roots = [alias(r) for r in roots] + [alias(e) for e, _, _ in self.store.place.dyn]
        reduces = [x for x in self.walk(roots) if isinstance(x, Reduce)]
        vector = self.vector(roots, reduces)
        for r in reduces:
            self.reduce(r)
        if vector is None:
            self.scalar(roots)
            self.put(self.scalar_stage(), self.scalars)
        else:
            local = self.local(roots, frozenset((vector,)))
            stage = Stage("VECTOR")
            regs = self.body(stage, roots, local)
            self.put(stage, regs)
            self.stages.append(stage)
        number = self.number
        mask = sum(1 << number[a] for a in self.box)
        ranges = {number[a]: r for a, r in self.box.items()}
        return encode(self.stages, number, mask, ranges, -1 if vector is None else number[vector])

    def put(self, stage: Stage, regs: Mapping[Expr, int]) -> None:
        """The store instruction."""
        s = self.store
        srcs = [regs[alias(self.value)]]
        op = abi.COMBINES.get(s.mode, "STORE" if s.where is None else "STORE_IF")
        if s.where is not None:
            srcs.append(regs[alias(s.where)])
        dyn = tuple(regs[alias(e)] for e, _, _ in s.place.dyn)
        stage.instrs.append(Instr(op, None, tuple(srcs), s.place, dyn))

    # -------------------------------------------------------------------------------------------------------- structure

    def fresh(self) -> int:
        self.count += 1
        return self.count - 1

    def args(self, x: Expr) -> tuple[Expr, ...]:
        """Operands as instructions see them: a load depends on its dynamic coordinates, complete with offsets."""
        if isinstance(x, Load):
            return tuple(alias(e) for e, _, _ in self.nest.place(x).dyn)
        return tuple(alias(a) for a in x.args())

    def walk(self, roots: Iterable[Expr]) -> list[Expr]:
        """Every node below the roots, operands first, the operand that needs most registers first."""
        seen: dict[Expr, None] = {}
        stack = [(r, False) for r in reversed(list(roots))]
        while stack:
            x, done = stack.pop()
            if done:
                seen.setdefault(x)
            elif x not in seen:
                stack.append((x, True))
                stack += [(a, False) for a in sorted(self.args(x), key=self.need)]
        return list(seen)

    def need(self, x: Expr) -> int:
        """Registers that the tree of `x` takes (Sethi-Ullman)."""
        for y in unknown(x, self.args, self._need):
            parts = sorted((self._need[a] for a in self.args(y)), reverse=True)
            self._need[y] = max([1, *(n + i for i, n in enumerate(parts))])
        return self._need[x]

    def deps(self, x: Expr) -> frozenset[int]:
        """The axes that the value of `x` depends on."""
        return depends(self.nest, x, self.args, self._deps)

    # ------------------------------------------------------------------------------------------------------ vector axis

    def vector(self, roots: list[Expr], reduces: list[Reduce]) -> int | None:
        """The axis whose strips cost least; no reduction may depend on it, and points that may store to one element stay in
        their order."""
        fixed = frozenset().union(*(self.deps(r) for r in reduces))
        size = {a: 1 if a in self.single else hi - lo for a, (lo, hi) in self.box.items()}
        apart = self.store.place.apart(self.box)
        meet = [a for a in self.box if a not in apart]
        fits = [a for a in self.box if size[a] > 1 and a not in fixed and a not in meet[:-1]]
        if not fits:
            return None
        nodes = outside(roots, self.args)
        rows = sum((5 + math.prod(r.extents) / 4) * (1 + r.body.cost) for r in reduces)
        points = math.prod(size.values())

        def cost(a: int) -> float:
            n = size[a]
            inner, outer = self.weight(self.store.place, a, n), 20.0 + rows
            for x in nodes:
                if a not in self.deps(x):
                    outer += 5
                elif isinstance(x, Load | Acc):
                    inner += self.weight(self.nest.place(x), a, n)
                else:
                    inner += 5 * math.ceil(n / STRIP) + n * (1.6 if getattr(x, "op", "") in E.EXPENSIVE else 0.2)
            return points / n * (outer + inner)

        return min(reversed(fits), key=cost)

    def weight(self, p: Place, axis: int, n: int) -> float:
        near = p.strides.get(axis, 0) in (0, 1) and not any(axis in self.deps(alias(e)) for e, _, _ in p.dyn)
        return 5 * math.ceil(n / STRIP) + n * (0.2 if near else 1.5)

    # ----------------------------------------------------------------------------------------------------------- stages

    def scalar_stage(self) -> Stage:
        if not self.stages or self.stages[-1].kind != "SCALAR":
            self.stages.append(Stage("SCALAR"))
        return self.stages[-1]

    def scalar(self, roots: Iterable[Expr]) -> None:
        """Computes nodes on scalar registers, unless they are there already."""
        for x in self.walk_until(roots, lambda x: x in self.scalars):
            self.instr(self.scalar_stage(), x, self.scalars)

    def walk_until(self, roots: Iterable[Expr], stop: Callable[[Expr], bool]) -> list[Expr]:
        """The nodes below the roots for which `stop` is false, reached through such nodes only; operands first."""
        seen: dict[Expr, None] = {}
        stack = [(r, False) for r in reversed(list(roots))]
        while stack:
            x, done = stack.pop()
            if done:
                seen.setdefault(x)
            elif x not in seen and not stop(x):
                stack.append((x, True))
                stack += [(a, False) for a in sorted(self.args(x), key=self.need)]
        return list(seen)

    def local(self, roots: list[Expr], axes: frozenset[int]) -> list[Expr]:
        """The nodes below the roots that depend on `axes`, operands first; what they need of the others is computed."""
        out = self.walk_until(roots, lambda x: not (self.deps(x) & axes))
        inside = set(out)
        outside = dict.fromkeys(a for x in out for a in self.args(x) if a not in inside)
        self.scalar([*(r for r in roots if r not in inside), *outside])
        return out

    def body(self, stage: Stage, roots: list[Expr], local: list[Expr]) -> dict[Expr, int]:
        """Instructions of `local` on vector registers; returns the registers of everything that is visible."""
        regs = dict(self.scalars)
        for x in local:
            self.instr(stage, x, regs, vector=True)
        return regs

    def reduce(self, r: Reduce) -> None:
        ranges = {a: (0, n) for a, n in zip(r.bound, r.extents, strict=True)}
        parts = boxes(r.body, ranges)
        stages = []
        for box, body in parts:
            root = alias(body)
            local = self.local([root], frozenset(r.bound))
            stage = Stage("REDUCE", reduce=r.op, dtype=r.body.dtype, bound=r.bound, ranges=[box[a] for a in r.bound])
            regs = self.body(stage, [root], local)
            if not local:
                stage.instrs.append(Instr("MOVE", (reg := self.fresh()), (regs[root],), vector=True))
                regs[root] = reg
            stage.src = regs[root]
            stages.append(stage)
        dst = self.scalars[r] = self.fresh()
        for n, stage in enumerate(stages):
            stage.dst, stage.accumulate = dst, n > 0
        self.stages += stages

    def instr(self, stage: Stage, x: Expr, regs: dict[Expr, int], vector: bool = False) -> None:
        dst = self.fresh()
        srcs = tuple(regs[a] for a in self.args(x))
        if isinstance(x, Const):
            ins = Instr("CONST", dst, imm=x.value, dtype=x.dtype)
        elif isinstance(x, Index):
            place = Place(0, "i32", 0, {t.axis: t.coef for t in x.coord.terms})
            ins = Instr("INDEX", dst, (), place, imm=x.coord.const)
        elif isinstance(x, Load | Acc):
            ins = Instr("LOAD", dst, (), self.nest.place(x), srcs)
        elif isinstance(x, E.Select):
            ins = Instr("SELECT", dst, srcs)
        elif isinstance(x, E.Unary | E.Binary):
            ins = Instr(opcode(x), dst, srcs)
        else:
            raise NotRefined(f"there is no instruction for {x}")
        ins.vector = vector
        stage.instrs.append(ins)
        regs[x] = dst
