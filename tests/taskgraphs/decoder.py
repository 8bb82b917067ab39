"""A task graph as large as that of a real model."""

from __future__ import annotations

from jax_mpk.ir.tasks import READ, UPDATE, WRITE, TaskGraph
from tests.taskgraphs.builder import Builder


def decoder(layers: int = 36, batch: int = 16, context: int = 1024) -> TaskGraph:
    """A decode step with the shapes of Qwen3-8B (bf16) as the compiler would make it: 31,000 tasks, 145,000 boxes.

    Per layer: QKV, attention with cache appends, O, gate and up, down split in four with a reduction. Weights are
    row-major (contracted axis first), a task takes 64 columns. Two sets of activations take turns in the workspace.
    """
    hidden, heads, groups, head, inner, vocabulary, tile = 4096, 32, 8, 128, 12288, 151936, 64
    b = Builder()
    x = b.buffer("arg", batch * hidden * 2, "x")
    norm_arg = b.buffer("arg", hidden * 2, "norm")
    position = b.buffer("arg", batch * 4, "position")
    previous: range = range(0)

    def columns(t: int, mode: int, buffer: int, n: int, width: int, rows: int, size: int = 2, step: int = tile) -> None:
        b.box(t, mode, buffer, n * step * size, step * size, (rows, width * size))

    def matmul(name: str, weights: list[int], k: int, n: int, source: int, out: int, residual: int = -1) -> range:
        tasks = b.grid(name, n // tile, "contract")
        for i, t in enumerate(tasks):
            b.box(t, READ, source, 0, batch * k * 2)
            b.box(t, READ, norm_arg, 0, hidden * 2)
            for w in weights:
                columns(t, READ, w, i, n, k)
            if residual >= 0:
                columns(t, READ, residual, i, n, batch)
            columns(t, WRITE, out, i, n, batch)
        return tasks

    for layer in range(layers):
        at = (layer % 2) * (1 << 23)

        def work(name: str, nbytes: int, layer: int = layer) -> int:
            nonlocal at
            at += nbytes
            return b.buffer("workspace", nbytes, f"{name}{layer}", offset=at - nbytes)

        qkv_n = (heads + 2 * groups) * head
        weight = {n: b.buffer("arg", s, f"{n}{layer}") for n, s in (
            ("wqkv", hidden * qkv_n * 2), ("wo", heads * head * hidden * 2), ("wgate", hidden * inner * 2),
            ("wup", hidden * inner * 2), ("wdown", inner * hidden * 2))}  # fmt: skip
        cache = [b.buffer("result", batch * context * groups * head * 2, f"{n}{layer}", alias=1000 + 2 * layer + i)
                 for i, n in enumerate("kv")]  # fmt: skip
        qkv, att, mid = (
            work("qkv", batch * qkv_n * 2),
            work("att", batch * heads * head * 2),
            work("mid", batch * hidden * 2),
        )
        act, part, out = (
            work("act", batch * inner * 2),
            work("part", 4 * batch * hidden * 4),
            work("x", batch * hidden * 2),
        )

        a = matmul("qkv", [weight["wqkv"]], hidden, qkv_n, x, qkv)
        if len(previous):
            b.event(previous, a)
        c = b.grid("attention", batch * groups, "attention")
        for i, t in enumerate(c):
            row, g = divmod(i, groups)
            span = heads // groups * head * 2
            b.box(t, READ, position, row * 4, 4)
            b.box(t, READ, qkv, row * qkv_n * 2 + g * span, span)
            for n, buf in enumerate(cache):
                b.box(t, READ, qkv, (row * qkv_n + (heads + n * groups + g) * head) * 2, head * 2)
                where = (row * context * groups + g) * head * 2
                b.box(t, UPDATE, buf, where, head * 2, (context, groups * head * 2))
                b.box(t, READ, buf, where, head * 2, (context, groups * head * 2))
            b.box(t, WRITE, att, row * heads * head * 2 + g * span, span)
        for g in range(groups):
            per = heads // groups * head // tile
            q = [a[g * per + n] for n in range(per)]
            kv = [a[(heads + s * groups + g) * head // tile + n] for s in range(2) for n in range(head // tile)]
            b.event(q + kv, [c[row * groups + g] for row in range(batch)])
        d = matmul("o", [weight["wo"]], heads * head, hidden, att, mid, residual=x)
        b.event(c, d)
        e = matmul("gate_up", [weight["wgate"], weight["wup"]], hidden, inner, mid, act)
        b.event(d, e)
        f = b.grid("down", 4 * hidden // tile, "contract")
        for i, t in enumerate(f):
            s, n = divmod(i, hidden // tile)
            k = inner // 4
            b.box(t, READ, act, s * k * 2, k * 2, (batch, inner * 2))
            b.box(t, READ, weight["wdown"], (s * k * hidden + n * tile) * 2, tile * 2, (k, hidden * 2))
            b.box(t, WRITE, part, (s * batch * hidden + n * tile) * 4, tile * 4, (batch, hidden * 4))
        for s in range(4):
            b.event(e[s * len(e) // 4 : (s + 1) * len(e) // 4], f[s * len(f) // 4 : (s + 1) * len(f) // 4])
        h = b.grid("sum", hidden // tile)
        for i, t in enumerate(h):
            b.box(t, READ, part, i * tile * 4, tile * 4, (batch, hidden * 4), (4, batch * hidden * 4))
            columns(t, READ, mid, i, hidden, batch)
            columns(t, WRITE, out, i, hidden, batch)
            b.event([f[s * len(h) + i] for s in range(4)], [t])
        x, previous = out, h
    logits = b.buffer("result", batch * vocabulary * 2, "logits")
    b.event(
        previous, matmul("logits", [b.buffer("arg", hidden * vocabulary * 2, "head")], hidden, vocabulary, x, logits)
    )
    return b.build(workers=132)
