"""CUDA source of codes with reductions: memory is waited for once, and nothing runs before what it needs."""

from __future__ import annotations

import re

import execute
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_mpk.backends.cuda_reuse import OPCODES

from jax_mpk import abi
from jax_mpk.backends import cuda_reuse, cuda_source
from jax_mpk.device import H100


def after_reduction(f, *args) -> list[str]:
    """For every code with a reduction, the lines after its last one."""
    blob = execute.Runner(f, *args, target=H100).blob
    text = cuda_source.generate(abi.decode(blob), "sm_90a").text
    bodies = re.findall(r"^struct V\d+ \{.*?^\};", text, re.M | re.S)
    codes = [x for body in bodies for x in body.split("static __device__") if re.search(r"= reduce(_extreme)?<", x)]
    assert codes, "no reduction"
    return [re.split(r"= reduce(?:_extreme)?<", x)[-1] for x in codes]


def norm(x, w):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * w


def weights(*shape):
    return jnp.ones(shape, jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_of_a_norm_do_not_wait_for_its_sum(rows):
    for tail in after_reduction(lambda x, w: norm(x, w), weights(rows, 2048), weights(2048)):
        assert "load<" not in tail and re.search(r"= e\d+\[", tail)


def test_a_prologue_reads_before_its_sum():
    f = lambda x, w, m: norm(x, w) @ m  # noqa: E731
    for tail in after_reduction(f, weights(1, 2048), weights(2048), weights(2048, 4096)):
        assert "load<" not in tail


def test_a_row_chosen_by_a_reduction_is_read_after_it():
    f = lambda x, t: t[jnp.argmax(x)] + t[0]  # noqa: E731
    (tail,) = after_reduction(f, weights(512), weights(512, 1024))
    assert len(re.findall("load<", tail)) == 1 and "clamp_to" in tail and re.search(r"= e\d+\[", tail)


def test_no_more_than_registers_hold():
    f = lambda x, *w: sum((norm(x, v) * v for v in w), x)  # noqa: E731
    tails = after_reduction(f, weights(1, 4096), *[weights(4096)] * 4)
    assert any("load<" in tail for tail in tails)
    assert not any(re.search(r"= e\d+\[", tail) for tail in tails)


class RandomCode(cuda_reuse.Reuse):
    """A code of stages SCALAR, REDUCE, SCALAR, VECTOR with random instructions on few registers, as an emitter shows it."""

    stages = np.zeros(4, abi.RECORDS["Stage"])
    stages["kind"], stages["first"], stages["count"], stages["dst"][1] = (0, 1, 0, 2), (0, 3, 6, 9), (3, 3, 3, 14), 2

    def __init__(self, seed: int):
        r = np.random.default_rng(seed)
        self.table = np.zeros(23, abi.RECORDS["Instr"])
        self.loads = [np.zeros((), abi.RECORDS["Access"])[()] for _ in range(3)]
        for n, x in enumerate(self.loads):
            x["n_dyn"], x["dyn_reg"][0] = n == 2, r.integers(3)
        for n, i in enumerate(self.table):
            vector = abi.VECTOR_REG if 3 <= n < 6 or n >= 9 else 0
            op = r.choice(["LOAD", "CONST", "F_ADD", "F_NEG", "SELECT", *["STORE"] * (n > 14)]) if n < 22 else "STORE"
            i["op"], i["dst"], i["aux"], i["imm"] = OPCODES.index(op), vector | r.integers(4), r.integers(3), n
            for k in "abc":
                i[k] = r.integers(3) | (vector if n > 9 and r.random() < 0.7 else 0)

    def _instrs(self, first: int, count: int) -> list[np.void]:
        return list(self.table[first : first + count])

    def _access(self, aux: int) -> np.void:
        return self.loads[aux]

    def _uses(self, i: np.void) -> set[int]:
        x = self._access(int(i["aux"]))
        return {int(i["a"])} | ({int(x["dyn_reg"][0])} if x["n_dyn"] else set())


def run(e: RandomCode, instrs, registers: dict, stored: list, given=None) -> dict[int, tuple]:
    """Runs instructions on terms; `given` replaces what is at a position. The terms by position."""
    made = {}
    for at, i in instrs:
        if OPCODES[int(i["op"])] == "STORE":
            stored.append(tuple(sorted((r, registers.get(r)) for r in e._uses(i))))
            continue
        term = (int(i["op"]), int(i["imm"]), *((r, registers.get(r)) for r in sorted(e._inputs(i))))
        made[at] = registers[int(i["dst"])] = given[at] if given and at in given else term
    return made


@pytest.mark.parametrize("seed", range(300))
def test_random_stages_store_what_they_stored(seed):
    e = RandomCode(seed)
    scalar = {r: ("scalar", r) for r in range(4)}
    run(e, enumerate(e._instrs(0, 3)), scalar, [])
    late = {**scalar, 2: ("reduced",)}
    run(e, enumerate(e._instrs(6, 3)), late, [])
    vector = list(enumerate(e._instrs(9, 14)))
    want: list = []
    run(e, vector, dict(late), want)
    before = e._early(1, frozenset())
    kept = {at for at, _, keep in before if keep}
    terms = run(e, [(at, i) for at, i, _ in before], dict(scalar), [])
    got: list = []
    after = [(at, vector[at][1]) for at in e._live([i for _, i in vector], kept)]
    run(e, after, dict(late), got, {at: terms[at] for at in kept})
    assert got == want


def test_random_stages_are_not_all_alike():
    sizes = [sum(keep for _, _, keep in RandomCode(seed)._early(1, frozenset())) for seed in range(300)]
    assert set(sizes) >= {0, 1, 2}
