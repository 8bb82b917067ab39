"""explain, draw and cost_analysis on functions whose answers are known."""

import xml.etree.ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mpk import megakernelize
from jax_mpk.inspect import hops

X, W, V = jnp.ones((2, 64)), jnp.ones((64, 256)), jnp.ones((256, 64))


def mlp(x, w, v):
    h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jnp.tanh(h @ w) @ v


f = megakernelize(mlp, implementation="cpu")


def test_explain_says_hops_and_reasons():
    lowered = f.lower(X, W, V)
    text = f.explain(X, W, V)
    assert "mlp for cpu: 2 operators in 2 hops" in text
    assert text.count("\nhop ") == 2 and "verified: " in text and "emit" in text
    first, second = (g.name for g in lowered.tasks("events").grids)
    after = text.split("\nhop 2\n")[1]
    assert f"waits for {first}: reads " in after and second in after
    assert f"test_inspect.py:{mlp.__code__.co_firstlineno + 2}" in text
    nbytes = 4 * (X.size + W.size + V.size)
    assert f"{nbytes / 1000:.3g}kB of them constant" in text


def test_explain_names_overwriting():
    """A function that reads a cache and then overwrites it must wait, and says so."""

    def shift(cache, x):
        old = cache @ jnp.ones((64, 8))
        return lax.dynamic_update_slice(cache, x, (0, 0)), old

    text = megakernelize(shift, implementation="cpu").explain(jnp.ones((32, 64)), X)
    assert "overwrites" in text or "copy" in text or "2 hops" in text


def test_cost_of_a_matmul():
    cost = megakernelize(lambda x, w: x @ w, implementation="cpu").cost_analysis(X, W)
    assert cost.flops == 2 * 2 * 64 * 256
    assert cost.read == cost.stream == 4 * (X.size + W.size)
    assert cost.written == 4 * 2 * 256
    (op,) = cost.ops
    assert op.kind == "contract" and op.flops == cost.flops and op.tasks >= 1
    lines = str(cost).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "operator" and lines[-1].startswith("total")


def test_cost_counts_what_is_shared_once():
    """Every task reads all of x; that is one x. What the function updates is no stream."""
    cost = f.cost_analysis(X, W, V)
    assert cost.stream == 4 * (X.size + W.size + V.size)
    assert cost.flops == 2 * 2 * 64 * 256 * 2

    def append(cache, x):
        return lax.dynamic_update_slice(cache, x, (jnp.int32(3), 0)), x * 2

    cost = megakernelize(append, implementation="cpu").cost_analysis(jnp.ones((512, 64)), X)
    assert cost.stream < 4 * 512 * 64


def test_what_may_be_anywhere_counts_once():
    """A gather reads the rows that it gathers, an update writes its window: not the whole table."""
    table, rows = jnp.ones((4096, 32)), jnp.arange(4)

    def gather(t, i, w):
        return jnp.tanh(t[i]) @ w

    cost = megakernelize(gather, implementation="cpu").cost_analysis(table, rows, jnp.ones((32, 16)))
    assert 4 * 4 * 32 <= cost.read <= 4 * (2 * 4 * 32 + 32 * 16 + 2 * 4)

    def update(t, x, p):
        return lax.dynamic_update_slice(t, x, (p, 0))

    cost = megakernelize(update, implementation="cpu").cost_analysis(table, jnp.ones((1, 32)), jnp.int32(3))
    assert cost.written == 4 * 32 and 4 * 32 <= cost.read <= 4 * 32 + 8


def test_draw_is_svg_with_every_operator(tmp_path):
    path = tmp_path / "mlp.svg"
    svg = f.draw(X, W, V, file=path)
    assert path.read_text() == svg
    root = ET.fromstring(svg)
    ns = {"s": "http://www.w3.org/2000/svg"}
    tg = f.lower(X, W, V).tasks("events")
    texts = [t.text for t in root.iterfind(".//s:text", ns)]
    assert all(g.name in texts and any(t.startswith(f"{g.count} task") for t in texts) for g in tg.grids)
    assert "hop 1" in texts and "hop 2" in texts and "hop 3" not in texts
    assert len(root.findall("./s:path", ns)) == 1
    wide = float(root.get("width"))
    assert all(0 <= float(r.get("x", 0)) and float(r.get("x", 0)) + float(r.get("width")) <= wide
               for r in root.iterfind(".//s:rect", ns))  # fmt: skip


def test_hops_follow_the_longest_path():
    def fork(x, w):
        a = jnp.tanh(x @ w)
        b = jnp.sin(a @ w) @ w
        return a @ w + b

    w = jnp.ones((64, 64))
    tg = megakernelize(fork, implementation="cpu").lower(X, w).tasks("events")
    links = hops.edges(tg)
    level = hops.levels(tg, links)
    assert max(level) == len(set(level)) and min(level) == 1
    for e in links:
        assert level[e.consumer] > level[e.producer] and e.events >= 1 and "reads" in e.why
    assert max(level) in (3, 4)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (1000, "1k"), (4190000, "4.19M"), (2e12, "2T"), (2e15, "2e+03T")]
)
def test_sizes(n, text):
    from jax_mpk.inspect.text import size

    assert size(n) == text


def test_listing_covers_the_program():
    lowered = f.lower(X, W, V)
    text = lowered.text("program")
    tg = lowered.tasks()
    assert sum(line.startswith("task ") for line in text.splitlines()) == tg.tasks
    assert sum(line.startswith("op ") for line in text.splitlines()) == len(np.unique(tg.grid_of))
    for opcode in ("F_TANH", "F_RSQRT"):
        assert opcode in text
