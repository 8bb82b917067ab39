"""Does every read see the bytes that the program means, whatever legal order the tasks run in?

Two steps. First, any two tasks that touch a byte, one of them writing, are ordered by events as in program order; so
every execution moves the same values as the sequential one. Second, the sequential one is right: what a read sees was
written, by its own buffer, and what must be written once is written once.
"""

from __future__ import annotations

import numpy as np

from jax_mpk.errors import VerifyError
from jax_mpk.ir.tasks import READ, UPDATE, WRITE, TaskGraph
from jax_mpk.verify.accesses import Accesses, across, collect, group_pairs, placed, within
from jax_mpk.verify.boxes import Shapes, concatenate, join, ragged, rectangles
from jax_mpk.verify.events import Before
from jax_mpk.verify.report import Report
from jax_mpk.verify.sharing import meetings


def check(tg: TaskGraph, shape: Shapes, before: Before) -> tuple[int, int]:
    """Returns how many conflicting pairs of accesses are ordered, and how many bytes are covered by writes."""
    say = Report(tg, shape)
    written = np.zeros(len(tg.buffers), bool)
    written[tg.boxes.buffer[tg.boxes.mode != READ]] = True
    defined = np.array([b.defined for b in tg.buffers], bool)
    for r in np.flatnonzero(~(written | defined)[tg.boxes.buffer])[:1]:
        raise VerifyError(say.never_written(r))
    acc = collect(tg, shape, before, written)
    i, j, size = within(acc)
    g, h, pair = group_pairs(acc, i, j)
    _ordered(acc, g, h, before, say)
    _once(acc, g, h, defined, say)
    _covered(acc, g, h, size[pair], defined, tg, say)
    covered = _results(acc, tg, say)
    shared, mixed = meetings(acc, before)
    x, y, _ = group_pairs(acc, *across(acc, shared)[:2])
    _ordered(acc, x, y, before, say)
    _apart(acc, x, y, say)
    _not_clobbered(acc, mixed, say)
    return len(g) + len(x), covered


def _ordered(acc: Accesses, g: np.ndarray, h: np.ndarray, before: Before, say: Report) -> None:
    """Events order each pair, in program order."""
    task = acc.first[g]  # of the write
    for a, b, first_is_write in ((task, acc.last[h], True), (acc.first[h], task, False)):
        pairs = np.flatnonzero(a < b)
        bad = pairs[~before.holds(a[pairs], b[pairs])]
        if len(bad):
            p = bad[np.lexsort((a[bad], (b - a)[bad]))[0]]  # the closest two say most
            one, other = (g[p], h[p]) if first_is_write else (h[p], g[p])
            raise VerifyError(say.unordered(acc, one, int(a[p]), other, int(b[p])))


def _once(acc: Accesses, g: np.ndarray, h: np.ndarray, defined: np.ndarray, say: Report) -> None:
    """No byte of a buffer is written twice, except by updates and in donated operands."""
    i, j = acc.cell[g], acc.cell[h]
    same_task = (acc.first[g] == acc.first[h]) & (acc.first[h] == acc.last[h])
    writes = (acc.mode[i] == WRITE) & (acc.mode[j] == WRITE)
    for p in np.flatnonzero(writes & (same_task | ~defined[acc.buffer[i]]))[:1]:
        raise VerifyError(say.twice(acc, g[p], h[p]))


def _apart(acc: Accesses, g: np.ndarray, h: np.ndarray, say: Report) -> None:
    """No task writes a byte of one buffer and uses it as that of another one."""
    for p in np.flatnonzero((acc.first[g] == acc.first[h]) & (acc.first[h] == acc.last[h]))[:1]:
        raise VerifyError(say.both(acc, g[p], h[p]))


def _covered(acc: Accesses, g: np.ndarray, h: np.ndarray, size: np.ndarray, defined: np.ndarray, tg: TaskGraph,
             say: Report) -> None:  # fmt: skip
    """Every byte that is read (an update reads its box) was written: the writes do not overlap, so sizes add up.

    An attention task may read what it has itself appended: it stores first. Other kinds promise no order inside a task.
    """
    attention = np.array([x.kind.lower() == "attention" for x in tg.grids], bool)[tg.grid_of]
    i, j = acc.cell[g], acc.cell[h]
    gives = acc.mode[i] == WRITE
    earlier = acc.first[g] < acc.first[h]
    own = (acc.first[g] == acc.first[h]) & attention[acc.first[h]] & (acc.mode[j] == READ)
    total = np.zeros(len(acc.cell), np.int64)
    np.add.at(total, h[gives & (earlier | own)], size[gives & (earlier | own)])
    # An update is a write, too: of two writes either may come first in the pair.
    gives = (acc.mode[j] == WRITE) & (acc.mode[i] == UPDATE)
    gives &= acc.first[h] < acc.first[g]
    np.add.at(total, g[gives], size[gives])
    reads = (acc.mode != WRITE) & ~defined[acc.buffer]
    lacking = np.flatnonzero(reads[acc.cell] & (total < acc.shape.size[acc.cell]))
    if len(lacking):
        raise VerifyError(say.undefined(acc, lacking[np.argmin(acc.first[lacking])]))


def _not_clobbered(acc: Accesses, mixed: list[tuple[int, int]], say: Report) -> None:
    """Where the uses of two buffers are mixed: neither is written between a write and a read of a byte of the other."""
    span = {int(acc.buffer[a]): (a, b) for a, b in acc.ranges()}
    for x, y in mixed:
        for ours, theirs in ((span[x], span[y]), (span[y], span[x])):
            _kept(acc, ours, theirs, say)


def _kept(acc: Accesses, ours: tuple[int, int], theirs: tuple[int, int], say: Report) -> None:
    """What is written to one range of cells is still there when it is read, whatever happens in the other range."""
    cells = np.concatenate([np.arange(*ours), np.arange(*theirs)])
    mine, mode = np.arange(len(cells)) < ours[1] - ours[0], acc.mode[cells]
    rects = rectangles(concatenate(placed(acc, [ours, theirs])))
    made, over = rects.of(mine & (mode == WRITE)), rects.of(~mine & (mode != READ))
    reads = rects.of(mine & (mode != WRITE))
    i, j = join(made, over)
    common = made.meet(i, over, j)
    pair, read = join(common, reads)
    lost = common.meet(pair, reads, read)
    group, last = acc.groups(), np.maximum.reduceat(acc.last, acc.groups()[:-1])
    one, two, three = cells[made.own[i[pair]]], cells[over.own[j[pair]]], cells[reads.own[read]]
    start, end = acc.first[group[one]], last[three]
    row, n = ragged(np.diff(group)[two])  # all the tasks that write there
    task = acc.first[group[two][row] + n]
    for k in np.flatnonzero((task > start[row]) & (task < end[row]))[:1]:
        n = row[k]
        where, tasks = (one[n], two[n], three[n]), (start[n], task[k], end[n])
        raise VerifyError(say.clobbered(acc, where, tasks, lost.first_run(n)))


def _results(acc: Accesses, tg: TaskGraph, say: Report) -> int:
    """Every byte of every result is written; returns the bytes that writes cover."""
    covered = np.zeros(len(tg.buffers), np.int64)
    whole = acc.mode == WRITE
    np.add.at(covered, acc.buffer[whole], acc.shape.size[whole])
    for b in tg.buffers:
        if b.space == "result" and b.alias < 0 and covered[b.id] < b.nbytes:
            raise VerifyError(say.not_covered(b.id))
    return int(covered.sum())
