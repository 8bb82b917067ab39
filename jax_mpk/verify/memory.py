"""Does every read see the bytes that the program means, whatever legal order the tasks run in?

Two steps. First, any two tasks that touch a byte, one of them writing, are ordered by events as in program order; so
every execution moves the same values as the sequential one. Second, the sequential one is right: what a read sees was
written, by its own buffer, and what must be written once is written once.
"""

from __future__ import annotations

import numpy as np

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, TaskGraph
from jax_mpk.verify.accesses import Accesses, collect, group_pairs, overlapping_cells
from jax_mpk.verify.boxes import Shapes, join, rectangles
from jax_mpk.verify.events import Before
from jax_mpk.verify.report import Report
from jax_mpk.verify.sharing import memories


def check(tg: TaskGraph, shape: Shapes, before: Before) -> tuple[int, int]:
    """Returns how many conflicting pairs of accesses are ordered, and how many bytes are covered by writes."""
    say = Report(tg, shape)
    written = np.zeros(len(tg.buffers), bool)
    written[tg.boxes.buffer[tg.boxes.mode != READ]] = True
    defined = np.array([b.defined for b in tg.buffers], bool)
    for r in np.flatnonzero(~(written | defined)[tg.boxes.buffer])[:1]:
        raise VerifyError(say.never_written(r))
    memory, base = memories(tg, shape, before)
    acc = collect(tg, shape, before, written, memory, base)
    i, j, size = overlapping_cells(acc)
    g, h, pair = group_pairs(acc, i, j)
    _ordered(acc, g, h, before, say)
    _once(acc, g, h, defined, say)
    _covered(acc, g, h, size[pair], defined, tg, say)
    _not_clobbered(acc, say)
    return len(g), _results(acc, tg, say)


def _ordered(acc: Accesses, g: np.ndarray, h: np.ndarray, before: Before, say: Report) -> None:
    """Events order each pair, in program order."""
    task = acc.first[g]  # of the write
    for a, b, first_is_write in ((task, acc.last[h], True), (acc.first[h], task, False)):
        pairs = np.flatnonzero(a < b)
        bad = pairs[~before.holds(a[pairs], b[pairs])]
        if len(bad):
            across = acc.buffer[acc.cell[g[bad]]] != acc.buffer[acc.cell[h[bad]]]
            p = bad[np.lexsort((a[bad], (b - a)[bad], across))[0]]  # the closest two say most
            one, other = (g[p], h[p]) if first_is_write else (h[p], g[p])
            raise VerifyError(say.unordered(acc, one, int(a[p]), other, int(b[p])))


def _once(acc: Accesses, g: np.ndarray, h: np.ndarray, defined: np.ndarray, say: Report) -> None:
    """No byte is written twice, except by updates and in donated operands, and no task uses bytes of two buffers."""
    i, j = acc.cell[g], acc.cell[h]
    same_task = (acc.first[g] == acc.first[h]) & (acc.first[h] == acc.last[h])
    writes = (acc.mode[i] == WRITE) & (acc.mode[j] == WRITE)
    same_buffer = acc.buffer[i] == acc.buffer[j]
    for p in np.flatnonzero(same_task & ~same_buffer)[:1]:
        raise VerifyError(say.both(acc, g[p], h[p]))
    twice = writes & same_buffer & (same_task | ~defined[acc.buffer[i]])
    for p in np.flatnonzero(twice)[:1]:
        raise VerifyError(say.twice(acc, g[p], h[p]))


def _covered(acc: Accesses, g: np.ndarray, h: np.ndarray, size: np.ndarray, defined: np.ndarray, tg: TaskGraph,
             say: Report) -> None:  # fmt: skip
    """Every byte that is read (an update reads its box) was written: the writes do not overlap, so sizes add up.

    An attention task may read what it has itself appended: it stores first. Other kinds promise no order inside a task.
    """
    attention = np.array([x.kind.lower() == "attention" for x in tg.grids], bool)[tg.grid_of]
    i, j = acc.cell[g], acc.cell[h]
    gives = (acc.mode[i] == WRITE) & (acc.buffer[i] == acc.buffer[j])
    earlier = acc.first[g] < acc.first[h]
    own = (acc.first[g] == acc.first[h]) & attention[acc.first[h]] & (acc.mode[j] == READ)
    total = np.zeros(len(acc.cell), np.int64)
    np.add.at(total, h[gives & (earlier | own)], size[gives & (earlier | own)])
    # An update is a write, too: of two writes either may come first in the pair.
    gives = (acc.mode[j] == WRITE) & (acc.mode[i] == UPDATE) & (acc.buffer[i] == acc.buffer[j])
    gives &= acc.first[h] < acc.first[g]
    np.add.at(total, g[gives], size[gives])
    reads = (acc.mode != WRITE) & ~defined[acc.buffer]
    lacking = np.flatnonzero(reads[acc.cell] & (total < acc.shape.size[acc.cell]))
    if len(lacking):
        raise VerifyError(say.undefined(acc, lacking[np.argmin(acc.first[lacking])]))


def _not_clobbered(acc: Accesses, say: Report) -> None:
    """In memories that buffers share: nobody writes between a buffer's write and its read of the same byte."""
    bounds = np.flatnonzero(np.diff(acc.memory, prepend=-1, append=-1))
    group = np.searchsorted(acc.cell, np.arange(len(acc.row) + 1))
    last = np.zeros(len(acc.row), np.int64)
    np.maximum.at(last, acc.cell, acc.last)
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        buffer, mode = acc.buffer[a:b], acc.mode[a:b]
        if (buffer == buffer[0]).all():
            continue
        rects = rectangles(acc.shape[np.arange(a, b)])
        ours, theirs, reads = rects.of(mode == WRITE), rects.of(mode != READ), rects.of(mode != WRITE)
        i, j = join(ours, theirs)
        other = buffer[ours.own[i]] != buffer[theirs.own[j]]
        i, j = i[other], j[other]
        common = ours.meet(i, theirs, j)
        pair, read = join(common, reads)
        mine = buffer[ours.own[i[pair]]] == buffer[reads.own[read]]
        pair, read = pair[mine], read[mine]
        lost = common.meet(pair, reads, read)
        for n, (p, k) in enumerate(zip(pair.tolist(), read.tolist(), strict=True)):
            one, two, three = (a + int(c) for c in (ours.own[i[p]], theirs.own[j[p]], reads.own[k]))
            start, end = int(acc.first[group[one]]), int(last[three])
            between = acc.first[group[two] : group[two + 1]]
            for t in between[(between > start) & (between < end)][:1].tolist():
                raise VerifyError(say.clobbered(acc, (one, two, three), (start, t, end), lost.first_run(n)))


def _results(acc: Accesses, tg: TaskGraph, say: Report) -> int:
    """Every byte of every result is written; returns the bytes that writes cover."""
    covered = np.zeros(len(tg.buffers), np.int64)
    whole = acc.mode == WRITE
    np.add.at(covered, acc.buffer[whole], acc.shape.size[whole])
    for b in tg.buffers:
        if b.space == "result" and b.alias < 0 and covered[b.id] < b.nbytes:
            raise VerifyError(say.not_covered(b.id))
    return int(covered.sum())
