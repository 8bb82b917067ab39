"""`python -m tests.fuzz SEED COUNT`: the cases of seeds SEED .. SEED+COUNT-1; a failure is printed as the smallest
function that was found. `python -m tests.fuzz SEED --show` prints one case and runs it in this process."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time

from tests.fuzz import jobs


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    p.add_argument("seed", type=int)
    p.add_argument("count", type=int, nargs="?", default=1)
    p.add_argument("--implementation", choices=("cpu", "emulator", "cuda"), default="cpu")
    p.add_argument("--arch", default="", help="CUDA: an older architecture, as sm_80")
    p.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0))))
    p.add_argument("--no-shrink", action="store_true")
    p.add_argument("--show", action="store_true")
    a = p.parse_args()
    if a.show:
        return _show(a)
    counts: collections.Counter[str] = collections.Counter()
    start, found = time.monotonic(), []

    def tally() -> str:
        kinds = ", ".join(f"{n} {k}" for k, n in sorted(counts.items()))
        return f"{sum(counts.values())} cases in {time.monotonic() - start:.0f} s: {kinds}"

    settings = jobs.Settings(a.implementation, a.arch, not a.no_shrink)
    for x in jobs.answers(range(a.seed, a.seed + a.count), min(a.jobs, a.count), settings):
        counts[x.kind] += 1
        if x.text:
            found.append(x.seed)
            print(f"== {x.kind}, seed {x.seed}: {x.text}\n", flush=True)
        if sum(counts.values()) % 500 == 0:
            print(f"-- {tally()}", flush=True)
    print(tally())
    if found:
        print(f"seeds to look at: {' '.join(map(str, sorted(found)))}")
    return 1 if found else 0


def _show(a: argparse.Namespace) -> int:
    jobs.prepare(a.implementation)
    from tests.fuzz.grow import grow
    from tests.fuzz.run import verdict

    case = grow(a.seed)
    print(case.source(), flush=True)
    v = verdict(case, a.implementation, a.arch)
    print(f"{v.kind}: {v.text}" if v.text else v.kind)
    return int(v.bad)


if __name__ == "__main__":
    sys.exit(main())
