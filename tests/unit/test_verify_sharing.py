"""Buffers that take turns in the same bytes: only successors are compared, and nothing slips through between them."""

import numpy as np
import pytest

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, WRITE
from jax_mpk.verify import events, verify
from tests.taskgraphs import Builder, oracle, sound
from tests.taskgraphs.oracle import ancestors


def turns(layers: int, rows: int = 4, lost: int = -1) -> Builder:
    """Rows that never meet: each layer's buffer takes the place of the one two layers before, row by row.

    Row 1 does not wait in layer `lost`.
    """
    b = Builder()
    out, before = b.buffer("result", 8 * rows, "out"), -1
    for n in range(layers):
        buffer = out if n == layers - 1 else b.buffer("workspace", 8 * rows, f"h{n}", offset=n % 2 * 8 * rows)
        for r, t in enumerate(b.grid(f"layer{n}", rows)):
            b.box(t, WRITE, buffer, 8 * r, 8)
            if n:
                b.box(t, READ, before, 8 * r, 8)
                b.event([t - rows], [t] if (n, r) != (lost, 1) else [])
        before = buffer
    return b


def rejected(b: Builder, *names: str) -> None:
    assert oracle(b.build()) is not None
    with pytest.raises(VerifyError) as error:
        verify(b.build())
    for name in names:
        assert name in str(error.value), str(error.value)


def test_the_proof_grows_with_the_program() -> None:
    """Not with the square of how often a place is taken."""
    pairs = [verify(turns(n).build()).pairs for n in (20, 40, 60)]
    assert pairs[2] - pairs[1] == pairs[1] - pairs[0] > 0


@pytest.mark.parametrize("layer", [1, 2, 11, 19])
def test_a_row_that_does_not_wait(layer: int) -> None:
    assert oracle(turns(20).build()) is None and verify(turns(20).build())
    rejected(turns(20, lost=layer), f"(layer{layer - 1}[1] ", f"(layer{layer}[1] ")


def one_place(*names: str) -> tuple[Builder, list[int]]:
    b = Builder()
    return b, [b.buffer("workspace", 8, name, offset=0) for name in names]


def test_a_buffer_with_a_hole_hides_nothing() -> None:
    """What `b` does not write orders nobody: a reader of `a` there must be before `c` by itself."""
    for hole in (True, False):
        b, (one, two, three) = one_place("a", "b", "c")
        for name, count in (("a", 1), ("use", 1), ("b", 2), ("c", 1), ("end", 1)):
            b.grid(name, count)
        b.box(0, WRITE, one, 0, 8)
        b.box(1, READ, one, 2, 4)
        b.box(2, WRITE, two, 0, 2)
        b.box(3, WRITE, two, *((6, 2) if hole else (2, 6)))
        b.box(4, WRITE, three, 0, 8)
        b.box(5, READ, three, 0, 8)
        b.box(5, WRITE, b.buffer("result", 1, "y"), 0, 1)
        b.event([0], [1, 2, 3])
        b.event([2, 3], [4])
        b.event([4], [5])
        if hole:
            rejected(b, "task 1 (use[0]", "task 4 (c[0]")
        b.event([1], [4] if hole else [3])
        assert oracle(b.build()) is None and verify(b.build())


def test_a_buffer_hides_another_only_once_it_is_written() -> None:
    """`c` is used while `b` is only half there: the order of `a` and `c` does not follow from those with `b`."""
    b, (one, two) = one_place("a", "b")
    three = b.buffer("workspace", 4, "c", offset=4)
    for name in ("a", "use_a", "b_low", "c", "use_c", "b_high", "use_b"):
        b.grid(name, 1)
    b.box(0, WRITE, one, 0, 8)
    b.box(1, READ, one, 0, 8)
    b.box(2, WRITE, two, 0, 4)
    b.box(3, WRITE, three, 0, 4)
    b.box(4, READ, three, 0, 4)
    b.box(5, WRITE, two, 4, 4)
    b.box(6, READ, two, 0, 8)
    b.box(6, WRITE, b.buffer("result", 1, "y"), 0, 1)
    b.event([0], [1])
    b.event([1], [2, 5])
    b.event([3], [4])
    b.event([4], [5])
    b.event([2, 5], [6])
    rejected(b, "task 0 (a[0]", "task 3 (c[0]")
    b.event([2], [3])
    assert oracle(b.build()) is None and verify(b.build())


def test_sets_of_ranks() -> None:
    rng = np.random.default_rng(0)

    def listed(s: events.Ranks) -> set[int]:
        return {*range(s[0]), *(s[0] + n for n in range(s[1].bit_length()) if s[1] >> n & 1)}

    for _ in range(500):
        a, b = (set(rng.integers(0, 12, int(rng.integers(0, 24))).tolist()) for _ in range(2))
        x, y = (events.packed(0, sum(1 << r for r in s)) for s in (a, b))
        assert listed(x) == a and not x[1] & 1
        assert listed(events.union(x, y)) == a | b
        assert listed(events.intersection(x, y)) == a & b
        assert events.meets(sorted(b), x) == bool(a & b)


def test_before_is_what_the_events_imply() -> None:
    for seed in range(200):
        tg = sound(seed)
        done, before = ancestors(tg), events.check(tg)
        a, b = (x.ravel() for x in np.indices((tg.tasks, tg.tasks)))
        want = [bool(done[y] >> x & 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert before.holds(a, b).tolist() == want, f"seed {seed}: python -m tests.taskgraphs {seed}"
