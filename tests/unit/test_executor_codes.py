"""The interpreter of codes: scalar stages that run ahead for many points, and conditions that hold for a whole row."""

from __future__ import annotations

import numpy as np
import pytest

from jax_mpk import _ext
from tests.unit.executor_builder import Access, Builder, Code, Stage, V, instr

ISAS = _ext.info()["isas"]


def rows_at(
    n: int,
    columns: int,
    targets: int,
    index: np.ndarray,
    y: np.ndarray,
    *,
    store: str,
    tile: int,
    outer: int = 1,
    **how: object,
) -> np.ndarray:
    """`out[index[i] + offset, :] (op)= y[i, :]` where `index[i] >= 0`, over outer x n points of which rows are `columns` long."""
    b = Builder(workers=3)
    slots = [b.arg(index.nbytes, "I32"), b.arg(y.nbytes), b.result(4 * outer * targets * columns)]
    scalar = [
        instr("LOAD", 0),  # the index
        instr("CONST", 1, imm=-1),
        instr("I_LT", 2, 1, 0),  # a condition for the row
        instr("CONST", 3, imm=0),
        instr("I_MAX", 4, 0, 3),
    ]
    vector = [instr("LOAD", V, aux=1), instr(store, a=V, b=2, aux=2)]
    accesses = [
        Access(0, "I32", (n, 1, 0)),
        Access(1, stride=(n * columns, columns, 1)),
        Access(2, stride=(targets * columns, 0, 1), dyn=((4, targets - 1, columns),)),
    ]
    code = Code(
        [Stage("SCALAR", scalar), Stage("VECTOR", vector)], accesses, {0: (0, outer), 1: (0, n), 2: (0, columns)}, 2
    )
    b.tasks(b.op("ROWS", "rows", (outer, n, columns), (1, n, tile), slots, {"MAIN": [code]}))
    out = np.zeros((outer, targets, columns), np.float32)
    _ext.run(b.blob(), [index, y], [out], **how)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("store", ["STORE_IF", "STORE_ADD"])
@pytest.mark.parametrize("n, columns", [(1, 40), (255, 3), (256, 16), (257, 16), (700, 33), (600, 300)])
def test_rows_at_indices(n: int, columns: int, store: str, isa: str) -> None:
    """Collisions in index order, rows that are left out, more points than a strip, several outer loops."""
    rng = np.random.default_rng(n + columns)
    outer, targets = 3, 50
    index = rng.integers(-3, targets, (outer, n)).astype(np.int32)
    y = rng.standard_normal((outer, n, columns)).astype(np.float32)
    want = np.zeros((outer, targets, columns), np.float32)
    for o in range(outer):
        for i in range(n):
            if index[o, i] >= 0:
                want[o, index[o, i]] = y[o, i] + (want[o, index[o, i]] if store == "STORE_ADD" else 0)
    for threads in (1, 3):
        have = rows_at(n, columns, targets, index, y, store=store, tile=16, outer=outer, isa=isa, threads=threads)
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("isa", ISAS)
def test_points_that_read_what_earlier_points_stored(isa: str) -> None:
    """out[i, :] = out[i - 1, 0] + x[i, :]: a scalar stage that may not run ahead of the stores."""
    n, columns = 600, 20
    x = np.random.default_rng(0).integers(-5, 6, (n, columns)).astype(np.float32)
    b = Builder()
    slots = [b.arg(x.nbytes), b.result(x.nbytes + 4 * columns)]
    stages = [
        Stage("SCALAR", [instr("LOAD", 0, aux=1), instr("MOVE", 1, 0)]),
        Stage("VECTOR", [instr("LOAD", V), instr("F_ADD", V + 1, V, 1), instr("STORE", a=V + 1, aux=2)]),
    ]
    accesses = [
        Access(0, stride=(columns, 1)),
        Access(1, stride=(columns, 0)),
        Access(1, stride=(columns, 1), offset=columns),
    ]
    code = Code(stages, accesses, {0: (0, n), 1: (0, columns)}, 1)
    b.tasks(b.op("ROWS", "chain", (n, columns), (n, columns), slots, {"MAIN": [code]}))
    out = np.zeros((n + 1, columns), np.float32)
    _ext.run(b.blob(), [x], [out], isa=isa)
    want = np.zeros((n + 1, columns), np.float32)
    for i in range(n):
        want[i + 1] = want[i, 0] + x[i]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("isa", ISAS)
def test_gathered_scalars_with_every_kind_of_operand(isa: str) -> None:
    """Scalar stages with INDEX, loads at loaded indices and a reduction behind them: out[i, j] = sum(x) + t[s[i]] + i + j."""
    n, columns, entries = 300, 17, 40
    rng = np.random.default_rng(4)
    t, s = rng.integers(-9, 9, entries).astype(np.float32), rng.integers(-5, entries + 5, n).astype(np.int32)
    x = rng.integers(-9, 9, 70).astype(np.float32)
    b = Builder()
    slots = [b.arg(a.nbytes) for a in (t, s, x)] + [b.result(4 * n * columns)]
    stages = [
        Stage("SCALAR", [instr("LOAD", 0, aux=1), instr("LOAD", 1, aux=0), instr("INDEX", 2, aux=4), instr("I_TO_F", 3, 2),
                         instr("F_ADD", 4, 1, 3)]),
        Stage("REDUCE", [instr("LOAD", V, aux=2)], axis=2, lo=(0,), hi=(70,), src=V, dst=5),
        Stage("SCALAR", [instr("F_ADD", 6, 4, 5)]),
        Stage("VECTOR", [instr("INDEX", V, aux=5), instr("I_TO_F", V + 1, V), instr("F_ADD", V + 2, V + 1, 6),
                         instr("STORE", a=V + 2, aux=3)]),
    ]  # fmt: skip
    accesses = [
        Access(0, dyn=((0, entries - 1, 1),)), Access(1, "I32", (1,)), Access(2, stride=(0, 0, 1)),
        Access(3, stride=(columns, 1)), Access(1, "I32", (1, 0)), Access(1, "I32", (0, 1)),
    ]  # fmt: skip
    code = Code(stages, accesses, {0: (0, n), 1: (0, columns)}, 1)
    b.tasks(b.op("ROWS", "gathered", (n, columns), (77, columns), slots, {"MAIN": [code]}))
    out = np.zeros((n, columns), np.float32)
    _ext.run(b.blob(), [t, s, x], [out], isa=isa, threads=2)
    want = x.sum() + t[np.clip(s, 0, entries - 1)][:, None] + np.arange(n)[:, None] + np.arange(columns)[None]
    np.testing.assert_array_equal(out, want)
