"""Programs on the virtual machine of `tests/vm.py` against the interpreter of graphs, for functions of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import decoders as spellings
from jax_mpk import abi
from jax_mpk.abi import Program, ProgramError
from jax_mpk.backends.cpu.check import check
from jax_mpk.backends.cpu.operators import pressure
from jax_mpk.backends.cpu.pack import pack
from jax_mpk.device import Device
from jax_mpk.frontend import lower
from jax_mpk.inspect.dump import listing
from jax_mpk.ir import interpret
from jax_mpk.ir.graph import Attention, Contract, Graph
from jax_mpk.kinds import contract, rows, sort
from jax_mpk.passes import (
    bodies,
    decompose,
    dependencies,
    events,
    fuse,
    linearise,
    memory,
    normalise,
    placement,
    recognise,
    refine,
    simplify,
)  # fmt: skip
from jax_mpk.verify import verify
from tests import vm
from tests.functions import BF16, CASES, data, ints

SMALL = Device("cpu", workers=2, columns=16, tasks=5)
"""Cuts even small operators, at places that do not divide them."""


def finish(g: Graph, target: Device = SMALL) -> bytes:
    """The program of a refined graph."""
    tg = bodies.run(decompose.run(g, target), g, target)
    for p in (dependencies, events, normalise, linearise):
        tg = p.run(tg)
    tg = memory.run(placement.run(tg, g, target))
    blob = pack(g, tg)
    verify(blob, target=target)
    return blob


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, sort):
        monkeypatch.setattr(module, "MIN_COST", 64)
    monkeypatch.setattr(contract, "MIN_MACS", 256)


def graphs(f: Callable[..., Any], *args: Any) -> list[Graph]:
    """The graph as it is lowered, and as it is fused: different operators for the same function."""
    plain = lower(jax.make_jaxpr(f)(*args))
    return [plain, fuse.run(recognise.run(simplify.run(plain)), SMALL)]


def close(have: np.ndarray, want: np.ndarray, name: str = "") -> None:
    assert have.dtype == want.dtype and have.shape == want.shape
    if have.dtype.kind in "iub":
        np.testing.assert_array_equal(have, want, name)
        return
    eps = {"float32": 2e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[have.dtype.name]
    scale = np.abs(want[np.isfinite(want)].astype(np.float64)).max(initial=1e-30)
    have, want = have.astype(np.float64), want.astype(np.float64)
    np.testing.assert_allclose(have, want, rtol=8 * eps, atol=eps * scale, err_msg=name)


def same(f: Callable[..., Any], *args: Any) -> list[Graph]:
    """Refined graph and program give what the graph gives; returns the refined graphs."""
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    out = []
    for n, g in enumerate(graphs(f, *args)):
        want = interpret.run(g, flat)
        r = refine.run(g, pressure)
        for i, (x, y) in enumerate(zip(interpret.run(r, flat), want, strict=True)):
            close(x, y, f"refined graph {n}, result {i}")
        blob = finish(r)
        for i, (x, y) in enumerate(zip(vm.results(blob, flat, want), want, strict=True)):
            close(x, y, f"program of graph {n}, result {i}")
        out.append(r)
    return out


@pytest.mark.parametrize("name", CASES)
def test_function(name: str) -> None:
    f, args = CASES[name]
    same(f, *args)


# ---------------------------------------------------------------------------------------------------------- decoders

TINY = spellings.Shape(layers=2, width=24, heads=4, kv_heads=2, head=8, hidden=20, vocab=40, slots=7)
SPELLINGS = [
    dict(), dict(norm="div", rope="interleaved"), dict(update="scatter_rows"), dict(update="vmapped", attend="repeat"),
    dict(update="where", attend="cache_left"), dict(update="scatter", attend="repeat"),
]  # fmt: skip


def run_decoder(shape: spellings.Shape, batch: int, dtype: Any, pos: int, **how: str) -> list[Graph]:
    def known(table: dict[str, Any], name: str) -> str:
        return name if name in table else next(iter(table))

    tables = dict(norm=spellings.NORMS, rope=spellings.ROPES, update=spellings.UPDATES, attend=spellings.ATTENTIONS)
    step = spellings.decoder(shape, **{k: known(tables[k], v) for k, v in how.items()})
    w, c = spellings.weights(shape, dtype), spellings.cache(shape, batch, dtype)
    return same(step, w, np.arange(3, 3 + batch, dtype=np.int32), c, np.int32(pos))


@pytest.mark.parametrize("how", SPELLINGS, ids=str)
def test_decoder_spellings(how: dict[str, str]) -> None:
    """Attention, appends, limits, norms in prologues: f32, so that an error shows."""
    run_decoder(TINY, 2, jnp.float32, 3, **how)


@pytest.mark.parametrize("pos", [0, 6])
def test_decoder_bf16_and_limits(pos: int) -> None:
    fused = run_decoder(replace(TINY, qk_norm=True, layers=1), 1, jnp.bfloat16, pos)[1]
    attention = next(op for op in fused.ops if isinstance(op, Attention))
    assert attention.limit is not None and len(attention.appends) == 2


def test_layers_share_code() -> None:
    """More layers are more operators and slots, but not one more instruction, access, stage or code."""
    sizes = []
    for layers in (2, 4):
        shape = replace(TINY, layers=layers)
        w, c = spellings.weights(shape, jnp.float32), spellings.cache(shape, 1, jnp.float32)
        g = graphs(spellings.decoder(shape), w, np.zeros(1, np.int32), c, np.int32(2))[1]
        p = check(finish(refine.run(g, pressure)))
        sizes.append({s: len(p[s]) for s in ("Op", "Instr", "Access", "Stage", "Code")})
    small, large = sizes
    assert large.pop("Op") > small.pop("Op")
    assert small == large


def test_prologues_are_equal_where_the_activation_is() -> None:
    def f(x: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
        return x @ a, x @ b, jnp.sin(x) @ c, (x * 2) @ a

    g = graphs(f, data(3, 8), data(8, 16), data(8, 32), data(8, 16, seed=2))[1]
    p = check(finish(refine.run(g, pressure)))
    ids = [int(op["prologue"]) for op in p["Op"] if op["kind"] == abi.enum("Kind", "CONTRACT")]
    assert len(ids) >= 3 and 0 not in ids
    by_lhs: dict[Any, set[int]] = {}
    for op, n in zip((o for o in g.ops if isinstance(o, Contract)), ids, strict=True):
        by_lhs.setdefault(op.lhs, set()).add(n)
    assert all(len(s) == 1 for s in by_lhs.values()) and len(set(ids)) == len(by_lhs) > 1


def test_an_overwritten_activation_is_another_prologue() -> None:
    """Versions of a buffer that is updated in place have one address, but not one content."""

    def f(x: jax.Array, y: jax.Array, a: jax.Array) -> tuple[jax.Array, ...]:
        one = x @ a
        x = lax.dynamic_update_slice(x, y + one[:1, :8], (1, 0))
        return x, one, x @ a

    args = (data(3, 8), data(1, 8), data(8, 16))
    g = same(f, *args)[1]
    p = check(finish(g))
    ids = [int(op["prologue"]) for op in p["Op"] if op["kind"] == abi.enum("Kind", "CONTRACT")]
    assert ids == [0, 0], "nobody shares one"


def test_slices_of_one_array_share_code() -> None:
    """The constant offset of a layer inside a stacked weight is part of the slot."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        for n in range(w.shape[0]):
            x = jnp.tanh(x @ w[n])
        return x

    args = (data(2, 64), data(4, 64, 64) / 8)
    p = check(finish(same(f, *args)[1]))
    ops = [op for op in p["Op"] if op["kind"] == abi.enum("Kind", "CONTRACT")]
    assert len(ops) == 4 and len({int(op["variant"]) for op in ops[1:]}) == 1
    assert len({int(op["access"]) for op in ops[1:]}) == 1


# ------------------------------------------------------------------------------------------------------ code generation


def code_of(f: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of a function that is one operator, and its only code."""
    p = check(finish(refine.run(graphs(f, *args)[1], pressure)))
    assert len(p["Code"]) == 1
    return p, p["Code"][0]


def stages(p: Program, code: Any) -> list[tuple[str, list[str]]]:
    rows = p["Stage"][code["stage"] : code["stage"] + code["stages"]]
    return [(abi.ENUMS["StageKind"][s["kind"]],
             [abi.ENUMS["Opcode"][i["op"]] for i in p["Instr"][s["first"] : s["first"] + s["count"]]]) for s in rows]  # fmt: skip


def test_what_does_not_depend_on_the_vector_axis_is_hoisted() -> None:
    p, code = code_of(lambda x, y: jnp.exp(y)[:, None] * x, data(5, 70), data(5))
    assert stages(p, code) == [("SCALAR", ["LOAD", "F_EXP"]), ("VECTOR", ["LOAD", "F_MUL", "STORE"])]


def test_common_subexpressions_are_computed_once() -> None:
    p, code = code_of(lambda x: jnp.exp(x) / (1 + jnp.exp(x)) + jnp.exp(x), data(70))
    assert [op for _, ops in stages(p, code) for op in ops].count("F_EXP") == 1


def test_softmax_is_two_reductions_and_a_strip() -> None:
    p, code = code_of(lambda x: jax.nn.softmax(x), data(5, 70))
    kinds = [k for k, _ in stages(p, code) if k != "SCALAR"]
    assert kinds == ["REDUCE", "REDUCE", "VECTOR"] and code["vector"] == 1


def test_the_vector_axis_has_unit_stride_or_is_long() -> None:
    _, code = code_of(lambda x, y: (x + y[:, None]).T, data(200, 3), data(200))
    assert code["vector"] == 1 or code["n_axes"] == 1
    _, code = code_of(lambda x, y: x.reshape(2, 300) * y[:, None], data(600), data(2))
    assert code["vector"] == 1


def test_no_strips_along_an_axis_that_is_taken_point_by_point() -> None:
    """A core takes one batch point after the other: a strip along a batch axis, contiguous or not, has one element."""
    p = abi.decode(finish(refine.run(graphs(lambda x: jnp.cumsum(x, 0), data(100, 64))[1], pressure)))
    assert p["Op"]["kind"].tolist() == [abi.enum("Kind", "SCAN")] and p["Code"]["vector"].tolist() == [1, 1]


def test_bf16_stores_round_exactly_once() -> None:
    """Element-wise results are equal to the last bit, and the rounding before a store is left to the store."""
    args = (data(3, 50, dtype=BF16), data(3, 50, dtype=BF16, seed=1))
    g = graphs(lambda x, y: (x * y + x) * y, *args)[1]
    blob = finish(refine.run(g, pressure))
    want = interpret.run(g, [np.asarray(a) for a in args])
    assert vm.results(blob, args, want)[0].tobytes() == want[0].tobytes()
    ops = [abi.ENUMS["Opcode"][i["op"]] for i in abi.decode(blob)["Instr"]]
    assert ops.count("F_ROUND_BF16") == 2  # three roundings, one of them is the store


@pytest.mark.parametrize("shape", [(300,), ()])
def test_more_values_than_registers(shape: tuple[int, ...]) -> None:
    """75 values that wait for their partners: vector registers, and scalar ones."""

    def f(x: jax.Array) -> jax.Array:
        y = [jnp.sqrt(x * x + i) for i in range(150)]
        return sum(y[i] * y[149 - i] for i in range(150))

    g = same(f, data(*shape))[1]
    assert len(g.ops) > 1


def test_many_dynamic_coordinates() -> None:
    same(
        lambda x, i: lax.dynamic_slice(x, [i[j] for j in range(6)], (2, 1, 2, 1, 2, 1)),
        data(3, 2, 3, 2, 3, 2),
        ints(3, 6),
    )


def test_any_legal_order_gives_the_same_bits() -> None:
    shape = replace(TINY, layers=1)
    w, c = spellings.weights(shape, jnp.float32), spellings.cache(shape, 2, jnp.float32)
    args = (w, np.zeros(2, np.int32), c, np.int32(2))
    blob = finish(refine.run(graphs(spellings.decoder(shape), *args)[1], pressure))
    flat = [np.asarray(x) for x in jax.tree.leaves(args)]
    tasks = abi.decode(blob)["Task"]
    want = vm.run(blob, flat)
    for seed in range(2):
        rng, count, order, todo = np.random.default_rng(seed), np.zeros(4096, int), [], list(range(len(tasks)))
        while todo:
            ready = [t for t in todo if all(count[e] >= n for e, n in
                     zip(tasks[t]["wait"][: tasks[t]["n_waits"]], tasks[t]["want"], strict=False))]  # fmt: skip
            t = int(rng.choice(ready))
            todo.remove(t)
            order.append(t)
            count[tasks[t]["trigger"][: tasks[t]["n_triggers"]]] += 1
        assert order != sorted(order)
        for x, y in zip(vm.run(blob, flat, order), want, strict=True):
            assert x.tobytes() == y.tobytes()


# ------------------------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize("section, field, value", [
    ("Slot", "buffer", 999), ("Slot", "offset", 1 << 40), ("Op", "slots", 9999), ("Op", "n_axes", 3), ("Op", "tile", 0),
    ("Op", "codes", 999), ("Code", "vector", 7), ("Code", "scalar_regs", 0), ("Code", "vector_regs", 0),
    ("Code", "accesses", 1), ("Instr", "dst", 5), ("Instr", "aux", 99), ("Access", "slot", 77), ("Task", "op", 99),
    ("Task", "wait", 99), ("Event", "threshold", 77), ("Buffer", "bytes", 1 << 40),
])  # fmt: skip
def test_check_finds_damage(section: str, field: str, value: int) -> None:
    blob = finish(
        refine.run(
            graphs(lambda x, w: jax.nn.softmax(jnp.tanh(x @ w) + x[:, :1]), data(4, 8), data(8, 40))[1], pressure
        )
    )
    p = check(blob)
    sections = {s: rows.copy() for s, rows in p.sections.items()}
    sections[section][field] = value
    header = {k: p.header[k] for k in ("workspace", "workers", "args", "results")}
    with pytest.raises(ProgramError):
        check(abi.encode(sections, **header))


def test_the_listing_names_everything() -> None:
    blob = finish(refine.run(graphs(lambda x: jax.nn.softmax(x), data(5, 70))[1], pressure))
    text = listing(abi.decode(blob))
    for word in ("ROWS", "REDUCE MAX", "REDUCE SUM", "F_EXP", "VECTOR", "task 0"):
        assert word in text


def test_a_concatenation_of_a_concatenation() -> None:
    """The bounds of the inner one do not cover the box of the outer one."""
    same(lambda x: jnp.concatenate([jnp.concatenate([x, -x[:1]]), x[:1]]) + 1, data(12))
