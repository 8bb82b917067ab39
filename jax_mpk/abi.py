"""The program format: one description for Python, C++ and CUDA (`python -m jax_mpk.abi` prints `ffi/abi.h`).

A program is a flat, position-independent blob: a `Header`, then sections of fixed-size little-endian records. It is
everything that an executor needs: no pointers, no strings to parse, no Python. The blob travels as an attribute of
the XLA custom call and is the unit of caching.

Identity. `hash` is the SHA-256 of everything else in the blob: two programs are the same if their hashes are, once
somebody has compared a hash with its content. `key` says what the program was made from, and whoever finds a program
under a name compares it: a program of the compiler carries its fingerprint (`jax_mpk.fingerprint`; zero if it has none,
and then nothing keeps it), one planned for a CUDA device the SHA-256 of the machine code that belongs to it.

Loop axes. Every operator has at most MAX_AXES loop axes in an order fixed per kind; all its codes and accesses use
that numbering:

    ROWS       domain axes
    CONTRACT   batch..., m..., n..., k...
    ATTENTION  batch..., rows..., column, key, head, append axes...
    SORT       batch..., row
    SCAN       batch..., row

A task's range along axis a is [tile[a]*t_a, min(extent[a], tile[a]*(t_a+1))), where t_a is the mixed-radix digit of
its grid index over ceil(extent/tile), first axis slowest.

Codes. A code is a fused expression, compiled to a small register bytecode. It loops over the axes of `axes` (a bit
mask) inside the given ranges intersected with its own box [lo, hi); the other axes stay at the start of the range.
One expression may be several codes with disjoint boxes (concatenation): run all of them. `vector` is the axis that
is executed in strips (-1: every point is scalar); it is the innermost loop, the others run with the first axis
outermost. `n_axes` is the operator's number of loop axes; `stage` and `access` are absolute, an instruction's `aux`
counts from the code's `access`, a core's access in `Op.params` from the operator's `access`. For each point of the
outer axes the stages run in order (`first`, `count`: absolute instruction range):

    SCALAR  instructions once, on scalar registers
    REDUCE  loops over the reduction axes axis..axis+axes-1 of the code (ranges from `lo`/`hi` of the stage; the
            last one in strips), executes the instructions on vector registers, combines vector register `src` in a
            fixed order (below) and leaves the result in scalar register `dst`. `dtype` (F32, I32, U32, BOOL) is the
            type of `src`. With ACCUMULATE (not argmax/argmin) it combines that result into the value that `dst`
            already has: dst = op(dst, result).
    VECTOR  the instructions over the strips of `vector`

In SCALAR and REDUCE stages the vector axis stays at the start of its range. Reduction axes are numbered after the
operator's loop axes: n_axes, n_axes+1, ...  Registers are 32 bits wide a lane (f32, i32, u32, or a bool as 0/1).
Scalar and vector registers are two files; an operand with bit VECTOR_REG set is a vector register. SCALAR stages use
scalar registers only; in the other stages every `dst` is a vector register and a scalar operand is broadcast. Scalar
registers live from stage to stage, vector registers only inside one strip of one stage.

Instructions. `dst = op(a, b, c)`. CONST: imm. INDEX: i32 imm + sum over all axes of stride[axis]*i_axis of access `aux`
(its slot, offset and dtype do not matter). SELECT: b where a, else c. LOAD widens to the register type of the access's
dtype; stores narrow (floats round to nearest even, integers wrap). STORE: value a. STORE_IF: value a where b.
STORE_ADD, STORE_MUL, STORE_MAX, STORE_MIN: memory = op(memory, a) where b, in the arithmetic of the access's type, points in
index order. Integer division and shifts follow XLA: x/0 = -1 (all ones), x%0 = x, MIN/-1 = MIN, MIN%-1 = 0, a shift by 32 or more is 0 (SAR: the sign).
F_MAX and F_MIN give NaN when one operand is NaN. F_TO_I and F_TO_U truncate and saturate, NaN gives 0. F_REM is fmod.

Fixed order of reductions (so that a result never depends on the strip length or instruction set): element i of the
row goes to partial i % LANES, each partial combines in index order, and then partials combine pairwise (p[j] with
p[j + LANES/2], halving); on a GPU the partials are the threads that work on the row, not LANES. Several reduction
axes: the row is the flattened index space, counted from the stage's `lo`. Partials start from the neutral element
(+0, 1, -inf, inf, the integer extremes). argmax/argmin: the first extreme wins, a NaN counts as the extreme; the
result is the value of the reduction axis. The dot products of cores are specified by their kinds, below.

CONTRACT  codes: LHS stores the activation to scratch ACT, f32[m][k] of the tile (row-major, tile-relative); EPILOGUE
          reads scratch ACC+j, f32[m][n] of the tile, and stores to the output. rhs j is access `params[RHS+j]`: over
          n axes (and over k axes) its strides flatten to one, stride[a] == stride[a+1]*extent[a+1]. Only the first n
          axis and the first m axis may be tiled, so a tile is a range of the flattened index; k is never tiled.
          acc[m][n] = sum over k in f32, in an order that depends on K and the strides only (never on the tile, on
          m or on the thread), so that a batch row does not depend on its neighbours. Integer types: exact, in i32
          (`params[REDUCE_DTYPE]` is F32 or I32: the type of ACT and ACC).
          A task with several batch points does LHS, sums and EPILOGUE for one point after the other.
          Two operators with equal `prologue` (not 0) have the same ACT for the same batch and m tile.
ATTENTION codes: APPEND+j run first (they store rows of the cache); Q stores scratch ACT, f32[rows][head]; LIMIT
          stores i32 scratch LIMIT[0]; scores = dot(ACT, key row) go to scratch ACC, f32[rows][key]; SCORE transforms
          ACC in place; the executor does the softmax over keys [0, limit) in f32 (max; e = exp(x - max); divide by
          the sum); PROB transforms ACC in place (absent: identity); ACC1 = f32[rows][column] = sum over keys of
          prob*v in key order; EPILOGUE reads ACC1 (slot ACC+1) and stores. `params[KEY]`, `params[VALUE]`: accesses
          of k (axes batch, key, head) and v (axes batch, key, column). A batch axis has tile 1. `params[N_BATCH]`,
          `params[N_ROWS]` count axes. Without LIMIT all keys count; a limit is clamped to [1, keys]. SCORE and PROB
          run over the keys [0, limit) only.
SORT      code MAIN stores scratch ACC, the row (f32 or i32 as `params[KEY_DTYPE]`); the sort is stable, NaN greatest;
          `params[COUNT]` values or i32 positions are stored through access `params[OUT]` (axes: the domain; the last
          one indexes the sorted row). PAYLOAD 0: values, 1: positions. ACC is one row: f32 or i32 [last axis].
SCAN      code MAIN stores scratch ACC, one row (f32, i32 or u32 as `params[REDUCE_DTYPE]`) [last axis]; every element is
          combined with all before it (REVERSE: behind it) by `params[SCAN_OP]`, a ScanOp; EPILOGUE reads ACC and stores.
          A task with several rows does all three for one after the other. Order: runs of SCAN_RUN elements, counted from
          where the scan starts, each in index order from the neutral element (that of reductions; LOGSUMEXP: -inf); what
          the runs before end with, in order, is combined with every element of a later run. On a GPU a run is the part of
          a warp, whose lanes combine in a tree: an order that depends on the row's length. LOGSUMEXP (F32 only) of x and y
          is max(x, y) + log1p(x == y ? 1 : exp(-|x - y|)).

Scratch. An access to scratch is tile-relative: i_axis counts from the start of the task's range. Rows of ACT and ACC
have the length of the full tile, also in a last, shorter task: strides are constants of the operator. Core accesses
(RHS, KEY, VALUE, OUT) have no dynamic coordinates. A kind's parameters that it does not use are 0.

Events. A task waits until counter[event] >= epoch * threshold for each of its waits, acquires, runs, releases and adds
one to each of its triggers. Counters are 32 bits and are never reset: launch number `epoch` (from 1) counts on; the
comparison is modulo 2**32: (i32)(counter - want) >= 0.

Linear order. Task records are sorted by linear order, which is a topological order of the dependencies. `worker` is a
proposal: any assignment in which each worker runs its tasks in record order is free of deadlock.

CUDA. A program for a GPU has a Kernel and a Unit for every operator. Its task records are sorted by worker, and in linear
order for each; a task of `Unit.parts` parts has as many records, `part` 0, 1, ...: the worker that finishes last (a ticket
decides) ends it and triggers its events. Streams are sorted by worker, too. What runs is the text of Source; the codes
have the loads and stores of the same bodies, in stages without registers, for the proof.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

import numpy as np

MAGIC = 0x314B504D  # "MPK1"
VERSION = 2
MAX_AXES = 12
MAX_DYN = 4
MAX_WAITS = 4
MAX_TRIGGERS = 4
LANES = 16
VECTOR_REG = 0x8000
MAX_REGS = 64
"""Registers a file: a code that needs more is split by the compiler (an operator is materialised)."""

OPCODES: tuple[tuple[int, str], ...] = (
    (0, "CONST INDEX LOAD"), (1, "STORE"), (2, "STORE_IF STORE_ADD STORE_MUL STORE_MAX STORE_MIN"), (1, "MOVE"), (3, "SELECT"),
    # f32
    (1, "F_NEG F_ABS F_EXP F_EXP2 F_EXPM1 F_LOG F_LOG1P F_SQRT F_RSQRT F_CBRT F_TANH F_SIN F_COS F_TAN F_LOGISTIC F_ERF "
        "F_SIGN F_FLOOR F_CEIL F_ROUND_EVEN F_ROUND_AWAY F_IS_FINITE F_ROUND_BF16 F_ROUND_F16 F_TO_I F_TO_U F_TO_B"),
    (2, "F_ADD F_SUB F_MUL F_DIV F_REM F_MAX F_MIN F_POW F_POW_I F_ATAN2 F_LT F_LE F_EQ F_NE"),
    # integers: I_ are shared by i32, u32 and bool where the bits agree
    (1, "I_NEG I_ABS I_SIGN I_NOT B_NOT I_POPCOUNT I_CLZ I_TO_F U_TO_F I_TO_B I_WRAP_I8 I_WRAP_U8 I_WRAP_I16 I_WRAP_U16"),
    (2, "I_ADD I_SUB I_MUL I_DIV U_DIV I_REM U_REM I_MAX U_MAX I_MIN U_MIN I_POW I_AND I_OR I_XOR I_SHL I_SHR I_SAR "
        "I_LT U_LT I_LE U_LE I_EQ I_NE"),
)  # fmt: skip
"""Instructions in the order of their numbers, in groups of (register operands, names). `dst`, `a`, `b`, `c` are
registers; `aux` is an access (LOAD, STORE*, INDEX)."""
ARITY: tuple[int, ...] = tuple(n for n, names in OPCODES for _ in names.split())
"""How many of `a`, `b`, `c` an instruction reads, by opcode."""
DTYPE_BYTES: tuple[int, ...] = (4, 2, 2, 4, 2, 1, 4, 2, 1, 1)
"""Bytes of an element, by `Dtype`."""

MAX_EXTENT = 1 << 30
"""The longest loop axis: indices are 32-bit, and a task's end may lie a tile beyond the axis."""

ENUMS: dict[str, list[str]] = {
    "Space": ["ARG", "RESULT", "WORKSPACE", "CONST", "PEER"],
    "Dtype": ["F32", "BF16", "F16", "I32", "I16", "I8", "U32", "U16", "U8", "BOOL"],
    "Kind": ["NOP", "ROWS", "CONTRACT", "ATTENTION", "SORT", "SCAN"],
    "StageKind": ["SCALAR", "REDUCE", "VECTOR"],
    "ReduceOp": ["SUM", "MAX", "MIN", "PROD", "AND", "OR", "ARGMAX", "ARGMIN"],
    "ScanOp": ["SUM", "PROD", "MAX", "MIN", "LOGSUMEXP"],
    # Roles of codes in Op.code (a role is a range of codes).
    "Role": ["MAIN", "LHS", "EPILOGUE", "Q", "SCORE", "PROB", "LIMIT", "APPEND0", "APPEND1", "APPEND2", "APPEND3"],
    # Positions in Op.params.
    "Param": ["RHS0", "RHS1", "RHS2", "RHS3", "N_RHS", "N_BATCH", "N_M", "N_N", "N_K", "KEY", "VALUE", "N_ROWS",
              "KEY_DTYPE", "COUNT", "OUT", "DESCENDING", "PAYLOAD", "REDUCE_DTYPE", "SCAN_OP", "REVERSE"],
    "Opcode": [name for _, names in OPCODES for name in names.split()],
}  # fmt: skip

SCAN_RUN = 256
"""Elements of a row that a scan combines one after the other."""
SLOT_ACT, SLOT_LIMIT, SLOT_ACC = 0xFF00, 0xFF01, 0xFF10
"""Slots from SLOT_ACT on are scratch of the running task (SLOT_ACC + j: accumulator j); they are tile-relative."""
COMBINES = {"add": "STORE_ADD", "mul": "STORE_MUL", "max": "STORE_MAX", "min": "STORE_MIN"}
"""The stores that combine with what is in memory, by the name of the operation."""
ACCUMULATE = 1
"""Stage flag: a further range of the same reduction (concatenated bodies)."""
STREAMED = 1
"""Unit flag: the stream has the frames of the operator's right sides."""
IN_PLACE = 1
"""Op flag (ROWS): what MAIN stores over holds data, of which the rest keeps its value."""

_u8, _u16, _u32, _i32, _u64, _i64 = "<u1", "<u2", "<u4", "<i4", "<u8", "<i8"

RECORDS: dict[str, np.dtype] = {
    # offset and count (records) of each section follow the fixed part, in the order of SECTIONS.
    "Header": np.dtype([("magic", _u32), ("version", _u32), ("bytes", _u64), ("hash", _u8, (32,)),
                        ("key", _u8, (32,)), ("workspace", _u64), ("workers", _u32), ("args", _u32), ("results", _u32),
                        ("ranks", _u32), ("rank", _u32), ("iterations", _u32), ("section_offset", _u64, (16,)),
                        ("section_count", _u64, (16,))]),
    # index: operand/result number. offset: in the workspace or constant section. alias: operand number or -1.
    "Buffer": np.dtype([("space", _u8), ("dtype", _u8), ("peer", _u16), ("index", _u32), ("offset", _u64),
                        ("bytes", _u64), ("alias", _i32), ("name", _u32)]),
    # A slot binds an operator's access to memory: byte offset into a buffer.
    "Slot": np.dtype([("buffer", _u32), ("pad", _u32), ("offset", _i64)]),
    # element address = slot + offset + sum_a stride[a]*i_a + sum_d dyn_stride[d]*clamp(reg[d], 0, dyn_limit[d]),
    # in elements of dtype. slot is relative to the operator's first slot, or scratch (>= SLOT_ACT).
    "Access": np.dtype([("slot", _u16), ("dtype", _u8), ("n_dyn", _u8), ("dyn_reg", _u16, (MAX_DYN,)),
                        ("pad", _u32), ("dyn_limit", _i32, (MAX_DYN,)), ("offset", _i64),
                        ("stride", _i64, (MAX_AXES,)), ("dyn_stride", _i64, (MAX_DYN,))]),
    "Instr": np.dtype([("op", _u8), ("pad", _u8), ("dst", _u16), ("a", _u16), ("b", _u16), ("c", _u16), ("aux", _u16),
                       ("imm", _u32)]),
    "Stage": np.dtype([("kind", _u8), ("reduce", _u8), ("flags", _u8), ("dtype", _u8), ("first", _u32),
                       ("count", _u32), ("axis", _u16), ("axes", _u16), ("src", _u16), ("dst", _u16),
                       ("lo", _i32, (4,)), ("hi", _i32, (4,))]),
    # Instructions, accesses and stages are absolute indices into their sections.
    "Code": np.dtype([("stage", _u32), ("stages", _u32), ("access", _u32), ("accesses", _u32), ("axes", _u32),
                      ("vector", _i32), ("scalar_regs", _u16), ("vector_regs", _u16), ("n_axes", _u32),
                      ("lo", _i32, (MAX_AXES,)), ("hi", _i32, (MAX_AXES,))]),
    "Op": np.dtype([("kind", _u8), ("n_axes", _u8), ("variant", _u16), ("prologue", _u32), ("slot", _u32),
                    ("slots", _u32), ("access", _u32), ("accesses", _u32), ("name", _u32), ("flags", _u32),
                    ("extent", _i32, (MAX_AXES,)), ("tile", _i32, (MAX_AXES,)),
                    ("code", _u32, (12,)), ("codes", _u32, (12,)), ("params", _i64, (20,))]),
    "Task": np.dtype([("op", _u32), ("index", _u32), ("worker", _u16), ("n_waits", _u8), ("n_triggers", _u8),
                      ("part", _u32), ("wait", _u32, (MAX_WAITS,)), ("want", _u32, (MAX_WAITS,)),
                      ("trigger", _u32, (MAX_TRIGGERS,))]),
    "Event": np.dtype([("threshold", _u32)]),
    "TensorMap": np.dtype([("buffer", _u32), ("dtype", _u8), ("rank", _u8), ("pad", _u16), ("offset", _u64),
                           ("dims", _u64, (4,)), ("strides", _u64, (4,)), ("box", _u32, (4,))]),
    "Stream": np.dtype([("task", _u32), ("map", _u32), ("start", _i32, (4,)), ("step", _i32, (4,)), ("frames", _u32),
                        ("worker", _u32)]),
    "Const": np.dtype([("byte", _u8)]),
    "Name": np.dtype([("byte", _u8)]),
    # What a CUDA worker knows of an operator. ticket: the first of the operator's tickets, of which a task that several
    # workers share has one; partial: byte offset in the workspace of what its parts leave, `share` bytes a task in
    # `buffer`. Flag STREAMED: the loader brings the right sides.
    "Unit": np.dtype([("variant", _u32), ("slot", _u32), ("slots", _u32), ("prologue", _u32), ("ticket", _u32),
                      ("name", _u32), ("partial", _u64), ("parts", _u32), ("flags", _u16), ("buffer", _u16), ("share", _u64)]),
    # One record in programs for CUDA: bytes of shared memory (activations, sums, all), frames of the ring, scratch of the
    # workers in the workspace (`spill` bytes each from `spill_at`), counters of split tasks, bytes of a profile.
    "Kernel": np.dtype([("act", _u32), ("acc", _u32), ("shared", _u32), ("ring", _u32), ("spill_at", _u64), ("spill", _u32),
                        ("tickets", _u32), ("profile", _u64)]),
    # The text of the kernel, of which the codes of the operators are the loads and stores only.
    "Source": np.dtype([("byte", _u8)]),
}  # fmt: skip
"""Names are NUL-terminated UTF-8; a `name` field is a byte offset into that section. Constants are 64-byte aligned."""

SECTIONS = [n for n in RECORDS if n != "Header"]


def enum(name: str, member: str) -> int:
    """The number of a member, such as `enum("Kind", "ROWS")`."""
    return ENUMS[name].index(member)


@dataclass(frozen=True)
class Program:
    """A decoded blob: one NumPy record array a section (views, no copies)."""

    blob: bytes
    header: np.void
    sections: dict[str, np.ndarray]

    @property
    def key(self) -> bytes:
        """What the program was made from: 32 bytes, all zero for none."""
        key: bytes = self.header["key"].tobytes()
        return key

    def __getitem__(self, section: str) -> np.ndarray:
        return self.sections[section]

    def name(self, offset: int) -> str:
        """The name at a byte offset; raises `ProgramError`."""
        names = self.sections["Name"]["byte"].tobytes()
        end = names.find(b"\0", offset)
        if end < 0:
            raise ProgramError(f"the name at {offset} of {len(names)} bytes does not end")
        return names[offset:end].decode(errors="backslashreplace")


def fields(record: str) -> dict[str, tuple[np.dtype, int]]:
    """The type and the byte offset of every field of a record, in their order."""
    known = RECORDS[record].fields
    assert known is not None
    return {name: (known[name][0], known[name][1]) for name in RECORDS[record].names or ()}


def content_hash(blob: bytes) -> bytes:
    """The hash of a blob of at least a header: of everything but the hash in it."""
    size, (_, at) = RECORDS["Header"].itemsize, fields("Header")["hash"]
    digest = hashlib.sha256(blob[:at] + bytes(32) + blob[at + 32 : size])
    digest.update(memoryview(blob)[size:])
    return digest.digest()


def encode(sections: dict[str, np.ndarray], *, key: bytes = b"", **header: int) -> bytes:
    """The blob of these sections; `hash` and `bytes` of the header are filled in. `key`: 32 bytes, or none."""
    head = np.zeros((), RECORDS["Header"])
    head["magic"], head["version"] = MAGIC, VERSION
    if key:
        head["key"] = np.frombuffer(key, np.uint8)
    for name, value in header.items():
        head[name] = value
    at, chunks = head.nbytes, []
    for n, name in enumerate(SECTIONS):
        rows = np.ascontiguousarray(sections.get(name, np.zeros(0, RECORDS[name])), RECORDS[name])
        pad = -at % 64
        chunks.append(b"\0" * pad + rows.tobytes())
        head["section_offset"][n], head["section_count"][n] = at + pad, len(rows)
        at += pad + rows.nbytes
    head["bytes"] = at
    body = b"".join(chunks)
    head["hash"] = np.frombuffer(content_hash(head.tobytes() + body), np.uint8)
    return head.tobytes() + body


def with_key(blob: bytes, key: bytes) -> bytes:
    """The program with another key, and a hash that fits."""
    size = RECORDS["Header"].itemsize
    head = np.frombuffer(blob, RECORDS["Header"], 1).copy()
    head["key"], head["hash"] = np.frombuffer(key, np.uint8), 0
    head["hash"] = np.frombuffer(content_hash(head.tobytes() + blob[size:]), np.uint8)
    return head.tobytes() + blob[size:]


class ProgramError(Exception):
    """A blob that is not a program of this version, or that is damaged."""


def decode(blob: bytes) -> Program:
    """The inverse of `encode`; raises `ProgramError` for anything else, a wrong hash included."""
    size = RECORDS["Header"].itemsize
    if len(blob) < size:
        raise ProgramError(f"a program has at least {size} bytes, this has {len(blob)}")
    head = np.frombuffer(blob, RECORDS["Header"], 1)[0]
    if head["magic"] != MAGIC or head["version"] != VERSION:
        raise ProgramError(f"not a program of version {VERSION}")
    if head["bytes"] != len(blob):
        raise ProgramError(f"the header says {head['bytes']} bytes, there are {len(blob)}")
    if content_hash(blob) != head["hash"].tobytes():
        raise ProgramError("the content does not match its hash")
    out = {}
    for n, name in enumerate(SECTIONS):
        at, count = int(head["section_offset"][n]), int(head["section_count"][n])
        if count and (at % 64 or at < size or at + count * RECORDS[name].itemsize > len(blob)):
            raise ProgramError(f"section {name} ({count} records at {at}) is not inside of the {len(blob)} bytes")
        out[name] = np.frombuffer(blob, RECORDS[name], count, at if count else 0)
    return Program(blob, head, out)


_CTYPE = {"u1": "uint8_t", "u2": "uint16_t", "u4": "uint32_t", "i4": "int32_t", "u8": "uint64_t", "i8": "int64_t"}


def header() -> str:
    """The C++ header: constants, enums, and records with static_asserts on every size and offset."""
    lines = ["// Generated by `python -m jax_mpk.abi > ffi/abi.h`: do not edit. Meaning: jax_mpk/abi.py."]
    lines += ["#pragma once", "#ifndef __CUDACC_RTC__", "#include <cstddef>", "#include <cstdint>", "#endif", ""]
    lines += ["namespace mpk::abi {", ""]
    for name in ("MAGIC", "VERSION", "MAX_AXES", "MAX_DYN", "MAX_WAITS", "MAX_TRIGGERS", "LANES",
                 "VECTOR_REG", "MAX_REGS", "MAX_EXTENT", "SCAN_RUN", "SLOT_ACT", "SLOT_LIMIT", "SLOT_ACC", "ACCUMULATE", "IN_PLACE"):  # fmt: skip
        lines.append(f"constexpr uint32_t {name} = {globals()[name]:#x};")
    for name in ("ARITY", "DTYPE_BYTES"):
        lines.append(f"constexpr uint8_t {name}[] = {{{', '.join(map(str, globals()[name]))}}};")
    for name, members in ENUMS.items():
        lines += ["", f"enum class {name} : uint8_t {{"]
        lines += [f"  {m} = {n}," for n, m in enumerate(members)] + ["};"]
    lines += ["", "enum class Section : uint8_t {"] + [f"  {s} = {n}," for n, s in enumerate(SECTIONS)] + ["};"]
    for name, dtype in RECORDS.items():
        lines += ["", f"struct {name} {{"]
        for field, (sub, _) in fields(name).items():
            base, shape = sub.subdtype if sub.subdtype else (sub, ())
            dims = "".join(f"[{n}]" for n in shape)
            lines.append(f"  {_CTYPE[base.str[1:]]} {field}{dims};")
        lines += ["};", f"static_assert(sizeof({name}) == {dtype.itemsize});"]
        lines += [f"static_assert(offsetof({name}, {f}) == {at});" for f, (_, at) in fields(name).items()]
    lines += [
        "",
        "#ifdef MPK_ABI_FIELDS  // what records consist of, for tools that walk them; section -1 is the header",
    ]
    lines += ["struct Field {", "  int section;", "  uint16_t record, offset, bytes, count;", "};"]
    lines += ["constexpr Field FIELDS[] = {"]
    for name, dtype in RECORDS.items():
        section = SECTIONS.index(name) if name in SECTIONS else -1
        for sub, offset in fields(name).values():
            width = sub.base.itemsize
            lines.append(f"  {{{section}, {dtype.itemsize}, {offset}, {width}, {sub.itemsize // width}}},")
    lines += ["};", "#endif"]
    return "\n".join([*lines, "", "}  // namespace mpk::abi", ""])


if __name__ == "__main__":
    sys.stdout.write(header())
