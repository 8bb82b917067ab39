"""Scans on a GPU: one row at a time in scratch, a part of it for every warp (`cuda/kinds/scan.cuh`)."""

from __future__ import annotations

from collections.abc import Collection

from jax_mpk import abi
from jax_mpk.backends.cuda.space import Scratch
from jax_mpk.backends.cuda.struct import Struct
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.kinds.bound import Bound
from jax_mpk.kinds.variant import ROOM, Variant


def variant(b: Bound, body: Body, device: Device, fixed: Collection[int]) -> Variant:
    need = b.axes[-1].extent * 4
    return Variant(acc=need) if need <= ROOM else Variant(spill=need)


def source(s: Struct, v: Variant) -> tuple[str, str]:
    """The call of a task, and its struct."""
    params = s.body.params
    points, space = s.points(list(range(s.n - 1)))
    row = {abi.SLOT_ACC: Scratch("row_")}
    how = abi.ENUMS["ScanOp"][params["SCAN_OP"]]
    kind = abi.ENUMS["Dtype"][params["REDUCE_DTYPE"]][0]
    if how in ("SUM", "PROD") and kind == "U":
        kind = "I"  # the same bits
    text = s.text(f"using Op = {how}_{kind};", s.range(), points,
                  s.function("element", ", u32* row_", s.body.nests["MAIN"], row, space),
                  s.function("epilogue", ", u32* row_", s.body.nests["EPILOGUE"], row, space),
                  s.pick("u32* row(Worker& w)", f"(u32*)w.{'spill' if v.spill else 'acc'}"),
                  N=s.extent[-1], REVERSE=bool(params["REVERSE"]))  # fmt: skip
    return "scan<@>(w, d)", text
