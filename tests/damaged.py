"""Programs of every kind as files, for `mpk_fuzz`: `python -m tests.damaged DIR` writes them all."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest

SOME = ("softmax", "integers", "gather of gather", "update", "scatter add, drop", "concatenate, argmax", "top k, bf16", "sort",
        "norm, two matmuls", "matmul, bf16", "integer matmul", "batched, permuted", "cumulative", "cumulative, blocks", "products")  # fmt: skip


def more_cores() -> dict[str, tuple]:
    """Contractions and attentions of several axes each way, cut along the first: what their accesses must flatten to."""
    from tests.unit import test_emit as e

    x, w = e.data(2, 3, 4, 5, 6), e.data(2, 5, 6, 7, 8)
    cases = {"axes of each kind": (lambda x, w: e.jnp.einsum("bmnkl,bklpq->bmnpq", x, w), (x, w))}
    for name, spec, shape in (
        ("k contiguous", "bmnkl,bpqkl->bmnpq", (2, 7, 8, 5, 6)),
        ("strided", "bmnkl,bpqkl->bmnpq", (2, 7, 8, 5, 12)),
    ):
        f = lambda x, w, spec=spec: e.jnp.einsum(spec, x, w[..., : x.shape[-1]])
        cases |= {f"{name}, {t}": (f, (x.astype(t), e.data(*shape).astype(t))) for t in (e.BF16, e.np.float32)}
    q, k = e.data(2, 3, 40, 8), e.data(2, 50, 3, 8)
    attend = lambda q, k, v: e.jnp.einsum(
        "bhqk,bkhd->bqhd", e.jax.nn.softmax(e.jnp.einsum("bhqd,bkhd->bhqk", q, k), -1), v
    )
    return cases | {
        "attention": (attend, (q, k, e.data(2, 50, 3, 8, seed=1))),
        "attention, v across": (lambda q, k, v: attend(q, k, v.transpose(0, 3, 1, 2)), (q, k, e.data(2, 3, 8, 50))),
    }


def programs(names: Iterable[str] | None = None) -> dict[str, bytes]:
    """Programs of these functions of `test_emit` (all, and a decoder, by default), unfused and fused, cut small."""
    from jax_mpk.backends.cpu.operators import pressure
    from jax_mpk.kinds import KINDS, contract
    from jax_mpk.passes import refine
    from tests.unit import test_emit
    from tests.unit import test_executor_launch as launch

    cases = dict(test_emit.CASES)
    cases |= {
        f"{kind.name}, {case.name}": (case.fn, case.make(test_emit.np.random.default_rng(3)))
        for kind in KINDS
        for case in kind.cases
    }
    cases |= more_cores()
    cases["decoder"] = launch.decoder()
    out = {}
    with pytest.MonkeyPatch.context() as patch:  # many tasks of small operators
        for module in {sys.modules[kind.tile.__module__] for kind in KINDS}:
            if hasattr(module, "MIN_COST"):
                patch.setattr(module, "MIN_COST", 64)
        patch.setattr(contract, "MIN_MACS", 256)
        for name in names if names is not None else cases:
            for how, graph in zip(("", ", fused"), test_emit.graphs(cases[name][0], *cases[name][1]), strict=True):
                out[name + how] = test_emit.finish(refine.run(graph, pressure))
    return out


def write(folder: Path, blobs: dict[str, bytes]) -> list[Path]:
    files = []
    for n, blob in enumerate(dict.fromkeys(blobs.values())):
        files.append(folder / f"program{n:03d}.mpk")
        files[-1].write_bytes(blob)
    return files


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    to = Path(sys.argv[1])
    to.mkdir(parents=True, exist_ok=True)
    print(len(write(to, programs())), "programs")
