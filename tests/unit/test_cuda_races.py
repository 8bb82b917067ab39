"""The emulator's race detector: kernels without one of their barriers, waits or orders. The intact ones are the other
emulated tests, all of which look for races."""

from __future__ import annotations

import re
import shutil

import jax.numpy as jnp
import pytest

from tests import emulator
from tests.device import programs
from tests.execute import Runner
from tests.unit.test_cuda_emulated import gpu, model

if shutil.which("g++") is None:
    pytest.skip("the emulator needs g++", allow_module_level=True)

# What is taken away (a pattern, its replacement) and what the report must say.
DAMAGE = {
    "an activation without its barrier": (r"sync_consumers\(\);(\s*w.act_key = key;)", r"\1", "shared memory.*writes.*lhs"),
    "sums that are read before all are there": (r"continue;  // the sums.*\n\s*sync_consumers\(\);", "continue;", "shared memory.*red"),
    "a frame given back while lanes read it": (r"__syncwarp\(\);\n(\s*if \(lane == 0\) mbarrier_arrive)", r"\1", "tensor copy writes"),
    "a frame that is read without waiting": (r"wait_phase\(w.state, &w.sh->full.*;", "", "tensor copy writes.*reads in"),
    "events without an acquire": (r"have = ld_acquire\(", "have = ld_relaxed(", "workspace"),
    "a task without barriers that writes what it started from":
        (r"(V\d+::run\(w, d\);)", r"\1 w.keep<false>();", "act_key = sh->act_key;.*writes.*keep"),
    "lanes that still read what lane 0 overwrites": (r"__syncwarp\(\);  // every lane has read `old`", "", "soften"),
}  # fmt: skip

MODELS = {
    "a task without barriers that writes what it started from": ("qwen3-tiny", 1),
    "lanes that still read what lane 0 overwrites": ("llama-tiny", 3),  # heads of 16: no tensor cores
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kernel_is_reported(damage, monkeypatch):
    pattern, replacement, report = DAMAGE[damage]
    host, tried = emulator._host, []

    def damaged(text: str) -> str:
        out, count = re.subn(pattern, replacement, text)
        tried.append(count)
        return host(out)

    monkeypatch.setattr(emulator, "_host", damaged)
    if damage in MODELS:
        runner, _ = model(*MODELS[damage], jnp.bfloat16, 72)
    else:
        x, w = programs.chain_operands(3, 256, 384, 2)
        runner = Runner(programs.chain(), x, *w, target=gpu("sm_90a", 4, ring=4, window=2))
    site = emulator.Site(runner.blob)
    assert site.kernel["ring"] and tried[0]
    with pytest.raises(emulator.Race, match=f"(?s){report}"):
        site.run(runner)
