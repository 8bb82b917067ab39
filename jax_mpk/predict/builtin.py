"""The constants that are built in, and which of them a device gets.

CPU: fitted to `benchmarks.choose` on two cores of an EPYC 7003. GPUs: docs/measurements.md and its raw files. Where a
figure varies, XLA's is the fastest seen and the megakernel's the slowest: a doubt goes to XLA.
"""

from __future__ import annotations

import math
from dataclasses import replace

from jax_mpk.device import Device
from jax_mpk.predict.constants import Constants, Rate, Side

R = Rate

CPU = Constants(
    "CPU", "built in, of two cores of an EPYC 7003", workers=2, alone=100.0, hop=8.0, scalar=4e4, margin=1.2, gain=2.0, cache=20 << 20,
    xla=Side(12.0, {
        "": (R(2, 2e4, 2e3),),
        "fused": (R(0, 2e4, 2e4, overlap=True),),
        "fusion": (R(0.5, 2e4, 2e4, overlap=True),),
        "reduce": (R(1, 2.2e4, 1e4, overlap=True),),
        "argmax": (R(1, 2e4, 1e3, overlap=True),),
        "loop": (R(0.5),),
        "scatter": (R(1, 2e4, 5e3),),
        "sort": (R(5, 2e4, 60),),
        "top_k": (R(5, 2e4, 600),),
        "window": (R(3, 2e4, 2e3),),
        "cumulative": (R(3, 2e4, 700),),
        "conv": (R(20, 2e4, 5e4),),
        "grouped": (R(20, 2e4, 200),),
        "fft": (R(5, 2e4, 300),),
        "other": (R(5, 2e4, 300),),
        "dot float32": (R(1, 2.4e4, math.inf, 1, near=3e4), R(5, 2.4e4, 1.5e4, 8), R(5, 2.4e4, 3e4, 16), R(5, 2.4e4, 5e4)),
        "dot bfloat16": (R(1, 5e3, math.inf, 1), R(1, 1.5e4, 5e3, 8), R(1, 1.5e4, 1.2e4, 16), R(2, 2e4, 2.2e4, 32),
                         R(2, 2e4, 4.5e4)),
        "dot": (R(1, 2e4, 4e3, 1), R(1, 2e4, 5e4)),
        "batched": (R(1, 2e4, 6e3, 8), R(1, 2e4, 3.3e4)),
        "batched strided": (R(1, 2e4, 1.7e3, 8), R(1, 2e4, 3.3e4)),
    }),
    mpk=Side(24.0, {
        "": (R(0, 1.8e4, 6e3),),
        "rows": (R(0, 2e4, 6e3),),
        "narrow": (R(0, 2e4, 300),),
        "strided": (R(0, 2e4, 7e2),),
        "update": (R(0, 2e4, 3e3),),
        "sort": (R(0, 2e4, 220),),
        "scan": (R(0, 2e4, 2.5e3),),
        "top_k": (R(0, 2e4, 7e3),),
        "attention": (R(0, 2.4e4, 3.5e3, 16), R(0, 2.4e4, 8e3)),
        "contract f32": (R(0, 2.9e4, math.inf, 1, near=4.5e4), R(0, 2.9e4, 2.2e4, 4), R(0, 2.9e4, 5e3, 8), R(0, 2.9e4, 1.8e4)),
        "contract bf16": (R(0, 2.4e4, math.inf, 1), R(0, 2.4e4, 3e4, 4), R(0, 2.4e4, 1e4, 8), R(0, 2.4e4, 2.5e4)),
        "contract i8": (R(0, 2e4, 1e4, 4), R(0, 2e4, 4e4)),
        "contract": (R(0, 2e4, 5e3),),
    }),
)  # fmt: skip
"""`benchmarks.choose` on two cores; a machine with more gets more of both, and calibration scales it."""

H100 = Constants(
    "H100", "built in, of docs/measurements.md", workers=132, alone=0.0, hop=2.2, scalar=1e7, margin=1.05, gain=20.0, ahead=12 << 14, level=4.0,
    xla=Side(3.0, {
        "": (R(2.5, 2.5e6, 1e6, overlap=True),),
        "fused": (R(0, 2.9e6, 2e7, overlap=True),),
        "fusion": (R(1.3, 2.9e6, 2e7, overlap=True),),
        "reduce": (R(1.3, 2.9e6, 1e7, overlap=True),),
        "argmax": (R(3.0, 2.5e6, 5e6, overlap=True),),
        "loop": (R(3.0),),
        "scatter": (R(2.5, 2e6, 1e6),),
        "sort": (R(8.0, 1e6, 3e4),),
        "top_k": (R(20.0, 1e6, 3e3),),
        "cumulative": (R(4.0, 2e6, 2e6),),
        "other": (R(10.0, 1e6, 1e5),),
        "conv": (R(3.0, 2.5e6, 5e7, overlap=True),),
        "dot float32": (R(2.9, 3e6, 2e7, 1, True), R(1.9, 3e6, 1.8e8, overlap=True)),
        "dot bfloat16": (R(2.9, 3e6, math.inf, 1, True), R(1.9, 3e6, 3e8, overlap=True)),
        "dot float16": (R(1.9, 3e6, 3e8, overlap=True),),
        "dot": (R(1.9, 2.5e6, 5e7, overlap=True),),
        "batched": (R(2.0, 2.5e6, 1e8, overlap=True),),
    }),
    mpk=Side(10.0, {
        "": (R(0, 1e6, 5e5),),
        "rows": (R(0.3, 2e6, 2e7, worker=6e4),),
        "narrow": (R(0, 1.5e6, 1e6),),
        "strided": (R(0, 5e5, 3e5),),
        "update": (R(0, 1e6, 2e5),),
        "update serial": (R(0, 1e6, 900),),
        "sort": (R(0, 1e6, 1e5),),
        "scan": (R(0, 1e6, 1e6, overlap=True),),
        "top_k": (R(0, 1e6, 2e5),),
        "attention": (R(0.5, 2.4e6, 6e7, 16, worker=9e4), R(1.0, 1e6, 4e6, worker=6e4)),
        "attention f32": (R(1.0, 1e6, 2e7, 16, worker=2e4), R(1.0, 5e5, 2e6, worker=1e4)),
        "contract bf16": (R(0, 3e6, math.inf, 4), R(0, 3e6, 2.5e8, 8), R(0, 3e6, 3e7, 16), R(0, 3e6, 8e6)),
        "contract f32": (R(0, 2.5e6, 2e7, 4), R(0, 2e6, 3e6)),
        "contract": (R(0, 1.5e6, 4e6),),
    }),
)  # fmt: skip
"""A hop and a kernel of XLA from steps of Llama-3.2-1B and Qwen3 (runs 26 to 29): a layer of Qwen3-0.6B at batch 1 takes 28.5 us, of which
9.8 are its weights' bytes and 6 its attention, in 5 hops; kernels that read 4 to 64 MB take 2.8 to 3.5 us more than their bytes."""

H200 = replace(H100.slower(1.0, 3108 / 4533, 1.0, H100.source), name="H200", hop=3.3, level=5.5)
"""Its memory is faster, its hops are not: beyond its bytes, a step of Llama-3.2-1B takes 1.4 times as long as on an H100."""


def constants(target: Device, kind: str = "") -> Constants:
    """The built-in constants for a device; `kind`: what its maker calls it. An unknown GPU is an H100 with its number of
    multiprocessors, and so much of its bandwidth; the code without tensor copies is slower than XLA beyond a row or so."""
    if not target.gpu:
        more = max(1.0, min(target.workers, 16) / CPU.workers)
        return replace(CPU, workers=target.workers) if more == 1 else replace(
            CPU.slower(1.0, 1 / math.sqrt(more), 1 / more, CPU.source + f", for {target.workers}"), workers=target.workers)  # fmt: skip
    base = H200 if "H200" in kind else H100
    if "H100" not in kind and "H200" not in kind and target.workers != H100.workers:
        share = H100.workers / target.workers
        base = base.slower(1.0, share, share, f"{base.source}, as of an H100 with {target.workers} multiprocessors")
    mpk = base.mpk
    if not target.tensor_copies:
        direct = (R(0, 2.2e6, math.inf, 1), R(0, 1.5e6, 4e6))
        mpk = replace(mpk, rates={**mpk.rates, "contract bf16": direct})
    return replace(base, workers=target.workers, mpk=mpk)
