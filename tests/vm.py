"""A slow virtual machine for programs: every sentence of `jax_mpk.abi` in a few lines of NumPy, for tests.

Tasks run one by one in record order, every point of a code by itself, every lane by its own address. Memory is one
bytearray a buffer. Poisoned with NaN patterns before the start, so that a read of what nobody wrote shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from jax_mpk import abi
from jax_mpk.backends.cpu.check import check
from jax_mpk.ir import scalar
from jax_mpk.ir.interpret import NUMPY_DTYPES

STRIP = 48
"""Lanes of a strip; no result may depend on it."""
_DTYPES = [NUMPY_DTYPES[d.lower()] for d in abi.ENUMS["Dtype"]]
_REGISTER = {"f": np.float32, "V": np.float32, "i": np.int32, "u": np.uint32, "b": np.uint32}
_OPS = abi.ENUMS["Opcode"]
_UNARY = {"F_TO_I": "f2i", "F_TO_U": "f2u", "F_TO_B": "f2b", "I_TO_F": "i2f", "U_TO_F": "u2f", "I_TO_B": "i2b"}
_NAMES = {"F_POW_I": "pow"}


def run(blob: bytes, args: Sequence[np.ndarray], order: Sequence[int] | None = None) -> list[np.ndarray]:
    """The bytes of every result as uint8 arrays. `order`: another order of the task records."""
    with np.errstate(all="ignore"):
        return _Machine(blob, args).run(order)


def results(blob: bytes, args: Sequence[np.ndarray], like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of a program, with the types and shapes of `like`."""
    out = run(blob, args)
    return [x.view(y.dtype).reshape(y.shape) for x, y in zip(out, like, strict=True)]


class _Machine:
    def __init__(self, blob: bytes, args: Sequence[np.ndarray]):
        self.p = p = check(blob)
        self.memory: list[np.ndarray] = []
        workspace = np.full(int(p.header["workspace"]), 0xFF, np.uint8)
        const = p["Const"]["byte"].copy()
        flat = [np.ascontiguousarray(a).reshape(-1).view(np.uint8).copy() for a in args]
        for b in p["Buffer"]:
            at, n = int(b["offset"]), int(b["bytes"])
            space = abi.ENUMS["Space"][b["space"]]
            if space == "ARG":
                self.memory.append(flat[b["index"]])
            elif space == "RESULT":
                self.memory.append(flat[b["alias"]] if b["alias"] >= 0 else np.full(n, 0xFF, np.uint8))
            else:
                self.memory.append((workspace if space == "WORKSPACE" else const)[at : at + n])
        self.scratch: dict[int, np.ndarray] = {}

    def run(self, order: Sequence[int] | None) -> list[np.ndarray]:
        count = np.zeros(len(self.p["Event"]), np.int64)
        for t in order if order is not None else range(len(self.p["Task"])):
            task = self.p["Task"][t]
            for e, want in zip(task["wait"][: task["n_waits"]], task["want"], strict=False):
                assert count[e] >= want, f"task {t} would wait for event {e} for ever"
            self.task(self.p["Op"][task["op"]], int(task["index"]))
            for e in task["trigger"][: task["n_triggers"]]:
                count[e] += 1
        out = {int(b["index"]): m for b, m in zip(self.p["Buffer"], self.memory, strict=True)
               if abi.ENUMS["Space"][b["space"]] == "RESULT"}  # fmt: skip
        return [out[n] for n in range(len(out))]

    # ------------------------------------------------------------------------------------------------------------ tasks

    def task(self, op: np.void, index: int) -> None:
        self.op = op
        extent, tile = (op[f][: op["n_axes"]].astype(int) for f in ("extent", "tile"))
        digits = []
        for e, t in reversed(list(zip(extent, tile, strict=True))):
            n = math.ceil(e / t)
            digits.append(index % n)
            index //= n
        lo = np.array(digits[::-1], int) * tile
        self.start, self.ranges = lo, [(int(a), int(min(e, a + t))) for a, e, t in zip(lo, extent, tile, strict=True)]
        self.scratch = {}
        getattr(self, abi.ENUMS["Kind"][op["kind"]].lower())()

    def param(self, name: str) -> int:
        return int(self.op["params"][abi.enum("Param", name)])

    def core(self, name: str) -> np.void:
        n = self.param(name)
        assert n < self.op["accesses"]
        return self.p["Access"][int(self.op["access"]) + n]

    def role(self, name: str) -> None:
        r = abi.enum("Role", name)
        for c in range(int(self.op["code"][r]), int(self.op["code"][r] + self.op["codes"][r])):
            _Code(self, self.p["Code"][c]).run()

    def has(self, name: str) -> bool:
        return self.op["codes"][abi.enum("Role", name)] > 0

    def nop(self) -> None:
        pass

    def rows(self) -> None:
        self.role("MAIN")

    def points(self, axes: Sequence[int]) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(*self.ranges[a]) for a in axes)))

    def contract(self) -> None:
        nb, nm, nn, nk = (self.param(f"N_{x}") for x in ("BATCH", "M", "N", "K"))
        assert nb + nm + nn + nk == self.op["n_axes"]
        m, n, k = range(nb, nb + nm), range(nb + nm, nb + nm + nn), range(nb + nm + nn, nb + nm + nn + nk)
        dtype = _DTYPES[self.param("REDUCE_DTYPE")]
        tile = np.minimum(self.op["tile"], self.op["extent"])
        for axes in (m, n):
            assert all(self.ranges[a] == (0, self.op["extent"][a]) for a in axes[1:]), "only the first axis is tiled"
        full = [int(np.prod([tile[a] for a in x], dtype=int)) for x in (m, n, k)]
        ranges = list(self.ranges)
        for point in self.points(range(nb)):
            for a, i in enumerate(point):
                self.ranges[a] = (i, i + 1)
            act = self.scratch[abi.SLOT_ACT] = _poison(full[0] * full[2], dtype)
            self.role("LHS")
            act = act.view(dtype).reshape(full[0], full[2])
            for j in range(self.param("N_RHS")):
                a = self.core(f"RHS{j}")
                for axes in (n, k):
                    for x, y in itertools.pairwise(axes):
                        assert a["stride"][x] == a["stride"][y] * self.op["extent"][y], "strides do not flatten"
                row = [self.ranges[x][0] for x in m]
                at = [(*point, *row, *i, *q) for q in self.points(k) for i in self.points(n)]
                w = self.elements(a, at).reshape(len(self.points(k)), len(self.points(n))).astype(dtype)
                acc = self.scratch[abi.SLOT_ACC + j] = _poison(full[0] * full[1], dtype)
                rows = len(self.points(m))
                acc.view(dtype).reshape(full[0], full[1])[:rows, : w.shape[1]] = act[:rows] @ w
            self.role("EPILOGUE")
            self.ranges = list(ranges)

    def attention(self) -> None:
        nb, nr = self.param("N_BATCH"), self.param("N_ROWS")
        rows, column, key, head = range(nb, nb + nr), nb + nr, nb + nr + 1, nb + nr + 2
        point = tuple(self.ranges[a][0] for a in range(nb))
        assert all(hi == lo + 1 for lo, hi in self.ranges[:nb]), "a batch axis has tile 1"
        tile = [int(min(t, e)) for t, e in zip(self.op["tile"], self.op["extent"], strict=True)]
        n, keys, dv, d = math.prod(tile[a] for a in rows), tile[key], tile[column], tile[head]
        for j in range(4):
            self.role(f"APPEND{j}")
        q = self.scratch[abi.SLOT_ACT] = _poison(n * d, np.float32)
        self.role("Q")
        limit = keys
        if self.has("LIMIT"):
            self.scratch[abi.SLOT_LIMIT] = _poison(1, np.int32)
            self.role("LIMIT")
            limit = int(np.clip(self.scratch[abi.SLOT_LIMIT].view(np.int32)[0], 1, keys))
        k_at, v_at = self.core("KEY"), self.core("VALUE")
        rest = [r[0] for r in self.ranges]

        def matrix(access: np.void, axis: int, values: range) -> np.ndarray:
            """The operand over keys and one other axis."""
            at = []
            for s, x in itertools.product(range(limit), values):
                i = [*point, *rest[nb:]]
                i[key], i[axis] = s, x
                at.append(i)
            return self.elements(access, at).reshape(limit, len(values)).astype(np.float32)

        k, v = matrix(k_at, head, range(d)), matrix(v_at, column, range(*self.ranges[column]))
        acc = self.scratch[abi.SLOT_ACC] = _poison(n * keys, np.float32)
        live = len(self.points(rows))
        view = acc.view(np.float32).reshape(n, keys)
        view[:live, :limit] = q.view(np.float32).reshape(n, d)[:live] @ k.T
        self.ranges[key] = (0, limit)
        self.role("SCORE")
        s = view[:live, :limit]
        e = np.exp(s - s.max(axis=1, keepdims=True))
        view[:live, :limit] = e / e.sum(axis=1, keepdims=True, dtype=np.float32)
        self.role("PROB")
        out = self.scratch[abi.SLOT_ACC + 1] = _poison(n * dv, np.float32)
        out.view(np.float32).reshape(n, dv)[:live, : v.shape[1]] = view[:live, :limit] @ v
        self.role("EPILOGUE")

    def sort(self) -> None:
        last = int(self.op["n_axes"]) - 1
        dtype = _DTYPES[self.param("KEY_DTYPE")]
        count, out = self.param("COUNT"), self.core("OUT")
        ranges = list(self.ranges)
        for point in self.points(range(last)):
            for a, i in enumerate(point):
                self.ranges[a] = (i, i + 1)
            row = self.scratch[abi.SLOT_ACC] = _poison(int(self.op["extent"][last]), dtype)
            self.role("MAIN")
            row = row.view(dtype)
            order = np.argsort(row, kind="stable")
            if self.param("DESCENDING"):
                order = len(row) - 1 - np.argsort(row[::-1], kind="stable")[::-1]
            for i in range(count):
                value = order[i] if self.param("PAYLOAD") else row[order[i]]
                self.view(out)[self.address(out, (*point, i))] = value
            self.ranges = list(ranges)

    def scan(self) -> None:
        last = int(self.op["n_axes"]) - 1
        dtype = _DTYPES[self.param("REDUCE_DTYPE")]
        how = abi.ENUMS["ScanOp"][self.param("SCAN_OP")].lower()
        n, ranges = int(self.op["extent"][last]), list(self.ranges)
        assert self.ranges[last] == (0, n), "a row is not cut"
        _, neutral = _combine(how, dtype)
        for point in self.points(range(last)):
            for a, i in enumerate(point):
                self.ranges[a] = (i, i + 1)
            row = self.scratch[abi.SLOT_ACC] = _poison(n, dtype)
            self.role("MAIN")
            row = row.view(dtype)[:: -1 if self.param("REVERSE") else 1]
            for first in range(0, n, abi.SCAN_RUN):
                run, before = row[first : first + abi.SCAN_RUN], row[first - 1]
                acc = neutral
                for i, x in enumerate(run):
                    run[i] = acc = scalar.combine(how, np.asarray(acc), np.asarray(x))
                if first:
                    run[:] = scalar.combine(how, before, run)
            self.role("EPILOGUE")
            self.ranges = list(ranges)

    # ----------------------------------------------------------------------------------------------------------- memory

    def view(self, a: np.void) -> np.ndarray:
        """The memory behind an access as elements; those of its buffer that are before its slot are there, too."""
        slot, dtype = int(a["slot"]), _DTYPES[a["dtype"]]
        if slot >= abi.SLOT_ACT:
            return self.scratch[slot].view(dtype)
        assert slot < self.op["slots"]
        s = self.p["Slot"][int(self.op["slot"]) + slot]
        memory = self.memory[s["buffer"]]
        return memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)

    def base(self, a: np.void) -> int:
        """The element of `view` that an access starts from."""
        slot = int(a["slot"])
        if slot >= abi.SLOT_ACT:
            return int(a["offset"])
        offset, size = int(self.p["Slot"][int(self.op["slot"]) + slot]["offset"]), _DTYPES[a["dtype"]].itemsize
        assert offset % size == 0
        return offset // size + int(a["offset"])

    def address(self, a: np.void, point: Sequence[int]) -> int:
        at = self.base(a) + sum(int(s) * int(i) for s, i in zip(a["stride"], point, strict=False))
        assert 0 <= at < len(self.view(a)), f"element {at} of {len(self.view(a))}"
        return at

    def elements(self, a: np.void, points: Sequence[Sequence[int]]) -> np.ndarray:
        at = self.base(a) + np.array(points, np.int64) @ a["stride"][: len(points[0])]
        view = self.view(a)
        assert (at >= 0).all() and (at < len(view)).all(), "a core reads out of bounds"
        return view[at]


def _poison(n: int, dtype: np.dtype | type) -> np.ndarray:
    return np.full(n * np.dtype(dtype).itemsize, 0xFF, np.uint8)


class _Code:
    """One code on the ranges of the running task."""

    def __init__(self, m: _Machine, code: np.void):
        self.m, self.code = m, code
        self.n = int(code["n_axes"])
        self.accesses = m.p["Access"][code["access"] : code["access"] + code["accesses"]]
        self.stages = m.p["Stage"][code["stage"] : code["stage"] + code["stages"]]
        self.scalars = np.zeros(abi.MAX_REGS, np.uint32)

    def run(self) -> None:
        ranges = []
        for a, (lo, hi) in enumerate(self.m.ranges):
            if self.code["axes"] >> a & 1:
                ranges.append(range(max(lo, self.code["lo"][a]), min(hi, self.code["hi"][a])))
            else:
                ranges.append(range(lo, lo + 1))
        vector = int(self.code["vector"])
        self.strip = ranges[vector] if vector >= 0 else None
        if self.strip is not None:
            if not len(self.strip):
                return
            ranges[vector] = self.strip[:1]
        for point in itertools.product(*ranges):
            for s in self.stages:
                getattr(self, abi.ENUMS["StageKind"][s["kind"]].lower())(s, point)

    def scalar(self, s: np.void, point: tuple[int, ...]) -> None:
        self.execute(s, np.array([point], np.int64).reshape(1, self.n), self.scalars[:, None])

    def vector(self, s: np.void, point: tuple[int, ...]) -> None:
        assert self.strip is not None
        for first in range(0, len(self.strip), STRIP):
            lanes = np.array(self.strip[first : first + STRIP])
            where = np.tile(np.array(point, np.int64), (len(lanes), 1))
            where[:, int(self.code["vector"])] = lanes
            self.execute(s, where, np.full((abi.MAX_REGS, len(lanes)), 0xDEADBEEF, np.uint32))

    def reduce(self, s: np.void, point: tuple[int, ...]) -> None:
        axes = int(s["axes"])
        assert s["axis"] == self.n
        ranges = [range(int(lo), int(hi)) for lo, hi in zip(s["lo"][:axes], s["hi"][:axes], strict=True)]
        index = list(itertools.product(*ranges))
        where = np.array([(*point, *i) for i in index], np.int64).reshape(len(index), self.n + axes)
        regs = np.full((abi.MAX_REGS, len(index)), 0xDEADBEEF, np.uint32)
        self.execute(s, where, regs)
        name = abi.ENUMS["ReduceOp"][s["reduce"]].lower()
        dtype = {"f": np.float32, "i": np.int32, "u": np.uint32, "b": np.uint32}[_DTYPES[s["dtype"]].kind]
        row = regs[int(s["src"]) & ~abi.VECTOR_REG].view(dtype)
        if name.startswith("arg"):
            best = np.argmax(row) if name == "argmax" else np.argmin(row)
            self.scalars[s["dst"]] = index[int(best)][0]
            return
        combine, neutral = _combine(name, np.dtype(dtype))
        partial = [neutral] * abi.LANES
        for i, x in enumerate(row):
            partial[i % abi.LANES] = combine(partial[i % abi.LANES], x)
        while len(partial) > 1:
            half = len(partial) // 2
            partial = [combine(partial[j], partial[j + half]) for j in range(half)]
        value = partial[0]
        if s["flags"] & abi.ACCUMULATE:
            value = combine(self.scalars[s["dst"] : s["dst"] + 1].view(dtype)[0], value)
        self.scalars[s["dst"]] = np.array([value], dtype).view(np.uint32)[0]

    def execute(self, s: np.void, where: np.ndarray, regs: np.ndarray) -> None:
        """The instructions of a stage; `where` is the point of every lane, `regs` the file of its results."""
        lanes = len(where)
        is_vector = abi.ENUMS["StageKind"][s["kind"]] != "SCALAR"

        def read(r: int) -> np.ndarray:
            if r & abi.VECTOR_REG:
                return regs[r & ~abi.VECTOR_REG].copy()
            return np.full(lanes, self.scalars[r], np.uint32)

        for i in self.m.p["Instr"][s["first"] : s["first"] + s["count"]]:
            name = _OPS[i["op"]]
            srcs = [read(int(i[f])) for f in "abc"[: abi.ARITY[i["op"]]]]
            if name == "CONST":
                out = np.full(lanes, i["imm"], np.uint32)
            elif name == "INDEX":
                stride = self.accesses[i["aux"]]["stride"][: where.shape[1]]
                out = (int(i["imm"]) + where @ stride).astype(np.uint32)
            elif name == "LOAD" or name.startswith("STORE"):
                a = self.accesses[i["aux"]]
                at = self.addresses(a, where, read)
                view = self.m.view(a)
                if name != "LOAD":
                    _store(name, view, at, srcs)
                    continue
                assert (at >= 0).all() and (at < len(view)).all(), "a load out of bounds"
                out = view[at].astype(_REGISTER[view.dtype.kind]).view(np.uint32)
            elif name == "MOVE":
                out = srcs[0]
            elif name == "SELECT":
                out = np.where(srcs[0] != 0, srcs[1], srcs[2])
            else:
                out = _operate(name, srcs)
            dst = int(i["dst"])
            assert bool(dst & abi.VECTOR_REG) == is_vector
            regs[dst & ~abi.VECTOR_REG] = out

    def addresses(self, a: np.void, where: np.ndarray, read) -> np.ndarray:
        point = where.copy()
        if a["slot"] >= abi.SLOT_ACT:
            point[:, : self.n] -= np.array([lo for lo, _ in self.m.ranges], np.int64)[None]
        at = self.m.base(a) + point @ a["stride"][: point.shape[1]]
        for d in range(a["n_dyn"]):
            at = at + int(a["dyn_stride"][d]) * np.clip(read(int(a["dyn_reg"][d])).view(np.int32), 0, a["dyn_limit"][d])
        return at


def _store(name: str, view: np.ndarray, at: np.ndarray, srcs: list[np.ndarray]) -> None:
    dtype = _REGISTER[view.dtype.kind]
    value = srcs[0].view(dtype)
    keep = np.ones(len(at), bool) if name == "STORE" else srcs[1] != 0
    for j in range(len(at)):
        if keep[j]:
            assert 0 <= at[j] < len(view), "a store out of bounds"
            new = value[j]
            if name in abi.COMBINES.values():
                old = view[at[j]].astype(dtype)
                new = scalar.binary(name.removeprefix("STORE_").lower(), np.asarray(old), np.asarray(new))
            view[at[j]] = np.asarray(new).astype(view.dtype)


def _operate(name: str, srcs: list[np.ndarray]) -> np.ndarray:
    kind, op = name.split("_", 1)
    dtype = {"F": np.float32, "I": np.int32, "U": np.uint32, "B": np.bool_}[kind]
    x = [(s != 0) if kind == "B" else s.view(dtype) for s in srcs]
    if name == "F_POW_I":
        x[1] = srcs[1].view(np.int32)
    if len(x) == 1:
        out = scalar.unary(_UNARY.get(name, op.lower()), x[0])
    else:
        out = scalar.binary(_NAMES.get(name, op.lower()), x[0], x[1])
    out = np.asarray(out)
    return (out.astype(np.uint32) if out.dtype == np.bool_ else np.ascontiguousarray(out).view(np.uint32)).reshape(-1)


def _combine(name: str, dtype: np.dtype):
    real = dtype.kind == "f"
    low, high = (-np.inf, np.inf) if real else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if name == "logsumexp":
        return np.logaddexp, dtype.type(-np.inf)
    f = {"sum": np.add, "prod": np.multiply, "max": scalar.maximum, "min": scalar.minimum, "and": np.bitwise_and,
         "or": np.bitwise_or}[name]  # fmt: skip
    neutral = {"sum": 0, "prod": 1, "max": low, "min": high, "and": high if dtype.kind == "u" else -1, "or": 0}[name]
    return f, dtype.type(neutral)
