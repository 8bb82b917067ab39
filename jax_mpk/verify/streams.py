"""The weight streams: frames that exist, in the order in which the tasks consume them, and a ring that can hold them."""

from __future__ import annotations

import numpy as np

from jax_mpk.device import Device
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, Streams, TaskGraph


def itemsize(dtype: str) -> int:
    """Bytes of an element of type "bf16", "i32", "bool", ..."""
    return int("".join(c for c in dtype if c.isdigit()) or 8) // 8


def check(tg: TaskGraph, target: Device | None) -> None:
    """`target` limits the size of a frame and says how many of them a worker can hold."""
    frame = target.frame if target is not None and target.gpu else None
    for n, m in enumerate(tg.maps):
        at = f"tensor map {n}"
        if not 0 <= m.buffer < len(tg.buffers):
            raise VerifyError(f"{at} names buffer {m.buffer} of {len(tg.buffers)}")
        at += f" of buffer {m.buffer} {tg.buffers[m.buffer].name!r}"
        if not len(m.dims) == len(m.strides) == len(m.box) <= 4 or min(m.dims, default=0) < 1:
            raise VerifyError(f"{at}: dims {m.dims}, strides {m.strides} and box {m.box} do not fit each other")
        if any(not 1 <= b <= d for b, d in zip(m.box, m.dims, strict=True)):
            raise VerifyError(f"{at}: a frame of {m.box} of an array of {m.dims}")
        item = itemsize(m.dtype)
        end = m.offset + sum((d - 1) * s for d, s in zip(m.dims, m.strides, strict=True)) + item
        if m.offset < 0 or min(m.strides) < 0 or end > tg.buffers[m.buffer].nbytes:
            raise VerifyError(f"{at}: bytes [{m.offset}, {end}) of {tg.buffers[m.buffer].nbytes}")
        nbytes = int(np.prod(m.box)) * item
        if frame is not None and nbytes > frame:
            raise VerifyError(f"{at}: a frame of {nbytes} bytes, the ring has room for {frame} each")
    if tg.streams is not None and len(tg.streams.task):
        _entries(tg, tg.streams)


def _entries(tg: TaskGraph, s: Streams) -> None:
    if {len(a) for a in (s.map, s.start, s.step, s.frames)} != {len(s.task)}:
        raise VerifyError("the columns of the streams differ in length")
    for e in np.flatnonzero((s.task < 0) | (s.task >= tg.tasks) | (s.map < 0) | (s.map >= len(tg.maps)))[:1]:
        raise VerifyError(f"stream entry {e} names task {s.task[e]} of {tg.tasks} and map {s.map[e]} of {len(tg.maps)}")
    position = np.empty(tg.tasks, np.int64)
    position[tg.order] = np.arange(tg.tasks)
    for e in np.flatnonzero(np.diff(position[s.task]) < 0)[:1]:
        raise VerifyError(
            f"the stream has frames of {tg.task_name(s.task[e])} before those of {tg.task_name(s.task[e + 1])}, "
            "which is earlier in the linear order"
        )
    dims = np.array([(*m.dims, *[1] * (4 - len(m.dims))) for m in tg.maps], np.int64)[s.map]
    start = s.start.astype(np.int64)
    stop = start + (s.frames.astype(np.int64)[:, None] - 1) * s.step
    # A frame may stick out at the end of a dimension (the copy engine fills up with zeros), but must begin inside.
    bad = (s.frames < 1) | ((np.minimum(start, stop) < 0) | (np.maximum(start, stop) >= dims)).any(1)
    for e in np.flatnonzero(bad)[:1]:
        raise VerifyError(f"{tg.task_name(s.task[e])} streams {s.frames[e]} frames from {start[e].tolist()} to "
                          f"{stop[e].tolist()} of tensor map {s.map[e]}, which is {dims[e].tolist()}")  # fmt: skip
    buffer = np.array([m.buffer for m in tg.maps], np.int64)[s.map]
    x = tg.boxes
    n = len(tg.buffers)
    reads = (x.task.astype(np.int64) * n + x.buffer)[x.mode == READ]
    for e in np.flatnonzero(~np.isin(s.task.astype(np.int64) * n + buffer, reads))[:1]:
        raise VerifyError(f"{tg.task_name(s.task[e])} streams buffer {buffer[e]}, which it does not read")
    for r in np.flatnonzero((x.mode != READ) & np.isin(x.buffer, buffer))[:1]:
        e = np.flatnonzero(buffer == x.buffer[r])[0]
        raise VerifyError(f"{tg.task_name(x.task[r])} writes buffer {x.buffer[r]}, which {tg.task_name(s.task[e])} "
                          "streams: streams do not wait for anybody")  # fmt: skip
