"""Programs of every kind as files, for `mpk_fuzz`: `python tests/damaged.py DIR` writes them all."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT.parent), str(ROOT), str(ROOT / "unit")]
SOME = ("softmax", "integers", "gather of gather", "update", "scatter add, drop", "concatenate, argmax", "top k, bf16", "sort",
        "norm, two matmuls", "matmul, bf16", "integer matmul", "batched, permuted", "cumulative", "products")  # fmt: skip


def programs(names: Iterable[str] | None = None) -> dict[str, bytes]:
    """Programs of these functions of `test_emit` (all, and a decoder, by default), unfused and fused, cut small."""
    import test_emit
    import test_executor_launch as launch

    from jax_mpk.passes import refine
    from jax_mpk.tasks import KINDS, contract, rows, sort

    cases = dict(test_emit.CASES)
    cases |= {f"{kind.name}, {case.name}": (case.fn, case.make(test_emit.np.random.default_rng(3))) for kind in KINDS for case in kind.cases}
    cases["decoder"] = launch.decoder()
    out = {}
    with pytest.MonkeyPatch.context() as patch:  # many tasks of small operators
        for module in (rows, sort):
            patch.setattr(module, "MIN_COST", 64)
        patch.setattr(contract, "MIN_MACS", 256)
        for name in names if names is not None else cases:
            for how, graph in zip(("", ", fused"), test_emit.graphs(cases[name][0], *cases[name][1]), strict=True):
                out[name + how] = test_emit.finish(refine.run(graph))
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
