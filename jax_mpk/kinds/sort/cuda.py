"""Sorted rows on a GPU: one row at a time in scratch, a bitonic network over all threads (`cuda/kinds/sort.cuh`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jax_mpk import abi
from jax_mpk.backends.cuda.space import Scratch
from jax_mpk.backends.cuda.struct import Struct
from jax_mpk.device import Device
from jax_mpk.ir.body import Body
from jax_mpk.kinds.bound import Bound
from jax_mpk.kinds.variant import ROOM, Variant


@dataclass(frozen=True)
class Sorting(Variant):
    """network: the row's length as a power of two, and no less than the lanes of a warp."""

    network: int = 0


def variant(b: Bound, body: Body, device: Device, fixed: Collection[int]) -> Sorting:
    n = b.axes[-1].extent
    network = max(32, 1 << (n - 1).bit_length())
    need = (-(-n // 32) * 32 + 2 * network) * 4
    spills = need > ROOM
    return Sorting(act=0 if spills else need, spill=need if spills else 0, network=network)


def source(s: Struct, v: Sorting) -> tuple[str, str]:
    """The call of a task, and its struct."""
    last, params, out = s.n - 1, s.body.params, s.body.cores["OUT"]
    points, space = s.points(list(range(last)))
    key = s.function("key", ", u32* buffer_", s.body.nests["MAIN"], {abi.SLOT_ACC: Scratch("buffer_")}, space)
    put = s.pick("void put(const Desc& d, const Range& r, int i, u32 x)",
                 f"store<{out.dtype.upper()}>(d.ptr[{out.slot}], {s.offset(out, range(last), space)} + "
                 f"(i64)i * {s.stride(out, last)}, x)")  # fmt: skip
    scratch = s.pick("u8* scratch(Worker& w)", "w.spill" if v.spill else "w.act")
    text = s.text(s.range(), points, key, put, scratch, N=s.extent[last], P=v.network, COUNT=params["COUNT"],
                  DESCENDING=bool(params["DESCENDING"]), POSITIONS=bool(params["PAYLOAD"]),
                  FLOAT=params["KEY_DTYPE"] == abi.enum("Dtype", "F32"))  # fmt: skip
    return "sort<@>(w, d)", text
