"""`python -m tests.taskgraphs` times the verifier on a graph like that of Qwen3-8B; with a seed, prints that graph."""

from __future__ import annotations

import sys
import time

from jax_mpk.verify import verify
from tests.taskgraphs import decoder, sound


def main() -> None:
    if len(sys.argv) > 1:
        print(sound(int(sys.argv[1])))
        return
    for name, make in {"Qwen3-8B, batch 16": decoder, "batch 1": lambda: decoder(batch=1),
                       "120 layers": lambda: decoder(layers=120)}.items():  # fmt: skip
        tg = make()
        start = time.perf_counter()
        certificate = verify(tg)
        print(f"{name}: {time.perf_counter() - start:.2f} s for {len(tg.boxes)} boxes; {certificate}")


if __name__ == "__main__":
    main()
