"""What the tasks of one operator read and store, read off the code that will run: nothing the compiler said is believed.

`touches` gives every access of an operator record in the blob: the loads and stores of its codes, over the ranges in
which they run, and the operands and results of its core. Scratch has no place in the task graph, so what a role leaves
there for the core is proven here: its codes store every element of the tile, and each once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from jax_mpk import abi
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, UPDATE, WRITE

Dims = tuple[tuple[int, int, int, int], ...]
"""(loop axis or -1, stride in bytes, lo, hi): the index runs over lo..hi-1, of a loop axis inside the task's range."""
Range = tuple[int, int]


@dataclass(frozen=True)
class Touch:
    """One access: `slot` of the operator, `mode` as in `Boxes`, `item` bytes at `offset` and along `dims`."""

    slot: int
    mode: int
    item: int
    offset: int
    dims: Dims


_KIND = {n: name for n, name in enumerate(abi.ENUMS["Kind"])}
_ROLE = {name: n for n, name in enumerate(abi.ENUMS["Role"])}
_STORES = {abi.enum("Opcode", "STORE"): "set", abi.enum("Opcode", "STORE_IF"): "where",
           **{abi.enum("Opcode", op): mode for mode, op in abi.COMBINES.items()}}  # fmt: skip
_LOAD = abi.enum("Opcode", "LOAD")
_REDUCE = abi.enum("StageKind", "REDUCE")
_BYTES = {"F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Operator:
    """An operator record of a program, and the sections that it points into."""

    def __init__(self, program: abi.Program, op: np.void, name: str):
        self.p, self.op, self.name = program, op, name
        self.kind, self.axes = _KIND[int(op["kind"])], int(op["n_axes"])
        self.extent = op["extent"][: self.axes].tolist()
        self.tile = [min(t, e) for t, e in zip(op["tile"][: self.axes].tolist(), self.extent, strict=True)]

    @property
    def repeated(self) -> range:
        """The axes of which a task runs its codes for one point after the other."""
        return range(
            {"CONTRACT": self.param("N_BATCH"), "SORT": self.axes - 1, "SCAN": self.axes - 1}.get(self.kind, 0)
        )

    def fail(self, text: str) -> NoReturn:
        raise VerifyError(f"operator {self.name}: {text}")

    def param(self, name: str) -> int:
        return int(self.op["params"][abi.enum("Param", name)])

    def codes(self, role: str) -> range:
        first = int(self.op["code"][_ROLE[role]])
        return range(first, first + int(self.op["codes"][_ROLE[role]]))

    def has(self, role: str) -> bool:
        return len(self.codes(role)) > 0


def touches(program: abi.Program, op: np.void, name: str) -> list[Touch]:
    """The accesses of an operator to memory, without repetitions. Raises `VerifyError` for a role that leaves a hole in
    scratch, and for a core whose operands do not lie as it walks them."""
    x = Operator(program, op, name)
    return list(dict.fromkeys(_KINDS[x.kind](x)))


# ---------------------------------------------------------------------------------------------------------------- kinds


def _nop(x: Operator) -> Iterator[Touch]:
    yield from ()


def _rows(x: Operator) -> Iterator[Touch]:
    yield from accessed(x, "MAIN", bool(int(x.op["flags"]) & abi.IN_PLACE))


def _contract(x: Operator) -> Iterator[Touch]:
    batch, m, n, k = (x.param(f"N_{r}") for r in ("BATCH", "M", "N", "K"))
    if batch + m + n + k != x.axes or x.param("N_RHS") < 1:
        x.fail(f"{x.axes} axes are not {batch} + {m} + {n} + {k}")
    rows, columns, inner = range(batch, batch + m), range(batch + m, x.axes - k), range(x.axes - k, x.axes)
    _tiled_first(x, rows)
    _tiled_first(x, columns)
    _tiled_first(x, inner, whole=True)
    for j in range(x.param("N_RHS")):
        a = core(x, f"RHS{j}")
        for axes in (columns, inner):
            _one_stride(x, a, axes, f"right side {j}")
        yield _touch(x, a, READ, [(0, e) for e in x.extent])
    _fills(x, "LHS", abi.SLOT_ACT, rows, inner, batch)
    yield from accessed(x, "LHS")
    yield from accessed(x, "EPILOGUE")


def _attention(x: Operator) -> Iterator[Touch]:
    batch, rows_ = x.param("N_BATCH"), x.param("N_ROWS")
    column, key, head = batch + rows_, batch + rows_ + 1, batch + rows_ + 2
    if head >= x.axes:
        x.fail(f"{x.axes} axes are too few for {batch} batch and {rows_} row axes")
    rows = range(batch, column)
    _tiled_first(x, rows)
    _tiled_first(x, range(key, x.axes), whole=True)
    if any(t != 1 for t in x.tile[:batch]):
        x.fail("a batch axis is not cut into single points")
    for name in ("KEY", "VALUE"):
        yield _touch(x, core(x, name), READ, [(0, e) for e in x.extent])
    for j in range(4):
        yield from accessed(x, f"APPEND{j}", True)
    _fills(x, "Q", abi.SLOT_ACT, rows, range(head, head + 1), batch)
    for role in ("SCORE", "PROB"):
        if x.has(role):
            _fills(x, role, abi.SLOT_ACC, rows, range(key, key + 1), batch)
    for role in ("Q", "SCORE", "PROB", "LIMIT", "EPILOGUE"):
        yield from accessed(x, role)


def _sort(x: Operator) -> Iterator[Touch]:
    yield from _row(x)
    yield _touch(x, core(x, "OUT"), WRITE, [*((0, e) for e in x.extent[:-1]), (0, x.param("COUNT"))])


def _scan(x: Operator) -> Iterator[Touch]:
    yield from _row(x)
    yield from accessed(x, "EPILOGUE")


def _row(x: Operator) -> Iterator[Touch]:
    """MAIN leaves whole rows, along the last axis, in ACC."""
    last = x.axes - 1
    if last < 0:
        x.fail("a core of rows without one")
    _tiled_first(x, range(last, x.axes), whole=True)
    _fills(x, "MAIN", abi.SLOT_ACC, range(0), range(last, x.axes), last)
    yield from accessed(x, "MAIN")


_KINDS = {"NOP": _nop, "ROWS": _rows, "CONTRACT": _contract, "ATTENTION": _attention, "SORT": _sort, "SCAN": _scan}


def core(x: Operator, name: str) -> np.void:
    """The access that the core of an operator makes as parameter `name`."""
    number = x.param(name)
    if not 0 <= number < x.op["accesses"]:
        x.fail(f"{name} is access {number} of {x.op['accesses']}")
    a: np.void = x.p["Access"][int(x.op["access"]) + number]
    if a["n_dyn"] or a["slot"] >= abi.SLOT_ACT:
        x.fail(f"{name} is not a plain access to memory")
    return a


def _tiled_first(x: Operator, axes: range, whole: bool = False) -> None:
    """A task's part of these axes, flattened, is one range: single steps, then one axis that is cut, then whole axes."""
    cut = [x.tile[a] < x.extent[a] for a in axes]
    single = [x.tile[a] == 1 for a in axes]
    first = next((n for n, s in enumerate(single) if not s), len(cut))
    if any(cut[first + 1 :]) or (whole and any(cut)):
        x.fail(
            f"axes {axes.start} to {axes.stop - 1} are cut into {x.tile} of {x.extent}, which the core does not follow"
        )


def _one_stride(x: Operator, a: np.void, axes: range, what: str) -> None:
    """A core walks the flattened axes by the stride of the last one."""
    step: int | None = None
    for axis in reversed(axes):
        if x.extent[axis] > 1:
            own = int(a["stride"][axis])
            if step is not None and own != step:
                x.fail(f"{what} does not lie along axis {axis} as the core walks it: its stride is {own}, not {step}")
            step = own * x.extent[axis]


# ---------------------------------------------------------------------------------------------------------------- codes


def accessed(x: Operator, name: str, in_place: bool = False) -> Iterator[Touch]:
    """What the codes of a role touch."""
    for how, a, over in accesses(x, name):
        plain = how == "set" and not a["n_dyn"] and not in_place
        yield _touch(x, a, READ if not how else WRITE if plain else UPDATE, over)


def accesses(x: Operator, name: str) -> Iterator[tuple[str, np.void, list[Range]]]:
    """("" for a load or the mode of a store, access, ranges) of what the codes of a role do to memory."""
    for number in x.codes(name):
        code, ranges = _code(x, number)
        if ranges is None:
            continue
        own = x.p["Access"][int(code["access"]) : int(code["access"] + code["accesses"])]
        for op, aux, over in _memory(x, code, ranges):
            if own[aux]["slot"] < abi.SLOT_ACT:
                yield _STORES.get(op, ""), own[aux], over


def _code(x: Operator, number: int) -> tuple[np.void, list[Range] | None]:
    """The record, and its range along every loop axis (an axis that it does not loop over: a single point, marked by
    lo == hi); None if it never runs."""
    if number >= len(x.p["Code"]):
        x.fail(f"code {number} of {len(x.p['Code'])}")
    code = x.p["Code"][number]
    if code["n_axes"] != x.axes:
        x.fail(f"code {number} has {code['n_axes']} axes")
    mask, ranges = int(code["axes"]), []
    for a in range(x.axes):
        lo, hi = max(0, int(code["lo"][a])), min(int(code["hi"][a]), x.extent[a])
        if not mask >> a & 1:
            if a in x.repeated and x.extent[a] > 1:
                x.fail(f"code {number} does not loop over axis {a}, along which its task repeats it")
            ranges.append((0, 0))
        elif hi <= lo:
            return code, None
        else:
            ranges.append((lo, hi))
    return code, ranges


def _memory(x: Operator, code: np.void, ranges: list[Range]) -> Iterator[tuple[int, int, list[Range]]]:
    """(opcode, access, ranges of loop and reduction axes) of every load and store of a code."""
    for s in x.p["Stage"][int(code["stage"]) : int(code["stage"] + code["stages"])]:
        over = list(ranges)
        if s["kind"] == _REDUCE:
            bound = [(int(lo), int(hi)) for lo, hi in zip(s["lo"], s["hi"], strict=True)][: int(s["axes"])]
            if int(s["axis"]) != x.axes or any(hi <= lo for lo, hi in bound):
                continue
            over += bound
        instrs = x.p["Instr"][int(s["first"]) : int(s["first"] + s["count"])]
        ops = instrs["op"]
        for i in np.flatnonzero((ops == _LOAD) | np.isin(ops, list(_STORES))).tolist():
            yield int(ops[i]), int(instrs["aux"][i]), over


def _touch(x: Operator, a: np.void, mode: int, ranges: Sequence[Range]) -> Touch:
    item = _BYTES[abi.ENUMS["Dtype"][int(a["dtype"])]]
    dims = []
    for axis, (lo, hi) in enumerate(ranges):
        stride = int(a["stride"][axis]) * item
        if stride and (axis >= x.axes or x.extent[axis] > 1):
            dims.append((axis if axis < x.axes else -1, stride, lo, hi))
        elif not stride and mode == WRITE and hi - lo > 1:
            x.fail(f"a store writes one element {hi - lo} times along axis {axis}")
    for d in range(int(a["n_dyn"])):
        dims.append((-1, int(a["dyn_stride"][d]) * item, 0, int(a["dyn_limit"][d]) + 1))
    return Touch(int(a["slot"]), mode, item, int(a["offset"]) * item, tuple(dims))


def _fills(x: Operator, role: str, slot: int, outer: range, inner: range, batch: int) -> None:
    """The codes of a role store every element of a scratch matrix [outer][inner] of the tile, each once."""
    axes = [*range(batch), *outer, *inner]
    strides, step = {}, 1
    for a in reversed([*outer, *inner]):
        strides[a] = step if x.extent[a] > 1 else 0
        step *= x.tile[a]
    boxes: list[list[Range]] = []
    for number in x.codes(role):
        code, ranges = _code(x, number)
        if ranges is None:
            continue
        accesses = x.p["Access"][int(code["access"]) : int(code["access"] + code["accesses"])]
        stores = [(op, accesses[aux]) for op, aux, _ in _memory(x, code, ranges) if op in _STORES]
        if len(stores) != 1 or _STORES[stores[0][0]] != "set":
            x.fail(f"code {number} of {role} does not store its result once")
        a = stores[0][1]
        own = {n: int(a["stride"][n]) for n in range(x.axes) if a["stride"][n] and x.extent[n] > 1}
        if a["slot"] != slot or a["offset"] or a["n_dyn"] or own != {n: s for n, s in strides.items() if s}:
            x.fail(f"code {number} of {role} does not store where the core reads")
        boxes.append([r if r != (0, 0) else (0, 1) for r in (ranges[n] for n in axes)])
    volume = sum(math.prod(hi - lo for lo, hi in b) for b in boxes)
    space = math.prod(x.extent[a] for a in axes)
    clash = any(
        all(p[0] < q[1] and q[0] < p[1] for p, q in zip(one, two, strict=True))
        for n, one in enumerate(boxes)
        for two in boxes[:n]
    )
    if volume != space or clash:
        x.fail(f"the codes of {role} store {volume} of {space} elements{', some of them twice' if clash else ''}")


def expand(extent: Sequence[int], tile: Sequence[int], parts: Sequence[Touch]) -> np.ndarray:
    """The boxes of every task of a grid: rows of (task, slot, mode, offset, run, 4 counts, 4 strides), sorted by task."""
    tiles = [-(-e // t) for e, t in zip(extent, tile, strict=True)]
    tasks = math.prod(tiles)
    digits: Any = np.unravel_index(np.arange(tasks), tiles) if tiles else ()
    rows = [np.zeros((0, 13), np.int64)]
    for x in parts:
        offset, counts = np.full(tasks, x.offset, np.int64), np.ones((tasks, len(x.dims)), np.int64)
        for d, (axis, stride, lo, hi) in enumerate(x.dims):
            first, last = np.full(tasks, lo), np.full(tasks, hi)
            if axis >= 0:
                start = digits[axis] * tile[axis]
                if lo == hi:  # the code does not loop: it stays at the start of the task's range
                    first, last = start, start + 1
                else:
                    first, last = np.maximum(lo, start), np.minimum(hi, start + tile[axis])
            offset += first * stride
            counts[:, d] = last - first
        kinds, kind = np.unique(counts, axis=0, return_inverse=True)
        for n, count in enumerate(kinds.tolist()):
            if min(count, default=1) <= 0:
                continue
            task = np.flatnonzero(kind.reshape(-1) == n)
            for at, run, dims in _box(x, [(c, d[1]) for c, d in zip(count, x.dims, strict=True)]):
                pad = [(1, 0)] * (4 - len(dims))
                tail = np.array([run, *(c for c, _ in (*dims, *pad)), *(s for _, s in (*dims, *pad))], np.int64)
                head = np.column_stack([task, np.full((len(task), 2), (x.slot, x.mode)), offset[task] + at])
                rows.append(np.hstack([head, np.broadcast_to(tail, (len(task), len(tail)))]))
    return np.unique(np.concatenate(rows), axis=0)


def _box(x: Touch, dims: list[tuple[int, int]]) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(offset, run, dims) of the boxes of an access; a write exactly, others at least, within the same first and last
    byte."""
    at = sum((c - 1) * s for c, s in dims if s < 0)
    run = x.item
    levels: list[tuple[int, int]] = []
    for c, s in sorted(((c, abs(s)) for c, s in dims if c > 1 and s), key=lambda d: d[1]):
        span = run + sum((n - 1) * t for n, t in levels)
        if not levels and (s == run or (s < run and x.mode == READ)):
            run += (c - 1) * s
        elif levels and s == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * c, levels[-1][1])
        elif levels and x.mode != WRITE and s % levels[-1][1] == 0 and s < levels[-1][0] * levels[-1][1]:
            n, t = levels[-1]  # windows that overlap by whole steps: all steps from the first to the last
            levels[-1] = (n + (c - 1) * (s // t), t)
        elif s < span and x.mode != WRITE:
            run, levels = span + (c - 1) * s, []
        else:
            levels.append((c, s))
    boxes = [(at, run, levels)]
    while len(boxes[0][2]) > 4:
        if x.mode == WRITE:
            n = min(range(len(levels)), key=lambda j: boxes[0][2][j][0])
            boxes = [(a + j * d[n][1], r, d[:n] + d[n + 1 :]) for a, r, d in boxes for j in range(d[n][0])]
        else:
            (a, r, ((c, s), *rest)) = boxes[0]
            r += (c - 1) * s
            while rest and rest[0][1] <= r:
                (c, s), *rest = rest
                r += (c - 1) * s
            boxes = [(a, r, rest)]
    return [(a, r, d[::-1]) for a, r, d in boxes]
