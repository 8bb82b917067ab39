"""Small programs built by hand, for tests of the CUDA backend that do not need the compiler, with NumPy references."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from jax_mpk import abi

V = abi.VECTOR_REG
SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "BOOL": 1, "U32": 4}


@dataclass
class Builder:
    """Collects records; `finish` makes the blob. Registers: ints are scalar, `V | n` vector."""

    rows: dict[str, list] = field(default_factory=lambda: {k: [] for k in abi.SECTIONS})
    names: bytes = b""
    args: int = 0
    results: int = 0
    workspace: int = 0

    def name(self, text: str) -> int:
        at = len(self.names)
        self.names += text.encode() + b"\0"
        return at

    def buffer(self, space: str, dtype: str, *shape: int, alias: int = -1) -> int:
        nbytes = math.prod(shape) * SIZES[dtype]
        r = np.zeros((), abi.RECORDS["Buffer"])
        index = offset = 0
        if space == "ARG":
            index, self.args = self.args, self.args + 1
        elif space == "RESULT":
            index, self.results = self.results, self.results + 1
        else:
            offset, self.workspace = self.workspace, self.workspace + -(-nbytes // 256) * 256
        r["space"], r["dtype"], r["index"], r["offset"] = (
            abi.enum("Space", space),
            abi.enum("Dtype", dtype),
            index,
            offset,
        )
        r["bytes"], r["alias"], r["name"] = nbytes, alias, self.name(f"b{len(self.rows['Buffer'])}")
        self.rows["Buffer"].append(r)
        return len(self.rows["Buffer"]) - 1

    def access(
        self, slot: int, dtype: str, strides: dict[int, int], offset: int = 0, dyn: list[tuple[int, int, int]] = ()
    ) -> np.void:
        r = np.zeros((), abi.RECORDS["Access"])
        r["slot"], r["dtype"], r["offset"], r["n_dyn"] = slot, abi.enum("Dtype", dtype), offset, len(dyn)
        for a, s in strides.items():
            r["stride"][a] = s
        for j, (register, limit, stride) in enumerate(dyn):
            r["dyn_reg"][j], r["dyn_limit"][j], r["dyn_stride"][j] = register, limit, stride
        return r

    def instr(
        self, op: str, dst: int = 0, a: int = 0, b: int = 0, c: int = 0, aux: int = 0, imm: float | int = 0
    ) -> np.void:
        r = np.zeros((), abi.RECORDS["Instr"])
        bits = int(np.float32(imm).view(np.uint32)) if isinstance(imm, float) else int(np.int64(imm) & 0xFFFFFFFF)
        r["op"], r["dst"], r["a"], r["b"], r["c"], r["aux"], r["imm"] = abi.enum("Opcode", op), dst, a, b, c, aux, bits
        return r

    def code(
        self, n_axes: int, axes: list[int], vector: int, accesses: list[np.void], stages: list[tuple], extent: list[int]
    ) -> int:
        """`stages`: ("SCALAR" | "VECTOR", instrs) or ("REDUCE", instrs, op, [(lo, hi)], src, dst)."""
        c = np.zeros((), abi.RECORDS["Code"])
        c["stage"], c["stages"], c["access"], c["accesses"] = (
            len(self.rows["Stage"]),
            len(stages),
            len(self.rows["Access"]),
            len(accesses),
        )
        c["axes"], c["vector"], c["n_axes"] = sum(1 << a for a in axes), vector, n_axes
        c["scalar_regs"] = c["vector_regs"] = 32
        c["hi"][: len(extent)] = extent
        self.rows["Access"] += accesses
        for kind, instrs, *more in stages:
            s = np.zeros((), abi.RECORDS["Stage"])
            s["kind"], s["first"], s["count"] = abi.enum("StageKind", kind), len(self.rows["Instr"]), len(instrs)
            if kind == "REDUCE":
                op, ranges, src, dst = more[:4]
                dtype = more[4] if len(more) > 4 else "F32"
                s["reduce"], s["dtype"], s["axis"], s["axes"] = (
                    abi.enum("ReduceOp", op),
                    abi.enum("Dtype", dtype),
                    n_axes,
                    len(ranges),
                )
                s["src"], s["dst"] = src, dst
                for j, (lo, hi) in enumerate(ranges):
                    s["lo"][j], s["hi"][j] = lo, hi
            self.rows["Instr"] += instrs
            self.rows["Stage"].append(s)
        self.rows["Code"].append(c)
        return len(self.rows["Code"]) - 1

    def op(self, kind: str, name: str, extent: list[int], tile: list[int], slots: list[int], codes: dict[str, list[int]],
           params: dict[str, int] = {}, accesses: list[np.void] = (), prologue: int = 0) -> int:  # fmt: skip
        r = np.zeros((), abi.RECORDS["Op"])
        r["kind"], r["n_axes"], r["prologue"], r["name"] = (
            abi.enum("Kind", kind),
            len(extent),
            prologue,
            self.name(name),
        )
        r["slot"], r["slots"] = len(self.rows["Slot"]), len(slots)
        r["access"], r["accesses"] = len(self.rows["Access"]), len(accesses)
        self.rows["Access"] += list(accesses)
        for s in slots:
            x = np.zeros((), abi.RECORDS["Slot"])
            x["buffer"] = s
            self.rows["Slot"].append(x)
        r["extent"][: len(extent)], r["tile"][: len(tile)] = extent, tile
        for role, numbers in codes.items():
            r["code"][abi.enum("Role", role)], r["codes"][abi.enum("Role", role)] = numbers[0], len(numbers)
        for p, v in params.items():
            r["params"][abi.enum("Param", p)] = v
        self.rows["Op"].append(r)
        return len(self.rows["Op"]) - 1

    def tasks(self, op: int, workers: int, waits: list[int] = (), triggers: list[int] = ()) -> list[int]:
        """All tasks of `op`, dealt round; each waits for and triggers these events (thresholds are counted)."""
        r = self.rows["Op"][op]
        count = math.prod(
            -(-int(e) // max(1, int(t)))
            for e, t in zip(r["extent"][: r["n_axes"]], r["tile"][: r["n_axes"]], strict=True)
        )
        out = []
        for i in range(count):
            t = np.zeros((), abi.RECORDS["Task"])
            t["op"], t["index"], t["worker"] = op, i, (len(self.rows["Task"])) % workers
            t["n_waits"], t["n_triggers"] = len(waits), len(triggers)
            t["wait"][: len(waits)], t["trigger"][: len(triggers)] = waits, triggers
            t["want"][: len(waits)] = [int(self.rows["Event"][e]["threshold"]) for e in waits]
            for e in triggers:
                self.rows["Event"][e]["threshold"] += 1
            out.append(len(self.rows["Task"]))
            self.rows["Task"].append(t)
        return out

    def event(self) -> int:
        self.rows["Event"].append(np.zeros((), abi.RECORDS["Event"]))
        return len(self.rows["Event"]) - 1

    def stream(self, tasks: list[int], buffer: int, n: int, k: int, columns_inner: bool) -> None:
        """Streams a bf16 matrix [k, n] (`columns_inner`) or [n, k] into contraction tasks of 64 columns each."""
        m = np.zeros((), abi.RECORDS["TensorMap"])
        m["buffer"], m["dtype"], m["rank"] = buffer, abi.enum("Dtype", "BF16"), 2 if columns_inner else 3
        if columns_inner:
            m["dims"][:2], m["strides"][:2], m["box"][:2] = (n, k), (2, n * 2), (64, 128)
        else:
            m["dims"][:3], m["strides"][:3], m["box"][:3] = (64, n, k // 64), (2, k * 2, 128), (64, 64, 2)
        self.rows["TensorMap"].append(m)
        for i, t in enumerate(tasks):
            s = np.zeros((), abi.RECORDS["Stream"])
            s["task"], s["map"], s["frames"] = t, len(self.rows["TensorMap"]) - 1, -(-k // 128)
            if columns_inner:
                s["start"][:2], s["step"][:2] = (i * 64, 0), (0, 128)
            else:
                s["start"][:3], s["step"][:3] = (0, i * 64, 0), (0, 0, 2)
            self.rows["Stream"].append(s)

    def finish(self, workers: int) -> bytes:
        sections = {k: np.array(v, abi.RECORDS[k]) if v else np.zeros(0, abi.RECORDS[k]) for k, v in self.rows.items()}
        sections["Name"] = np.frombuffer(self.names, abi.RECORDS["Name"]) if self.names else sections["Name"]
        return abi.encode(
            sections, workspace=self.workspace, workers=workers, args=self.args, results=self.results, ranks=1
        )


def decoder_step(batch: int = 1, d: int = 2048, ff: int = 4096, layers: int = 2, workers: int = 132, columns_inner: bool = True,
                 dtype: str = "BF16", stream: bool = True,
                 lose_event: bool = False) -> bytes:  # fmt: skip
    """x -> layers of x + down(silu(gate(norm x)) * up(norm x)); operands x f32[batch, d], then gate, up, down a layer."""
    b = Builder()
    x = b.buffer("ARG", "F32", batch, d)
    weights = [
        [b.buffer("ARG", dtype, d, ff), b.buffer("ARG", dtype, d, ff), b.buffer("ARG", dtype, ff, d)]
        for _ in range(layers)
    ]
    y = b.buffer("RESULT", "F32", batch, d)
    codes: dict[tuple, int] = {}
    before: list[int] = []
    round_ = [b.instr("F_ROUND_BF16", V | 3, V | 3)] if dtype == "BF16" else []
    for n in range(layers):
        h = b.buffer("WORKSPACE", "F32", batch, ff)
        out = y if n == layers - 1 else b.buffer("WORKSPACE", "F32", batch, d)
        gate, up, down = weights[n]
        # gate and up: axes m, n, k; prologue RMS norm of x, epilogue silu(gate) * up
        if "lhs" not in codes:
            load = b.instr("LOAD", V | 1, aux=0)
            codes["lhs"] = b.code(3, [0, 2], 2,
                [b.access(0, "F32", {0: d, 3: 1}), b.access(0, "F32", {0: d, 2: 1}), b.access(abi.SLOT_ACT, "F32", {0: d, 2: 1})],
                [("REDUCE", [load, b.instr("F_MUL", V | 2, V | 1, V | 1)], "SUM", [(0, d)], V | 2, 0),
                 ("SCALAR", [b.instr("CONST", 1, imm=1.0 / d), b.instr("F_MUL", 0, 0, 1), b.instr("CONST", 2, imm=1e-6),
                             b.instr("F_ADD", 0, 0, 2), b.instr("F_RSQRT", 3, 0)]),
                 ("VECTOR", [b.instr("LOAD", V | 1, aux=1), b.instr("F_MUL", V | 3, V | 1, 3), *round_,
                             b.instr("STORE", a=V | 3, aux=2)])], [batch, ff, d])  # fmt: skip
            codes["glu"] = b.code(3, [0, 1], 1,
                [b.access(abi.SLOT_ACC, "F32", {0: 64, 1: 1}), b.access(abi.SLOT_ACC + 1, "F32", {0: 64, 1: 1}),
                 b.access(3, "F32", {0: ff, 1: 1})],
                [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("LOAD", V | 1, aux=1), b.instr("F_LOGISTIC", V | 2, V | 0),
                             b.instr("F_MUL", V | 2, V | 2, V | 0), b.instr("F_MUL", V | 2, V | 2, V | 1),
                             b.instr("STORE", a=V | 2, aux=2)])], [batch, ff, d])  # fmt: skip
            codes["act"] = b.code(3, [0, 2], 2, [b.access(0, "F32", {0: ff, 2: 1}), b.access(abi.SLOT_ACT, "F32", {0: ff, 2: 1})],
                [("VECTOR", [b.instr("LOAD", V | 3, aux=0), *round_, b.instr("STORE", a=V | 3, aux=1)])], [batch, d, ff])  # fmt: skip
            codes["add"] = b.code(3, [0, 1], 1,
                [b.access(abi.SLOT_ACC, "F32", {0: 64, 1: 1}), b.access(2, "F32", {0: d, 1: 1}), b.access(3, "F32", {0: d, 1: 1})],
                [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("LOAD", V | 1, aux=1), b.instr("F_ADD", V | 0, V | 0, V | 1),
                             b.instr("STORE", a=V | 0, aux=2)])], [batch, d, ff])  # fmt: skip

        def rhs(slot: int, columns: int, depth: int) -> np.void:
            return b.access(slot, dtype, {1: 1, 2: columns} if columns_inner else {1: depth, 2: 1})

        common = {"N_BATCH": 0, "N_M": 1, "N_N": 1, "N_K": 1, "REDUCE_DTYPE": abi.enum("Dtype", "F32")}
        glu = b.op("CONTRACT", f"glu{n}", [batch, ff, d], [batch, 64, d], [x, gate, up, h],
                   {"LHS": [codes["lhs"]], "EPILOGUE": [codes["glu"]]}, common | {"N_RHS": 2, "RHS0": 0, "RHS1": 1},
                   [rhs(1, ff, d), rhs(2, ff, d)], prologue=2 * n + 1)  # fmt: skip
        done = b.event()
        tasks = b.tasks(glu, workers, before, [done])
        if stream:
            _pair(b, tasks, gate, up, ff, d, columns_inner)
        if lose_event:
            b.rows["Event"][done]["threshold"] += 1
        ready = b.event()
        dn = b.op("CONTRACT", f"down{n}", [batch, d, ff], [batch, 64, ff], [h, down, x, out],
                  {"LHS": [codes["act"]], "EPILOGUE": [codes["add"]]}, common | {"N_RHS": 1, "RHS0": 0}, [rhs(1, d, ff)],
                  prologue=2 * n + 2)  # fmt: skip
        tasks = b.tasks(dn, workers, [done], [ready])
        if stream:
            b.stream(tasks, down, d, ff, columns_inner)
        x, before = out, [ready]
    return b.finish(workers)


def _pair(b: Builder, tasks: list[int], first: int, second: int, n: int, k: int, columns_inner: bool) -> None:
    """Two operands of the same tasks, the entries of a task together."""
    at = len(b.rows["Stream"])
    b.stream(tasks, first, n, k, columns_inner)
    b.stream(tasks, second, n, k, columns_inner)
    made = b.rows["Stream"][at:]
    b.rows["Stream"][at:] = [s for pair in zip(made[: len(tasks)], made[len(tasks) :], strict=True) for s in pair]


def decoder_reference(x: np.ndarray, weights: list[np.ndarray], round_: bool = True) -> np.ndarray:
    """The same in NumPy, f64 sums, activations rounded to bf16 where the program rounds them."""
    import ml_dtypes

    r = (lambda a: a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)) if round_ else (lambda a: a)
    x = x.astype(np.float64)
    for n in range(len(weights) // 3):
        gate, up, down = (w.astype(np.float64) for w in weights[3 * n : 3 * n + 3])
        h = r(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6))
        g, u = h @ gate, h @ up
        x = x + r(g / (1 + np.exp(-g)) * u) @ down
    return x


def attention_step(B: int, H: int, G: int, D: int, S: int, dtype: str = "BF16", workers: int = 132) -> bytes:
    """Decode attention: operands q f32[B,H,G,D], k, v f32[B,H,D], position i32[B], caches [B,S,H,D] (donated as 1, 2)."""
    b = Builder()
    q, k, v = b.buffer("ARG", "F32", B, H, G, D), b.buffer("ARG", "F32", B, H, D), b.buffer("ARG", "F32", B, H, D)
    pos = b.buffer("ARG", "I32", B)
    b.args += 2
    out = b.buffer("RESULT", "F32", B, H, G, D)
    kc, vc = b.buffer("RESULT", dtype, B, S, H, D, alias=4), b.buffer("RESULT", dtype, B, S, H, D, alias=5)
    extent = [B, H, G, D, S, D, D]
    cache = {0: S * H * D, 1: D}

    def append(new: int, to: int) -> int:
        return b.code(7, [0, 1, 6], 6,
            [b.access(3, "I32", {0: 1}), b.access(new, "F32", {0: H * D, 1: D, 6: 1}),
             b.access(to, dtype, cache | {6: 1}, dyn=[(0, S - 1, H * D)])],
            [("SCALAR", [b.instr("LOAD", 0, aux=0)]), ("VECTOR", [b.instr("LOAD", V | 0, aux=1), b.instr("STORE", a=V | 0, aux=2)])],
            extent)  # fmt: skip

    codes = {
        "APPEND0": [append(1, 4)], "APPEND1": [append(2, 5)],
        "LIMIT": [b.code(7, [0], -1, [b.access(3, "I32", {0: 1}), b.access(abi.SLOT_LIMIT, "I32", {})],
                         [("SCALAR", [b.instr("LOAD", 0, aux=0), b.instr("CONST", 1, imm=1), b.instr("I_ADD", 0, 0, 1),
                                      b.instr("STORE", a=0, aux=1)])], extent)],
        "Q": [b.code(7, [0, 1, 2, 5], 5, [b.access(0, "F32", {0: H * G * D, 1: G * D, 2: D, 5: 1}), b.access(abi.SLOT_ACT, "F32", {2: D, 5: 1})],
                     [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("CONST", V | 1, imm=D**-0.5),
                                  b.instr("F_MUL", V | 0, V | 0, V | 1), b.instr("STORE", a=V | 0, aux=1)])], extent)],
        "SCORE": [b.code(7, [0, 1, 2, 4], 4,
                         [b.access(abi.SLOT_ACC, "F32", {2: S, 4: 1}), b.access(0, "I32", {4: 1}), b.access(3, "I32", {0: 1})],
                         [("SCALAR", [b.instr("LOAD", 0, aux=2)]),
                          ("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("INDEX", V | 1, aux=1), b.instr("I_LE", V | 2, V | 1, 0),
                                      b.instr("CONST", V | 3, imm=-1e30), b.instr("SELECT", V | 0, V | 2, V | 0, V | 3),
                                      b.instr("STORE", a=V | 0, aux=0)])], extent)],
        "EPILOGUE": [b.code(7, [0, 1, 2, 3], 3, [b.access(abi.SLOT_ACC + 1, "F32", {2: D, 3: 1}), b.access(6, "F32", {0: H * G * D, 1: G * D, 2: D, 3: 1})],
                            [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("STORE", a=V | 0, aux=1)])], extent)],
    }  # fmt: skip
    step = cache | {4: H * D}
    op = b.op("ATTENTION", "attention", extent, [1, 1, G, D, S, D, D], [q, k, v, pos, kc, vc, out], codes,
              {"KEY": 0, "VALUE": 1, "N_BATCH": 2, "N_ROWS": 1}, [b.access(4, dtype, step | {5: 1}), b.access(5, dtype, step | {3: 1})])  # fmt: skip
    b.tasks(op, workers)
    return b.finish(workers)


def rows_program(B: int, N: int, workers: int = 132) -> bytes:
    """x f32[B, N] -> argmax i32[B], softmax f32[B, N], and x + 1 for columns [3, 10), x elsewhere (two codes)."""
    b = Builder()
    x = b.buffer("ARG", "F32", B, N)
    top, soft, edge = b.buffer("RESULT", "I32", B), b.buffer("RESULT", "F32", B, N), b.buffer("RESULT", "F32", B, N)
    load = b.instr("LOAD", V | 0, aux=0)
    arg = b.code(1, [0], -1, [b.access(0, "F32", {0: N, 1: 1}), b.access(1, "I32", {0: 1})],
                 [("REDUCE", [load], "ARGMAX", [(0, N)], V | 0, 0), ("SCALAR", [b.instr("STORE", a=0, aux=1)])], [B])  # fmt: skip
    b.tasks(b.op("ROWS", "argmax", [B], [1], [x, top], {"MAIN": [arg]}), workers)
    exp = [load, b.instr("F_SUB", V | 1, V | 0, 0), b.instr("F_EXP", V | 1, V | 1)]
    exp2 = [
        b.instr("LOAD", V | 0, aux=1),
        *exp[1:],
        b.instr("F_DIV", V | 1, V | 1, 1),
        b.instr("STORE", a=V | 1, aux=2),
    ]
    softmax = b.code(2, [0, 1], 1, [b.access(0, "F32", {0: N, 2: 1}), b.access(0, "F32", {0: N, 1: 1}), b.access(1, "F32", {0: N, 1: 1})],
                     [("REDUCE", [load], "MAX", [(0, N)], V | 0, 0), ("REDUCE", exp, "SUM", [(0, N)], V | 1, 1), ("VECTOR", exp2)], [B, N])  # fmt: skip
    b.tasks(b.op("ROWS", "softmax", [B, N], [min(B, 3), N], [x, soft], {"MAIN": [softmax]}), workers)
    accesses = lambda: [b.access(0, "F32", {0: N, 1: 1}), b.access(1, "F32", {0: N, 1: 1})]  # noqa: E731
    codes = []
    for lo, hi, add in ((0, 3, 0.0), (3, 10, 1.0), (10, N, 0.0)):
        body = [
            load,
            b.instr("CONST", V | 1, imm=add),
            b.instr("F_ADD", V | 0, V | 0, V | 1),
            b.instr("STORE", a=V | 0, aux=1),
        ]
        codes.append(b.code(2, [0, 1], 1, accesses(), [("VECTOR", body)], [B, N]))
        b.rows["Code"][-1]["lo"][1], b.rows["Code"][-1]["hi"][1] = lo, hi
    b.tasks(b.op("ROWS", "edge", [B, N], [2, 7], [x, edge], {"MAIN": codes}), workers)
    return b.finish(workers)


def sort_program(B: int, N: int, count: int, descending: bool, positions: bool, workers: int = 132) -> bytes:
    """x f32[B, N] -> the first `count` of every sorted row."""
    b = Builder()
    x = b.buffer("ARG", "F32", B, N)
    y = b.buffer("RESULT", "I32" if positions else "F32", B, count)
    key = b.code(2, [0, 1], 1, [b.access(0, "F32", {0: N, 1: 1}), b.access(abi.SLOT_ACC, "F32", {1: 1})],
                 [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("STORE", a=V | 0, aux=1)])], [B, N])  # fmt: skip
    params = {
        "KEY_DTYPE": abi.enum("Dtype", "F32"),
        "COUNT": count,
        "OUT": 0,
        "DESCENDING": int(descending),
        "PAYLOAD": int(positions),
    }
    op = b.op(
        "SORT",
        "sort",
        [B, N],
        [2, N],
        [x, y],
        {"MAIN": [key]},
        params,
        [b.access(1, "I32" if positions else "F32", {0: count, 1: 1})],
    )
    b.tasks(op, workers)
    return b.finish(workers)


def split_chain(batch: int, d: int, ff: int, layers: int, slices: int, workers: int = 132) -> bytes:
    """`decoder_step` as the compiler writes it: bf16 activations in between, `down` split over k, its sums added by the
    next prologue, and beside the critical path by an operator that keeps the residual."""
    b = Builder()
    x = b.buffer("ARG", "F32", batch, d)
    weights = [
        [b.buffer("ARG", "BF16", d, ff), b.buffer("ARG", "BF16", d, ff), b.buffer("ARG", "BF16", ff, d)]
        for _ in range(layers)
    ]
    y = b.buffer("RESULT", "F32", batch, d)
    part = ff // slices

    def total(scale: int, axis: int) -> tuple[list[np.void], list[np.void]]:
        """Loads x (slot 0) and adds the slices (slot 1): accesses and instructions, the sum in V | 1."""
        accesses = [
            b.access(0, "F32", {0: scale, axis: 1}),
            *(b.access(1, "F32", {0: scale, axis: 1}, s * batch * d) for s in range(slices)),
        ]
        out = [b.instr("LOAD", V | 1, aux=0)]
        for s in range(slices):
            out += [b.instr("LOAD", V | 2, aux=1 + s), b.instr("F_ADD", V | 1, V | 1, V | 2)]
        return accesses, out

    def shifted(instrs: list[np.void], by: int) -> list[np.void]:
        out = [i.copy() for i in instrs]
        for i in out:
            i["aux"] += by if abi.ENUMS["Opcode"][int(i["op"])] == "LOAD" else 0
        return out

    def lhs(first: bool) -> int:
        n = 1 if first else slices + 1
        over, load = total(d, 3)
        along, _ = total(d, 2)
        load = load[:1] if first else load
        accesses = [*over[:n], *along[:n], b.access(abi.SLOT_ACT, "F32", {0: d, 2: 1})]
        return b.code(3, [0, 2], 2, accesses,
            [("REDUCE", [*load, b.instr("F_MUL", V | 2, V | 1, V | 1)], "SUM", [(0, d)], V | 2, 0),
             ("SCALAR", [b.instr("CONST", 1, imm=1.0 / d), b.instr("F_MUL", 0, 0, 1), b.instr("CONST", 2, imm=1e-6),
                         b.instr("F_ADD", 0, 0, 2), b.instr("F_RSQRT", 3, 0)]),
             ("VECTOR", [*shifted(load, n), b.instr("F_MUL", V | 3, V | 1, 3), b.instr("F_ROUND_BF16", V | 3, V | 3),
                         b.instr("STORE", a=V | 3, aux=2 * n)])], [batch, ff, d])  # fmt: skip

    heads = {True: lhs(True), False: lhs(False)}
    glu = b.code(3, [0, 1], 1,
        [b.access(abi.SLOT_ACC, "F32", {0: 64, 1: 1}), b.access(abi.SLOT_ACC + 1, "F32", {0: 64, 1: 1}), b.access(4, "BF16", {0: ff, 1: 1})],
        [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("LOAD", V | 1, aux=1), b.instr("F_LOGISTIC", V | 2, V | 0),
                     b.instr("F_MUL", V | 2, V | 2, V | 0), b.instr("F_MUL", V | 2, V | 2, V | 1),
                     b.instr("STORE", a=V | 2, aux=2)])], [batch, ff, d])  # fmt: skip
    act = b.code(4, [0, 1, 3], 3, [b.access(0, "BF16", {0: part, 1: ff, 3: 1}), b.access(abi.SLOT_ACT, "F32", {1: part, 3: 1})],
                 [("VECTOR", [b.instr("LOAD", V | 3, aux=0), b.instr("STORE", a=V | 3, aux=1)])], [slices, batch, d, part])  # fmt: skip
    put = b.code(4, [0, 1, 2], 2, [b.access(abi.SLOT_ACC, "F32", {1: 64, 2: 1}), b.access(2, "F32", {0: batch * d, 1: d, 2: 1})],
                 [("VECTOR", [b.instr("LOAD", V | 0, aux=0), b.instr("STORE", a=V | 0, aux=1)])], [slices, batch, d, part])  # fmt: skip
    accesses, sums = total(d, 1)
    keep = b.code(2, [0, 1], 1, [*accesses, b.access(2, "F32", {0: d, 1: 1})],
                  [("VECTOR", [*sums, b.instr("STORE", a=V | 1, aux=slices + 1)])], [batch, d])  # fmt: skip
    common = {"N_M": 1, "N_N": 1, "N_K": 1, "REDUCE_DTYPE": abi.enum("Dtype", "F32")}
    sliced = x
    residual_ready: list[int] = []
    waits: list[int] = []
    for n in range(layers):
        gate, up, down = weights[n]
        h, new = b.buffer("WORKSPACE", "BF16", batch, ff), b.buffer("WORKSPACE", "F32", slices, batch, d)
        op = b.op("CONTRACT", f"glu{n}", [batch, ff, d], [batch, 64, d], [x, sliced, gate, up, h], {"LHS": [heads[n == 0]], "EPILOGUE": [glu]},
                  common | {"N_RHS": 2, "RHS0": 0, "RHS1": 1}, [b.access(2, "BF16", {1: 1, 2: ff}), b.access(3, "BF16", {1: 1, 2: ff})], 2 * n + 1)  # fmt: skip
        done = b.event()
        _pair(b, b.tasks(op, workers, [*waits, *residual_ready], [done]), gate, up, ff, d, True)
        if n:  # the residual of this layer, beside the path
            out = b.buffer("WORKSPACE", "F32", batch, d)
            kept = b.op("ROWS", f"residual{n}", [batch, d], [batch, 256], [x, sliced, out], {"MAIN": [keep]})
            event = b.event()
            b.tasks(kept, workers, [*waits, *residual_ready], [event])
            x, residual_ready = out, [event]
        op = b.op("CONTRACT", f"down{n}", [slices, batch, d, part], [1, batch, 64, part], [h, down, new], {"LHS": [act], "EPILOGUE": [put]},
                  common | {"N_BATCH": 1, "N_RHS": 1, "RHS0": 0}, [b.access(1, "BF16", {0: part * d, 2: 1, 3: d})], 2 * n + 2)  # fmt: skip
        ready = b.event()
        tasks = b.tasks(op, workers, [done], [ready])
        m = np.zeros((), abi.RECORDS["TensorMap"])
        m["buffer"], m["dtype"], m["rank"] = down, abi.enum("Dtype", "BF16"), 3
        m["dims"][:3], m["strides"][:3], m["box"][:3] = (d, part, slices), (2, d * 2, part * d * 2), (64, 128, 1)
        b.rows["TensorMap"].append(m)
        for i, t in enumerate(tasks):
            s = np.zeros((), abi.RECORDS["Stream"])
            s["task"], s["map"], s["frames"] = t, len(b.rows["TensorMap"]) - 1, -(-part // 128)
            s["start"][:3], s["step"][:3] = (i % (d // 64) * 64, 0, i // (d // 64)), (0, 128, 0)
            b.rows["Stream"].append(s)
        sliced, waits = new, [ready]
    last = b.op("ROWS", "last", [batch, d], [batch, 256], [x, sliced, y], {"MAIN": [keep]})
    b.tasks(last, workers, [*waits, *residual_ready])
    return b.finish(workers)
