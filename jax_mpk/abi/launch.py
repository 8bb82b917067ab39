"""What the launcher, the kernel and the emulator of CUDA programs agree on beside the program: who is who in a block, and
the memory of a call site that outlives a launch."""

from __future__ import annotations

import numpy as np

WARPS = 16
"""Consumer warps of a block: they run the tasks."""
ROLES = ("CONTROLLER", "LOADER", "STORER")
"""The warps behind them: fetches tasks and polls events; walks the weight stream; triggers events."""
WARP = {role: WARPS + n for n, role in enumerate(ROLES)}
THREADS, BLOCK = 32 * WARPS, 32 * (WARPS + len(ROLES))
FRAME, INNER = 16384, 128
"""Bytes of a frame of the weight stream, which one tensor copy brings, and of its contiguous run."""
EVENT_WORDS = 32
"""Words of a counter: a cache line of its own, so that pollers and triggers of other events leave it alone."""
MAP_BYTES = 128
"""Bytes of an encoded tensor map."""

CONSTANTS = {"WARPS": WARPS, **WARP, "THREADS": THREADS, "BLOCK": BLOCK, "FRAME": FRAME, "EVENT_WORDS": EVENT_WORDS,
             "MAP_BYTES": MAP_BYTES}  # fmt: skip
GAVE_UP = ["OK", "EVENT", "FRAME"]
"""Why a launch gave up: it waited too long for an event, or for a frame of the stream."""

_u32, _u64 = "<u4", "<u8"

RECORDS: dict[str, np.dtype] = {
    # Written by the kernel in mapped host memory, read by the host without synchronisation; `code` (GaveUp) is written last.
    "Status": np.dtype([(n, _u32) for n in ("code", "worker", "task", "event", "have", "want", "op", "pad")]),
    # One per call site and device, in device memory. The host writes it once; `epoch` on are the kernel's. tasks and stream
    # are sorted by worker, `first` and `stream_first` say where each worker's begin; slots: `buffer` is an index into the
    # bases of a launch; counters: one event per EVENT_WORDS; tickets: one per task that several workers share; spill: byte
    # offset in the workspace of the workers' scratch.
    "State": np.dtype([(n, _u64) for n in ("tasks", "first", "units", "slots", "stream", "stream_first", "maps", "counters",
                                           "tickets", "status", "limit_ns", "spill")]
                      + [(n, _u32) for n in ("counter_words", "ticket_words", "epoch", "exits", "abort", "pad")]),
}  # fmt: skip

POINTERS = {"tasks": "const Task", "first": "const uint32_t", "units": "const Unit", "slots": "const Slot",
            "stream": "const Stream", "stream_first": "const uint32_t", "maps": "const uint8_t", "counters": "uint32_t",
            "tickets": "uint32_t", "status": "Status"}  # fmt: skip
"""What fields of State point to, in device memory."""
