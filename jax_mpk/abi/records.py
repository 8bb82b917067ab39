"""Constants, enumerations and records: what `ffi/abi.h` and the text of a kernel are printed from. Their meaning is in the
docstring of the package."""

from __future__ import annotations

import numpy as np

MAGIC = 0x314B504D  # "MPK1"
VERSION = 3
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
    "Space": ["ARG", "RESULT", "WORKSPACE", "CONST"],
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
                        ("pad", _u32), ("section_offset", _u64, (16,)),
                        ("section_count", _u64, (16,))]),
    # index: operand/result number. offset: in the workspace or constant section. alias: operand number or -1.
    "Buffer": np.dtype([("space", _u8), ("dtype", _u8), ("pad", _u16), ("index", _u32), ("offset", _u64),
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


def columns(dtype: np.dtype) -> dict[str, tuple[np.dtype, int]]:
    """The type and the byte offset of every field of a record, in their order."""
    known = dtype.fields
    assert known is not None
    return {name: (known[name][0], known[name][1]) for name in dtype.names or ()}
