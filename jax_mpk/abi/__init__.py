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

from jax_mpk.abi import launch
from jax_mpk.abi.blob import Program, ProgramError, content_hash, decode, encode, structure, with_key
from jax_mpk.abi.printer import header, kernel_header
from jax_mpk.abi.records import (
    ACCUMULATE,
    ARITY,
    COMBINES,
    DTYPE_BYTES,
    ENUMS,
    IN_PLACE,
    LANES,
    MAGIC,
    MAX_AXES,
    MAX_DYN,
    MAX_EXTENT,
    MAX_REGS,
    MAX_TRIGGERS,
    MAX_WAITS,
    RECORDS,
    SCAN_RUN,
    SECTIONS,
    SLOT_ACC,
    SLOT_ACT,
    SLOT_LIMIT,
    STREAMED,
    VECTOR_REG,
    VERSION,
    enum,
)

__all__ = [
    "ACCUMULATE", "ARITY", "COMBINES", "DTYPE_BYTES", "ENUMS", "IN_PLACE", "LANES", "MAGIC", "MAX_AXES", "MAX_DYN", "MAX_EXTENT",
    "MAX_REGS", "MAX_TRIGGERS", "MAX_WAITS", "Program", "ProgramError", "RECORDS", "SCAN_RUN", "SECTIONS", "SLOT_ACC",
    "SLOT_ACT", "SLOT_LIMIT", "STREAMED", "VECTOR_REG", "VERSION", "content_hash", "decode", "encode", "enum", "header",
    "kernel_header", "launch", "structure", "with_key",
]  # fmt: skip
