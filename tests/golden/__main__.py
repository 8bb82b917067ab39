"""Compares every golden case with what the passes give, or writes that (`--update`)."""

import argparse
import difflib

from tests import golden

parser = argparse.ArgumentParser(prog="python -m tests.golden", description=golden.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
parser.add_argument("--update", action="store_true", help="write the expected parts")
parser.add_argument("cases", nargs="*", default=golden.CASES, metavar="PASS/NAME", help="all if none is named")
options = parser.parse_args()
differ = 0
for case in options.cases:
    upper, expected = golden.read(case)
    found = golden.run(case)
    if found != expected:
        differ += 1
        print(*difflib.unified_diff(expected.splitlines(), found.splitlines(), case, case, lineterm=""), sep="\n")
        if options.update:
            golden.path(case).write_text(f"{upper}\n{found}")
raise SystemExit(bool(differ and not options.update))
