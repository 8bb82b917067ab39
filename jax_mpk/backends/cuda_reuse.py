"""What a thread keeps in registers between the stages of a code with reductions, so that memory is waited for once.

A vector stage after a reduction often reads what the reduction has read (the row that is normalised), and always waits
for the reduction before it reads anything else (the weights of the norm), because loads do not move over a barrier.
`_carried` finds the first, `_early` the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jax_mpk import abi

if TYPE_CHECKING:
    from jax_mpk.backends.cuda_space import Loop

OPCODES = abi.ENUMS["Opcode"]
DTYPES = abi.ENUMS["Dtype"]
SCALAR, REDUCE_STAGE, VECTOR = range(3)
STORES = ("STORE", "STORE_IF", "STORE_ADD")
CARRY = 8
"""Most points of a vector stage for which a thread keeps a value of a reduction."""
EARLY = 4
"""Most values that a thread keeps from before the reductions: more would not stay in registers beside those."""


_UNARY = frozenset(
    "F_NEG F_ABS F_EXP F_EXP2 F_EXPM1 F_LOG F_LOG1P F_SQRT F_RSQRT F_CBRT F_TANH F_SIN F_COS F_TAN F_LOGISTIC F_ERF "
    "F_SIGN F_FLOOR F_CEIL F_ROUND_EVEN F_ROUND_AWAY F_IS_FINITE F_ROUND_BF16 F_ROUND_F16 F_TO_I F_TO_U F_TO_B I_NEG "
    "I_ABS I_SIGN I_NOT B_NOT I_POPCOUNT I_CLZ I_TO_F U_TO_F I_TO_B I_WRAP_I8 I_WRAP_U8 I_WRAP_I16 I_WRAP_U16".split()
)


def unary(op: str) -> bool:
    return op in _UNARY


class Reuse:
    """The part of an emitter (`cuda_code.Emitter`) that looks at the stages of the current code."""

    if TYPE_CHECKING:
        stages: Sequence[np.void]
        vector: int

        def _instrs(self, first: int, count: int) -> list[np.void]: ...
        def _access(self, aux: int) -> np.void: ...
        def _strides(self, x: np.void) -> dict[int, int]: ...
        def _uses(self, i: np.void) -> set[int]: ...
        def _reduction(self, s: np.void) -> tuple[int, list[tuple[int, int]]]: ...

    def _inputs(self, i: np.void) -> set[int]:
        """The registers that an instruction reads."""
        op = OPCODES[int(i["op"])]
        if op in STORES:
            return self._uses(i)
        if op == "LOAD":
            x = self._access(int(i["aux"]))
            return {int(x["dyn_reg"][d]) for d in range(int(x["n_dyn"]))}
        n = 0 if op in ("CONST", "INDEX") else 3 if op == "SELECT" else 1 if op == "MOVE" or unary(op) else 2
        return {int(i[k]) for k in "abc"[:n]}

    def _live(self, instrs: Sequence[np.void], given: Mapping[int, object] | frozenset[int]) -> list[int]:
        """The positions of the instructions that stores still need when those at `given` need nothing."""
        wanted: set[int] = set()
        keep = []
        for n in range(len(instrs) - 1, -1, -1):
            i = instrs[n]
            if OPCODES[int(i["op"])] not in STORES:
                if int(i["dst"]) not in wanted:
                    continue
                wanted.discard(int(i["dst"]))
            if n not in given:
                wanted |= self._inputs(i)
            keep.append(n)
        return keep[::-1]

    def _carried(self, inner: Sequence[Loop], size: int) -> list[tuple[int, int, int, int]]:
        """Values of a reduction that the vector stage would compute again, at the same points by the same threads:
        (reduction stage, vector stage, register there, position of the instruction here). Kept in registers."""
        s = self.stages
        vector = [n for n, x in enumerate(s) if int(x["kind"]) == VECTOR]
        if len(vector) != 1 or len(inner) != 1 or len(inner[0].axes) != 1 or -(-inner[0].most // size) > CARRY:
            return []
        axis, base, count = inner[0].axes[0], inner[0].base, inner[0].count
        written: dict[int, int] = {}  # scalar register -> stage that wrote it last
        seen: dict[int, tuple[int, int]] = {}
        terms: dict[tuple, int] = {}
        for n, x in enumerate(s[: vector[0]]):
            instrs = self._instrs(int(x["first"]), int(x["count"]))
            if int(x["kind"]) == SCALAR:
                written |= {int(i["dst"]): n for i in instrs}
                continue
            _, ranges = self._reduction(x)
            if len(ranges) == 1 and (str(ranges[0][0]), str(ranges[0][1] - ranges[0][0])) == (base, count):
                final = {
                    int(i["dst"]): at for at, i in enumerate(instrs)
                }  # a register carries what it holds at the end
                for at, key in enumerate(self._values(instrs, int(x["axis"]), written, terms)):
                    if key is not None and final[int(instrs[at]["dst"])] == at:
                        seen.setdefault(key, (n, int(instrs[at]["dst"])))
            written[int(x["dst"])] = n
        instrs = self._instrs(int(s[vector[0]]["first"]), int(s[vector[0]]["count"]))
        keys = self._values(instrs, axis, written, terms)
        known = {at for at, key in enumerate(keys) if key in seen}
        last: dict[int, int] = {}
        need: set[int] = set()
        for at, i in enumerate(instrs):
            if at not in known:
                used = self._inputs(i)
                need |= {last[r] for r in used if r in last and last[r] in known}
            if OPCODES[int(i["op"])] not in STORES:
                last[int(i["dst"])] = at
        out = [(*seen[keys[at]], at) for at in sorted(need) if OPCODES[int(instrs[at]["op"])] != "CONST"]
        registers = [r for _, r, _ in out]
        if len(out) > 2 or len(set(registers)) != len(registers):
            return []
        return [(n, vector[0], r, at) for n, r, at in out]

    def _values(self, instrs: Sequence[np.void], axis: int, written: Mapping[int, int],
                terms: dict[tuple, int]) -> list[int | None]:  # fmt: skip
        """What each instruction computes, as a term in which `axis` is the running index; None for stores.

        Terms are numbers in `terms`, which names operands by their numbers: as nested tuples they would be hashed, and
        compared, in time exponential in their depth.
        """
        now: dict[int, int] = {}

        def number(key: tuple) -> int:
            return terms.setdefault(key, len(terms))

        def term(r: int) -> int:
            return now[r] if r in now else number(("reg", r, written.get(r, -1)))

        out: list[int | None] = []
        for i in instrs:
            op = OPCODES[int(i["op"])]
            if op in STORES:
                out.append(None)
                continue
            if op in ("LOAD", "INDEX"):
                x = self._access(int(i["aux"]))
                strides = {("run" if a == axis else a): v for a, v in self._strides(x).items()}
                if self.vector != axis:
                    strides.pop(self.vector, None)
                dyn = tuple(
                    (term(int(x["dyn_reg"][d])), int(x["dyn_limit"][d]), int(x["dyn_stride"][d]))
                    for d in range(int(x["n_dyn"]))
                )
                where = (int(x["slot"]), int(x["dtype"]), int(x["offset"])) if op == "LOAD" else (int(i["imm"]),)
                key: tuple = (op, *where, tuple(sorted(strides.items(), key=str)), dyn)
            elif op == "CONST":
                key = (op, int(i["imm"]))
            else:
                n = 3 if op == "SELECT" else 1 if op == "MOVE" or unary(op) else 2
                key = (op, *(term(int(i[k])) for k in "abc"[:n]))
            now[int(i["dst"])] = number(key)
            out.append(now[int(i["dst"])])
        return out

    def _early(self, turns: int, given: frozenset[int]) -> list[tuple[int, np.void, bool]]:
        """The instructions of the vector stage that can run before the first reduction, as far as they lead to memory:
        (position, instruction, whether the stage keeps its value). A thread has `turns` points of the stage; the values at
        the positions `given` come from the reductions. Empty where registers would not hold what is kept."""
        kinds = [int(x["kind"]) for x in self.stages]
        if kinds.count(VECTOR) != 1:
            return []
        first, vector = kinds.index(REDUCE_STAGE), kinds.index(VECTOR)
        late: set[int] = set()  # scalar registers that come with or after the first reduction
        for x in self.stages[first:vector]:
            late |= (
                {int(x["dst"])}
                if int(x["kind"]) == REDUCE_STAGE
                else {int(i["dst"]) for i in self._instrs(int(x["first"]), int(x["count"]))}
            )
        instrs = self._instrs(int(self.stages[vector]["first"]), int(self.stages[vector]["count"]))
        now: dict[int, int] = {}  # register -> position that wrote it last
        ready: dict[int, set[int]] = {}  # position -> the positions that it needs, itself included
        keep: set[int] = set()
        for at in self._live(instrs, given):
            i, store = instrs[at], OPCODES[int(instrs[at]["op"])] in STORES
            read = set() if at in given else self._inputs(i)
            before = {now[r] for r in read if r in now}
            if (
                not store
                and at not in given
                and before <= ready.keys()
                and not any(r in late for r in read if r not in now)
            ):
                ready[at] = {at}.union(*(ready[x] for x in before))
            else:
                keep |= {x for x in before if any(OPCODES[int(instrs[y]["op"])] == "LOAD" for y in ready.get(x, ()))}
            if not store:
                now[int(i["dst"])] = at
        if not keep or len(keep) * turns > EARLY:
            return []
        return [(at, instrs[at], at in keep) for at in sorted(set().union(*(ready[x] for x in keep)))]
