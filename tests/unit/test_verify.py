"""What the verifier says about graphs that are wrong in one known way, and its arithmetic of boxes against sets."""

from dataclasses import replace

import numpy as np
import pytest

from jax_mpk.device import CPU, H100
from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, Boxes, Csr, Streams, TaskGraph, TensorMap
from jax_mpk.verify import boxes as geometry
from jax_mpk.verify import verify
from tests.taskgraphs import Builder


def chain(b: Builder, *, ordered: bool = True) -> TaskGraph:
    """Two tasks fill a buffer, the third one copies it to the result."""
    x, h, y = b.buffer("arg", 8, "x"), b.buffer("workspace", 8, "h"), b.buffer("result", 8, "y")
    fill, copy = b.grid("fill", 2), b.grid("copy", 1)
    for t in fill:
        b.box(t, READ, x, 4 * t, 4)
        b.box(t, WRITE, h, 4 * t, 4)
    b.box(2, READ, h, 0, 8)
    b.box(2, WRITE, y, 0, 8)
    if ordered:
        b.event(fill, copy)
    return b.build(workers=2)


@pytest.fixture
def tg() -> TaskGraph:
    return chain(Builder())


def says(tg: TaskGraph, *texts: str, **options: object) -> None:
    with pytest.raises(VerifyError) as e:
        verify(tg, **options)
    for text in texts:
        assert text in str(e.value), str(e.value)


def test_certificate(tg: TaskGraph) -> None:
    c = verify(tg)
    assert (c.tasks, c.events, c.pairs, c.covered, c.workspace) == (3, 1, 2, 16, 8)
    assert str(c) == ("verified: 3 tasks and 1 events, no deadlock; 2 conflicting accesses in order; "
                      "16 bytes written once; workspace 8 bytes")  # fmt: skip


def test_no_tasks() -> None:
    b = Builder()
    b.grid("none", 0)
    assert verify(b.build()).tasks == 0


def test_order_comes_from_events_alone() -> None:
    """One worker would run these in the right order, but nothing says that there is only one."""
    tg = replace(chain(Builder(), ordered=False), workers=1, worker=np.zeros(3, np.int32))
    says(tg, "task 1 (fill[1] on worker 0) writes bytes [4, 8) of buffer 1 'h'", "task 2 (copy[0] on worker 0) reads them",
         "no chain of events")  # fmt: skip


def test_threshold(tg: TaskGraph) -> None:
    says(replace(tg, threshold=np.array([1], np.int32)), "event 0: 2 tasks trigger it and its threshold is 1",
         "task 1 (fill[1] on worker 1) triggers it", "task 2 (copy[0] on worker 0) waits for it")  # fmt: skip


def test_nobody_triggers(tg: TaskGraph) -> None:
    says(replace(tg, threshold=np.array([0], np.int32), triggers=Csr.empty(3)), "event 0: 0 tasks trigger it", "task 2")


def test_deadlock(tg: TaskGraph) -> None:
    says(replace(tg, order=np.array([0, 2, 1], np.int32)), "deadlock: task 2 (copy[0] on worker 0) at position 1",
         "event 0", "task 1 (fill[1] on worker 1) at position 2")  # fmt: skip


def test_missing_write(tg: TaskGraph) -> None:
    mode = tg.boxes.mode.copy()
    mode[3] = READ
    says(replace(tg, boxes=replace(tg.boxes, mode=mode)), "task 1 (fill[1] on worker 1) reads bytes [4, 8)", "no task writes",
         "task 0 (fill[0] on worker 0)")  # fmt: skip


def test_result_is_complete(tg: TaskGraph) -> None:
    run = tg.boxes.run.copy()
    run[-1] = 6
    says(
        replace(tg, boxes=replace(tg.boxes, run=run)), "bytes [6, 8) of buffer 2 'y' (result 0) are written by no task"
    )


def clobber() -> Builder:
    """A value is overwritten by a buffer in the same place, in a well ordered way, and read after that."""
    b = Builder()
    one, two, y = b.buffer("workspace", 8, "one"), b.buffer("workspace", 8, "two", offset=4), b.buffer("result", 8, "y")
    for n, name in enumerate(("one", "two", "use")):
        t = b.grid(name, 1)[0]
        if n:
            b.event([t - 1], [t])
    b.box(0, WRITE, one, 0, 8)
    b.box(1, WRITE, two, 0, 8)
    b.box(2, READ, two, 4, 4)
    b.box(2, WRITE, y, 0, 8)
    return b


def test_clobbered() -> None:
    b = clobber()
    assert verify(b.build())
    b.box(2, READ, 0, 0, 4)  # the part where `two` is not
    assert verify(b.build())
    b.box(2, READ, 0, 3, 2)
    says(b.build(), "task 0 (one[0] on worker 0) writes bytes [4, 5) of buffer 0 'one'", "task 1 (two[0] on worker 0)",
         "through buffer 1 'two'", "task 2 (use[0] on worker 0) reads them after that")  # fmt: skip


def test_two_buffers_in_one_place_in_one_task() -> None:
    b = clobber()
    b.box(1, READ, 0, 4, 1)
    says(b.build(), "task 1 (two[0] on worker 0)", "buffer 1 'two'", "buffer 0 'one'", "at the same place")


def test_updates_are_ordered() -> None:
    b = Builder()
    cache, y = b.buffer("result", 16, "cache", alias=3), b.buffer("result", 1, "y")
    tasks = b.grid("append", 2)
    for t in tasks:
        b.box(t, UPDATE, cache, 0, 16)
    b.box(1, WRITE, y, 0, 1)
    says(b.build(), "task 0 (append[0] on worker 0) updates bytes [0, 16) of buffer 0 'cache'", "task 1 (append[1]")
    b.event([0], [1])
    assert verify(b.build())


def test_only_attention_reads_what_it_has_written() -> None:
    for kind in ("attention", "rows"):
        b = Builder()
        y = b.buffer("result", 8, "y")
        b.grid("a", 1, kind)
        b.box(0, WRITE, y, 0, 8)
        b.box(0, READ, y, 2, 2)
        if kind == "attention":
            assert verify(b.build())
        else:
            says(b.build(), "task 0 (a[0] on worker 0) reads bytes [2, 4) of buffer 0 'y'")


STRUCTURE = {
    "no order": lambda tg: replace(tg, order=None),
    "not a permutation": lambda tg: replace(tg, order=np.array([0, 1, 1])),
    "there are 1 workers": lambda tg: replace(tg, workers=1),
    "of them have a worker": lambda tg: replace(tg, worker=np.zeros(2, np.int32)),
    "starts at task": lambda tg: replace(tg, grids=(tg.grids[0], replace(tg.grids[1], first=1))),
    "the grids have 2 tasks": lambda tg: replace(tg, grids=tg.grids[:1]),
    "3 tiles, but 2 tasks": lambda tg: replace(tg, grids=(replace(tg.grids[0], extent=(3,)), tg.grids[1])),
    "do not fit each other": lambda tg: replace(tg, grids=(replace(tg.grids[0], tile=(0,)), tg.grids[1])),
    "task 1 is number 0": lambda tg: replace(tg, index=np.zeros(3, np.int32)),
    "not one row for each": lambda tg: replace(tg, waits=Csr.empty(2)),
    "at most 4 fit": lambda tg: replace(tg, waits=Csr(np.array([0, 0, 0, 5]), np.arange(5)), threshold=np.zeros(5)),
    "name event 7 of 1": lambda tg: replace(tg, waits=Csr(tg.waits.start, np.array([7]))),
    "twice": lambda tg: replace(tg, waits=Csr(np.array([0, 0, 0, 2]), np.array([0, 0]))),
    "[0, 8) of a workspace of 7 bytes": lambda tg: replace(tg, workspace=7),
    "[-1, 7) of a workspace": lambda tg: edit_buffer(tg, 1, offset=-1),
    "id 5": lambda tg: edit_buffer(tg, 1, id=5),
    "in 'heap'": lambda tg: edit_buffer(tg, 1, space="heap"),
    "only a result can live": lambda tg: edit_buffer(tg, 1, alias=1),
    "are both operand 0": lambda tg: edit_buffer(tg, 2, alias=0),
    "its data do not fit": lambda tg: edit_buffer(tg, 0, space="const", offset=0, data=np.zeros(3, np.uint8)),
    "not sorted by task": lambda tg: edit_boxes(tg, task=tg.boxes.task[::-1]),
    "differ in length": lambda tg: edit_boxes(tg, run=tg.boxes.run[1:]),
    "names buffer 3": lambda tg: edit_boxes(tg, buffer=tg.boxes.buffer + 1),
    "mode 3": lambda tg: edit_boxes(tg, mode=tg.boxes.mode + np.uint8(2)),
    "is empty": lambda tg: edit_boxes(tg, run=tg.boxes.run - 4),
    "which has 8 bytes": lambda tg: edit_boxes(tg, offset=tg.boxes.offset + 1),
    "[-1, 3)": lambda tg: edit_boxes(tg, offset=tg.boxes.offset - 1),
    "which is an arg": lambda tg: edit_boxes(tg, mode=np.ones_like(tg.boxes.mode)),
    "overlap each other": lambda tg: edit_boxes(tg, count=tg.boxes.count + (tg.boxes.mode == WRITE)[:, None]),
}


def edit_buffer(tg: TaskGraph, n: int, **changes: object) -> TaskGraph:
    return replace(tg, buffers=(*tg.buffers[:n], replace(tg.buffers[n], **changes), *tg.buffers[n + 1 :]))


def edit_boxes(tg: TaskGraph, **columns: np.ndarray) -> TaskGraph:
    return replace(tg, boxes=replace(tg.boxes, **columns))


@pytest.mark.parametrize("text", STRUCTURE)
def test_structure(tg: TaskGraph, text: str) -> None:
    says(STRUCTURE[text](tg), text)


def test_one_buffer_for_a_result(tg: TaskGraph) -> None:
    says(edit_buffer(tg, 1, space="result"), "are both result 0")


# --- streams ----------------------------------------------------------------------------------------------------------


def streaming() -> TaskGraph:
    """Two tasks that stream halves of a 64 x 128 bf16 weight in frames of 16 rows."""
    b = Builder()
    w, y = b.buffer("arg", 64 * 128 * 2, "w"), b.buffer("result", 256, "y")
    for t in b.grid("matmul", 2):
        b.box(t, READ, w, 128 * t, 128, (64, 256))
        b.box(t, WRITE, y, 128 * t, 128)
    tg = b.build(workers=2)
    start = np.array([[0, 0, 0, 0], [64, 0, 0, 0]], np.int32)
    step = np.array([[0, 16, 0, 0]] * 2, np.int32)
    zero = np.zeros(2, np.int32)
    return replace(tg, maps=(TensorMap(w, 0, "bf16", (128, 64), (2, 256), (64, 16)),),
                   streams=Streams(np.arange(2, dtype=np.int32), zero, start, step, zero + 4))  # fmt: skip


STREAMS = {
    "names buffer 2": lambda tg: edit_map(tg, buffer=2),
    "do not fit each other": lambda tg: edit_map(tg, dims=(128,)),
    "a frame of (64, 65)": lambda tg: edit_map(tg, box=(64, 65)),
    "bytes [16, 16400) of 16384": lambda tg: edit_map(tg, offset=16),
    "before those of task 0 (matmul[0] on worker 0)": lambda tg: edit_streams(tg, task=tg.streams.task[::-1].copy()),
    "task 1 (matmul[1] on worker 1) streams 5 frames": lambda tg: edit_streams(tg, frames=np.array([4, 5])),
    "streams 0 frames": lambda tg: edit_streams(tg, frames=np.array([4, 0])),
    "differ in length": lambda tg: edit_streams(tg, frames=np.array([4])),
    "names task 2 of 2": lambda tg: edit_streams(tg, task=np.array([0, 2])),
    "streams buffer 1, which it does not read": lambda tg: edit_map(tg, buffer=1, dims=(8, 1), box=(1, 1)),
}


def edit_map(tg: TaskGraph, **changes: object) -> TaskGraph:
    dims = changes.get("dims", (128, 64))
    tg = replace(tg, maps=(replace(tg.maps[0], **changes),))
    return edit_streams(tg, start=tg.streams.start * 0, step=tg.streams.step * 0) if dims == (8, 1) else tg


def edit_streams(tg: TaskGraph, **columns: np.ndarray) -> TaskGraph:
    return replace(tg, streams=replace(tg.streams, **columns))


@pytest.mark.parametrize("text", STREAMS)
def test_streams(text: str) -> None:
    assert verify(streaming(), target=H100) and verify(streaming(), target=CPU)
    says(STREAMS[text](streaming()), text, target=H100)


def test_a_frame_fits_the_ring() -> None:
    says(streaming(), "a frame of 2048 bytes, the ring has room for 1024", target=replace(H100, frame=1024))


def test_streams_are_never_written() -> None:
    tg = streaming()
    b = replace(tg.buffers[0], space="result", index=1, alias=0)
    tg = replace(tg, buffers=(b, tg.buffers[1]))
    assert verify(tg)
    x = tg.boxes
    more = Boxes(
        *(np.append(a, a[-1:], axis=0) for a in (x.task, x.buffer, x.mode, x.offset, x.run, x.count, x.stride))
    )
    more.buffer[-1], more.mode[-1] = 0, UPDATE
    says(replace(tg, boxes=more), "task 1 (matmul[1] on worker 1) writes buffer 0, which task 0")


# --- boxes ------------------------------------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, n: int) -> Boxes:
    count = rng.integers(1, 4, (n, 4)) * (rng.random((n, 4)) < 0.6)
    stride = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 50, 7], (n, 4)) * rng.choice([1, 1, 1, -1], (n, 4))
    x = Boxes(np.zeros(n, np.int32), np.zeros(n, np.int32), rng.integers(0, 3, n).astype(np.uint8),
              rng.integers(400, 500, n), rng.integers(1, 40, n), np.maximum(count, 1), stride)  # fmt: skip
    keep = [r for r in range(n) if len(listed(x, r)) == len(set(listed(x, r)))]
    return Boxes(*(a[keep] for a in (x.task, x.buffer, x.mode, x.offset, x.run, x.count, x.stride)))


def listed(x: Boxes, row: int) -> list[int]:
    at = [int(x.offset[row])]
    for c, s in zip(x.count[row].tolist(), x.stride[row].tolist(), strict=True):
        at = [a + j * s for a in at for j in range(c)]
    return [a + j for a in at for j in range(int(x.run[row]))]


@pytest.mark.parametrize("dense", [True, False])
def test_overlaps_are_exact(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(geometry, "DENSE_JOIN", 0)
        monkeypatch.setattr(geometry, "BLOCK", 50)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = random_boxes(rng, 40)
        sets = [set(listed(x, r)) for r in range(len(x))]
        shape, writes = geometry.canonical(x), x.mode != READ
        assert shape.size.tolist() == [len(s) for s in sets], seed
        assert [(min(s), max(s) + 1) for s in sets] == list(zip(shape.offset.tolist(), shape.end.tolist(), strict=True))
        assert not len(geometry.self_overlaps(shape))
        want = {(i, j, len(sets[i] & sets[j])) for i in range(len(x)) for j in range(len(x))
                if writes[i] and (not writes[j] or i <= j) and sets[i] & sets[j]}  # fmt: skip
        got = list(zip(*(a.tolist() for a in geometry.overlaps(shape, writes)), strict=True))
        assert set(got) == want and len(got) == len(want), seed


def test_self_overlaps() -> None:
    rng = np.random.default_rng(1)
    n = 2000
    x = Boxes(np.zeros(n, np.int32), np.zeros(n, np.int32), np.ones(n, np.uint8), np.full(n, 500),
              rng.integers(1, 6, n), rng.integers(1, 4, (n, 4)), rng.integers(0, 20, (n, 4)))  # fmt: skip
    want = [r for r in range(n) if len(listed(x, r)) != len(set(listed(x, r)))]
    assert 0 < len(want) < n
    assert geometry.self_overlaps(geometry.canonical(x)).tolist() == want


def test_reads_may_slide() -> None:
    """A sliding window or a broadcast is the set of its bytes."""
    row = lambda n, s: Boxes(*(np.array([v]) for v in (0, 0, READ, 0, 4, [n, 1, 1, 1], [s, 0, 0, 0])))
    assert geometry.canonical(row(5, 2)).run == 12
    assert geometry.canonical(row(5, 0)).run == 4


def test_distinct() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 4, (500, 3))
    first, inverse = geometry.distinct(list(table.T))
    assert (table[first][inverse] == table).all()
    assert len(first) == len(np.unique(table, axis=0))
